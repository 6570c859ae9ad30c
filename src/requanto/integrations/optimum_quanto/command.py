"""``optimum-cli quanto quantize``, for where optimum is installed.

optimum's command line loads every file of the name space package ``optimum.commands.register`` and registers what its
``REGISTER_COMMANDS`` lists; such a file needs one line: ``from requanto.integrations.optimum_quanto.command import
REGISTER_COMMANDS``.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo  # type: ignore[import-not-found]

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


class QuantizeCommand(BaseOptimumCLICommand):
    """Quantizes a Transformers model into a core directory."""

    COMMAND = CommandInfo(name="quantize", help="Quantize Hugging Face models.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        required = parser.add_argument_group("Required arguments")
        required.add_argument("output", help="The path to save the quantized model.")
        required.add_argument("-m", "--model", required=True, help="Hub model id, or path to a local model.")
        required.add_argument("--weights", default="int8", choices=["int2", "int4", "int8", "float8"], help="Type.")
        optional = parser.add_argument_group("Optional arguments")
        optional.add_argument("--revision", default=None, help="The model's revision on the hub.")
        optional.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
        optional.add_argument("--library", default=None, choices=["transformers"], help="The library to load it with.")
        optional.add_argument("--task", default=None, choices=sorted(TASKS), help="Default: what the config says.")
        optional.add_argument(
            "--torch_dtype", default="auto", choices=["auto", "fp16", "bf16"], help="dtype to load in."
        )
        optional.add_argument("--device", default="cpu", help="The device to load the model on.")

    def run(self) -> None:
        import torch
        import transformers

        from requanto.integrations.optimum_quanto.models import QuantizedTransformersModel

        args = self.args
        hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
        loader: Any = None
        if args.task is not None:
            loader = getattr(transformers, TASKS[args.task])
        else:
            named = transformers.AutoConfig.from_pretrained(args.model, **hub).architectures or [None]
            loader = getattr(transformers, named[0] or "", None)
            if loader is None:
                raise ValueError(f"{args.model} names no Transformers class ({named[0]}): say which with --task")
        dtype = {"auto": "auto", "fp16": torch.float16, "bf16": torch.bfloat16}[args.torch_dtype]
        model = loader.from_pretrained(args.model, dtype=dtype, **hub).to(args.device)
        QuantizedTransformersModel.quantize(model, weights=args.weights).save_pretrained(args.output)


class QuantoCommand(BaseOptimumCLICommand):
    """The group of commands."""

    COMMAND = CommandInfo(name="quanto", help="Hugging Face models quantization tools")
    SUBCOMMANDS = (
        CommandInfo(name="quantize", help="Quantize Hugging Face models.", subcommand_class=QuantizeCommand),
    )


REGISTER_COMMANDS = [QuantoCommand]
