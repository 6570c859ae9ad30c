"""A format's own library, without Requanto, in its own Python: opens a checkpoint of formats.py, runs it, counts bytes.

    python benchmarks/formats_peer.py LIBRARY FOLDER ANSWER.json

``opens`` needs outputs close to those of the weights that the file holds: a library that loads codes as weights, or random
ones, does not open it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from formats_models import Peak, greedy, held, inputs_of, open_model, run, seconds_of, written
from safetensors.torch import load_file
from torch import Tensor

#: the most that outputs may be away from those in float32, relative to their norm: inputs may be rounded to 8 bits.
#: Random weights, or codes without scales, are further away than 1.
FAR = 0.3


def plain(folder: Path, said: dict[str, Any]) -> Any:
    """The library's own way to open it, in the dtype of the checkpoint."""
    return open_model(folder, said, "auto" if said["kind"] == "causal" else torch.bfloat16)


def diffusers(folder: Path, said: dict[str, Any]) -> Any:
    """Diffusers; of a GGUF file it wants to know that it is one."""
    if not said["single_file"].endswith(".gguf"):
        return plain(folder, said)
    from diffusers import GGUFQuantizationConfig

    return open_model(
        folder, said, torch.bfloat16, quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    )


def auto_round(folder: Path, said: dict[str, Any]) -> Any:
    """auto-round takes GPTQ and AWQ over if its config is given."""
    from transformers import AutoRoundConfig

    return open_model(folder, said, "auto", quantization_config=AutoRoundConfig())


def sdnq(folder: Path, said: dict[str, Any]) -> Any:
    """SDNQ registers itself on import."""
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    import sdnq  # noqa: F401

    return plain(folder, said)


def optimum_quanto(folder: Path, said: dict[str, Any]) -> Any:
    """optimum-quanto's class; the model inside."""
    from optimum.quanto import QuantizedModelForCausalLM

    return QuantizedModelForCausalLM.from_pretrained(folder / "model")._wrapped.eval()


def modelopt(folder: Path, said: dict[str, Any]) -> Any:
    """ModelOpt's hook for Transformers."""
    import modelopt.torch.opt as mto

    mto.enable_huggingface_checkpointing()
    return plain(folder, said)


def gptqmodel(folder: Path, said: dict[str, Any]) -> Any:
    """GPTQModel's own loader; its layers decide about kernels."""
    from gptqmodel import GPTQModel

    return GPTQModel.load(str(folder / "model"), device="cpu").model.eval()


OPENERS: dict[str, tuple[str, Callable[[Path, dict[str, Any]], Any]]] = {
    "transformers": ("transformers", plain),
    "diffusers": ("diffusers", diffusers),
    "compressed-tensors": ("compressed-tensors", plain),
    "auto-round": ("auto-round", auto_round),
    "gptqmodel": ("gptqmodel", gptqmodel),
    "gguf": ("gguf", plain),
    "bitsandbytes": ("bitsandbytes", plain),
    "torchao": ("torchao", plain),
    "hqq": ("hqq", plain),
    "sdnq": ("sdnq", sdnq),
    "modelopt": ("nvidia-modelopt", modelopt),
    "optimum-quanto": ("optimum-quanto", optimum_quanto),
}


def away(found: Tensor, outputs: dict[str, Tensor]) -> float:
    """How far outputs are from those of the float model, relative to their norm; infinite if they hold NaN."""
    apart = (found - outputs["output"]).norm() / outputs["output"].norm()
    return apart.item() if apart.isfinite() else float("inf")


def strange(model: Any, reference: dict[str, Tensor]) -> str:
    """The name of a plain float weight that is not what the file holds; empty if all are."""
    for name, value in model.named_parameters():
        wanted = reference.get(name)
        if wanted is None or wanted.shape != value.shape or type(value.data) is not Tensor:
            continue
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue
        if (value.float() - wanted.float()).abs().max() > 0.02 * wanted.float().abs().max():
            return name
    return ""


