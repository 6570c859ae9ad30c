"""What the writers share."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from formats_models import TOKENS, class_of, greedy, prompt, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

START = time.perf_counter()


@dataclass
class Made:
    """What a writer made.

    Attributes:
        weights: name of each quantized weight of the float model -> its value as the library dequantizes it.
        package: the library whose values they are.
        how: who wrote the file and who dequantized, in words.
        quantized: bytes of the quantized weights in the file; None: all tensors of ``model`` that the float model lacks.
        kind: "causal", or "diffusers" for a denoiser.
        cls: class that opens it.
        single_file: name of the file, for ``from_single_file``.
        options: keywords that every reader gets, such as ``gguf_file``.
        values: dtype in which the library computed the weights, if the tensors have a wider one.
        inputs: name of a layer and its input -> the input as the library rounds it; None: inputs are not quantized.
    """

    weights: dict[str, Tensor]
    package: str
    how: str
    quantized: int | None = None
    kind: str = "causal"
    cls: str = "AutoModelForCausalLM"
    single_file: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    values: torch.dtype | None = None
    inputs: Callable[[str, Tensor], Tensor] | None = None


def float_model(base: Path, dtype: torch.dtype = torch.bfloat16, cls: str = "AutoModelForCausalLM") -> Any:
    """The float model."""
    name = "dtype" if cls.startswith("Auto") else "torch_dtype"
    return class_of(cls).from_pretrained(base, **{name: dtype}).eval()


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear layers that are quantized: all but the output layer."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def save(out: Path, base: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, add: bool = True) -> None:
    """Writes a checkpoint: the tensors given, the float model's others, its config with ``quantization_config``.

    Args:
        tensors: new tensors; a weight ``X.weight`` of which no tensor is given but another of ``X`` is left out.
        config: ``quantization_config``.
        add: False: the tensors are all there are.
    """
    modules = {name.rpartition(".")[0] for name in tensors}
    for name, value in float_tensors(base).items() if add else ():
        if name not in tensors and not (name.endswith(".weight") and name.removesuffix(".weight") in modules):
            tensors[name] = value
    target = out / "model"
    companions(base, target)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    described = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if config is not None:
        described["quantization_config"] = config
    (target / "config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def float_tensors(base: Path) -> dict[str, Tensor]:
    """All tensors of the float checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(base.glob("*.safetensors")):
        found |= load_file(file)
    return found


def companions(base: Path, target: Path) -> None:
    """Copies tokenizer and generation config."""
    target.mkdir(exist_ok=True)
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json" and "index" not in path.name:
            shutil.copy(path, target / path.name)


def probed(module: nn.Module, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight ``[N, K]`` that a layer multiplies by, seen from outside: its output for a unit matrix."""
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        out = module(torch.eye(columns, dtype=dtype))
        return (out if bias is None else out - bias).t().contiguous()


def finish(out: Path, base: Path, made: Made) -> None:
    """Runs the float model with the dequantized weights, and writes what was made."""
    measured = sizes(out, base, made)
    weights = {name: value.detach().contiguous() for name, value in made.weights.items()}
    for name, value in weights.items():
        if not value.isfinite().all():
            raise RuntimeError(f"{name}: {made.package} dequantizes it to values that are not finite")
    model = float_model(base, torch.float32, made.cls)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in weights.items():
            if parameters[name].shape != value.shape:
                raise RuntimeError(
                    f"{name}: {made.package} gives {tuple(value.shape)}, not {tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(value)
    outputs: dict[str, Tensor] = {}
    if made.kind == "causal":
        ids = prompt(base, model.config.vocab_size)
        inputs = {"input_ids": ids}
        outputs["tokens"] = greedy(model, ids, TOKENS)
    else:
        from formats_writers.denoisers import inputs_for

        inputs = inputs_for(model)
    outputs["output"] = run(model, inputs).contiguous()
    if made.inputs is not None:
        for name in weights:
            layer = name.removesuffix(".weight")
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _, given, layer=layer: (made.inputs(layer, given[0]), *given[1:])
            )
        outputs["rounded"] = run(model, inputs).contiguous()
        outputs["rounded_tokens"] = greedy(model, inputs["input_ids"], TOKENS)
    save_file(outputs | {f"input.{name}": value for name, value in inputs.items()}, out / "outputs.safetensors")
    save_file(weights, out / "reference.safetensors")
    said = {
        "kind": made.kind,
        "class": made.cls,
        "single_file": made.single_file,
        "options": made.options,
        "package": made.package,
        "version": version(made.package),
        "how": made.how,
        "dtype": str(made.values or next(iter(weights.values())).dtype).removeprefix("torch."),
        "sizes": measured,
        "seconds": round(time.perf_counter() - START, 1),
    }
    (out / "written.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def sizes(out: Path, base: Path, made: Made) -> dict[str, int]:
    """Bytes of the whole file, of its quantized weights, of its table of embeddings and of the two largest tensors."""
    files = [
        *out.glob("*.gguf"),
        *out.glob("model/*.gguf"),
        *out.glob("*.safetensors"),
        *out.glob("model/*.safetensors"),
    ]
    found: dict[str, int] = {}
    for file in files:
        if file.suffix == ".gguf":
            from gguf import GGUFReader

            found |= {t.name: int(t.n_bytes) for t in GGUFReader(file).tensors}
        else:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no dict)
                    found[name] = opened.get_tensor(name).nbytes
    plain = {name for name in float_tensors(base) if name not in made.weights}
    quantized = made.quantized
    if quantized is None:
        quantized = sum(size for name, size in found.items() if name not in plain)
    table = [size for name, size in found.items() if "embed_tokens.weight" in name or name == "token_embd.weight"]
    floats = sorted((4 * value.numel() for value in made.weights.values()), reverse=True)
    return {
        "file": sum(file.stat().st_size for file in files),
        "quantized": quantized,
        "embeddings": sum(table),
        "largest_two": sum(sorted(found.values(), reverse=True)[:2]),
        "floats": sum(floats),
    }
