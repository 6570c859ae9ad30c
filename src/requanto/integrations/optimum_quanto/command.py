"""``optimum-cli quanto quantize``, implemented by Requanto.

optimum's command line imports every file of its folder ``optimum/commands/register`` and registers the commands in its
``REGISTER_COMMANDS``. `register` writes such a file, which imports the list from this module.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from typing import Any

logger = logging.getLogger(__name__)

#: task -> Transformers' auto class
TASKS = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}


def parse_args(parser: ArgumentParser) -> None:
    """Adds the arguments of ``quantize``, with optimum-quanto's names."""
    required = parser.add_argument_group("Required arguments")
    required.add_argument("output", help="The path to save the quantized model.")
    required.add_argument("-m", "--model", required=True, help="Hub model id, or path to a local model.")
    required.add_argument("--weights", default="int8", choices=["int2", "int4", "int8", "float8"], help="Weight type.")
    optional = parser.add_argument_group("Optional arguments")
    optional.add_argument("--revision", default=None, help="The model's revision on the hub.")
    optional.add_argument(
        "--trust_remote_code", action="store_true", help="Allow running code from the model's repository."
    )
    optional.add_argument("--library", default=None, choices=["transformers"], help="The library to load it with.")
    optional.add_argument("--task", default=None, choices=sorted(TASKS), help="Default: from the model's config.")
    optional.add_argument("--torch_dtype", default="auto", choices=["auto", "fp16", "bf16"], help="dtype to load in.")
    optional.add_argument("--device", default="cpu", help="The device to load the model on.")


def run(args: Namespace) -> None:
    """Loads a model, quantizes it and saves it in optimum-quanto's own format."""
    import torch
    import transformers

    from requanto.integrations.optimum_quanto.models import QuantizedTransformersModel

    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    if args.task is not None:
        loader = getattr(transformers, TASKS[args.task])
    else:
        named = (transformers.AutoConfig.from_pretrained(args.model, **hub).architectures or [""])[0]
        loader = getattr(transformers, named, None)
        if loader is None:
            raise ValueError(
                f"the config of {args.model} names no Transformers class (found {named!r}): choose one with --task"
            )
    dtype = {"auto": "auto", "fp16": torch.float16, "bf16": torch.bfloat16}[args.torch_dtype]
    model = loader.from_pretrained(args.model, dtype=dtype, **hub).to(args.device)
    QuantizedTransformersModel.quantize(model, weights=args.weights).save_pretrained(args.output)


def commands() -> list[type]:
    """Returns the command group ``quanto``, as classes of the installed optimum."""
    from optimum.commands import optimum_cli  # type: ignore[import-not-found]
    from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # type: ignore[import-not-found]

    # optimum-quanto, if installed, has already registered its command; two of one name would be an error.
    registered = getattr(optimum_cli, "_OPTIMUM_CLI_SUBCOMMANDS", [])
    for entry in [entry for entry in registered if entry[0].COMMAND.name == "quanto"]:
        logger.warning("optimum-cli quanto: replacing the command of %s by Requanto's", entry[0].__module__)
        registered.remove(entry)

    class QuantizeCommand(BaseOptimumCLICommand):
        COMMAND = CommandInfo(name="quantize", help="Quantize Hugging Face models.")
        parse_args = staticmethod(parse_args)

        def run(self) -> None:
            run(self.args)

    class QuantoCommand(BaseOptimumCLICommand):
        COMMAND = CommandInfo(name="quanto", help="Hugging Face models quantization tools")
        SUBCOMMANDS = (
            CommandInfo(name="quantize", help="Quantize Hugging Face models.", subcommand_class=QuantizeCommand),
        )

    return [QuantoCommand]


def __getattr__(name: str) -> Any:
    if name == "REGISTER_COMMANDS":  # created on access, because it needs optimum
        return commands()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