def measure(
    model: Any, said: dict[str, Any], outputs: dict[str, Tensor], reference: dict[str, Tensor]
) -> dict[str, Any]:
    """Outputs, bytes after them, time."""
    inputs = inputs_of(said, outputs)
    found = run(model, inputs)
    start = time.perf_counter()
    run(model, inputs)
    slow = time.perf_counter() - start > 2  # some libraries take seconds for a token: fewer of them are enough
    answer: dict[str, Any] = {"output_difference": away(found, outputs)}
    if said["kind"] == "causal":
        count = 2 if slow else 16
        answer["token_seconds"] = seconds_of(
            lambda: greedy(model, inputs["input_ids"], count), count, tries=1 if slow else 2
        )
    else:
        answer["token_seconds"] = seconds_of(lambda: run(model, inputs), tries=2)
    table = model.get_input_embeddings() if said["kind"] == "causal" else None
    name = next(
        (n for n, p in model.named_parameters() if table is not None and p is getattr(table, "weight", None)), ""
    )
    wrong = strange(model, reference)
    return answer | {"held": held(model), "held_but_embeddings": held(model, but=name), "wrong_weight": wrong}


def mlx(folder: Path, said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
    """mlx-lm on the CPU."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, _ = load(str(folder / "model"))
    ids = inputs_of(said, outputs)["input_ids"][0].tolist()
    found = torch.from_numpy(np.array(model(mx.array([ids])).astype(mx.float32)))
    apart = away(found, outputs)

    def generate() -> None:
        for count, _ in enumerate(generate_step(mx.array(ids), model, max_tokens=16), 1):
            if count == 16:
                return

    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    seconds = seconds_of(generate, 16, tries=2)
    return {"output_difference": apart, "token_seconds": seconds, "held": size, "held_but_embeddings": 0}


def llama_cpp(folder: Path, said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
    """llama.cpp through xllamacpp. It maps the file: bytes are those of the process that loading added."""
    import xllamacpp

    with Peak() as peak:
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / "model" / said["options"]["gguf_file"])
        params.n_ctx, params.n_parallel, params.warmup = 256, 1, True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(params)
        ids = inputs_of(said, outputs)["input_ids"][0].tolist()
        wish = {"prompt": ids, "n_predict": 16, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        done: dict[str, Any] = server.handle_completions(wish | {"n_probs": 1})
    content = done["choices"][0]["logprobs"]["content"]
    tokens = torch.tensor([one["id"] for one in content])
    answer: dict[str, Any] = {"tokens_equal": int((tokens == outputs["tokens"][: len(tokens)]).sum())}
    answer["token_seconds"] = done["timings"]["predicted_per_token_ms"] / 1000
    grown = peak.grown + peak.files - peak.files_before
    # Buffers for activations and the vocabulary are in it; weights stay as they are in the mapped file.
    return answer | {"held": grown, "held_but_embeddings": 0, "packed": True}


WHOLE = {"mlx-lm": ("mlx-lm", mlx), "llama.cpp": ("xllamacpp", llama_cpp)}


def main() -> None:
    """Opens and measures; a failure is the first line of the error."""
    library, folder, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    said, outputs = written(folder), load_file(folder / "outputs.safetensors")
    package = (OPENERS.get(library) or WHOLE[library])[0]
    answer: dict[str, Any] = {}
    try:
        answer["version"] = version(package)
        if library in WHOLE:
            answer |= WHOLE[library][1](folder, said, outputs)
        else:
            reference = load_file(folder / "reference.safetensors")
            answer |= measure(OPENERS[library][1](folder, said), said, outputs, reference)
        answer["opens"] = not answer.get("output_difference", 0.0) > FAR and not answer.get("wrong_weight")
    except Exception as error:  # the row says whatever the library raises
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        answer |= {"opens": False, "error": f"{type(error).__name__}: {lines[0].strip()[:300]}"}
    target.write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
