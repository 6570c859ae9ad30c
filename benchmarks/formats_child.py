"""Requanto's side of formats.py, in a process of its own: opens one checkpoint and says what holds.

    REQUANTO_FOREIGN=always python benchmarks/formats_child.py FOLDER ANSWER.json

First the memory of loading, the bytes after generating and the time of a token, in the checkpoint's own dtype; then, in
float32, whether weights and outputs are those that the format's library gave the writer, whether a save loads equal, and
whether LoRA trains and merges. Each step answers for itself: one that fails leaves its reason.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats_models import Peak, call, class_of, greedy, held, inputs_of, open_model, run, seconds_of, written
from safetensors.torch import load_file
from torch import Tensor, nn

import requanto
from requanto import QTensor

STEP = 2e-3


class Log(logging.Handler):
    """Keeps what Requanto logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def quantized(model: nn.Module) -> dict[str, QTensor]:
    """The quantized weights by name; of a tied weight the name of the embedding."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, QTensor)}


def warm(folder: Path, said: dict[str, Any]) -> None:
    """Imports what loading imports: Python's own memory for code is no part of it."""
    if "gguf_file" in said["options"] or said["single_file"].endswith(".gguf"):
        import gguf  # noqa: F401
        import transformers.modeling_gguf_pytorch_utils  # noqa: F401
    config = folder / "model" / "config.json"
    if said["kind"] == "diffusers":
        import diffusers.loaders.single_file_model
        import diffusers.quantizers
        import diffusers.schedulers  # noqa: F401

        class_of(said["class"])
    elif config.exists():
        from transformers import AutoConfig

        kind = AutoConfig.for_model(json.loads(config.read_text(encoding="utf-8"))["model_type"])
        class_of(said["class"])._model_mapping[type(kind)]


def memory(folder: Path, said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
    """Memory and time, in the checkpoint's own dtype."""
    warm(folder, said)
    gc.collect()
    start = time.perf_counter()
    with Peak() as peak:
        model = open_model(folder, said, "auto" if said["kind"] == "causal" else torch.bfloat16)
    seconds = time.perf_counter() - start
    sizes, inputs = said["sizes"], inputs_of(said, outputs)
    own = quantized(model)
    answer: dict[str, Any] = {
        "opens": True,
        "load_seconds": seconds,
        "peak": peak.grown,
        "peak_files": peak.files - peak.files_before,
        "bound": sizes["file"] + sizes["largest_two"] + 200_000_000,
        "weights": len(own),
        "types": sorted({p._spec.text().split()[0] for p in own.values()}),
    }
    if said["kind"] == "causal":
        answer["token_seconds"] = seconds_of(lambda: greedy(model, inputs["input_ids"]), 16)
    else:
        answer["token_seconds"] = seconds_of(lambda: run(model, inputs))
    answer["bytes_after"] = sum({id(p._storage): p.nbytes for p in own.values()}.values())
    answer["held"] = held(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reference = load_file(folder / "reference.safetensors")
    answer["exact_in_dtype"] = all(torch.equal(_floats(parameters[name]), wanted) for name, wanted in reference.items())
    return answer


def _floats(value: Tensor) -> Tensor:
    return value.dequantize() if isinstance(value, QTensor) else value.detach()


def compare(model: nn.Module, reference: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """How far weights are from the library's own, weight by weight."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    packed = total = 0
    worst = ulps = 0.0
    exact = rounds = True
    where = ""
    for name, wanted in reference.items():
        found = parameters[name]
        total += wanted.numel()
        packed += wanted.numel() if isinstance(found, QTensor) else 0
        own = found.dequantize().float() if isinstance(found, QTensor) else found.detach().float()
        if torch.equal(own, wanted.float()):
            continue
        exact = False
        rounds = rounds and torch.equal(own.to(dtype).float(), wanted.float())
        apart = (own - wanted.float()).abs()
        # One rounding at the largest weight of a row: where zero points are subtracted, rounded terms cancel.
        unit = torch.finfo(dtype).eps * wanted.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
        ulps = max(ulps, (apart / unit).max().item())
        if apart.max().item() > worst:
            worst, where = apart.max().item(), name
    scale = max((value.float().abs().max().item() for value in reference.values()), default=0.0)
    return {
        "packed": packed / total,
        "exact": exact,
        "rounds": rounds,
        "ulps": ulps,
        "difference": worst,
        "relative": worst / scale,
        "worst": where,
    }


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def outputs_equal(model: Any, said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
    """Outputs and greedy tokens beside those of the float model with the library's weights."""
    inputs = inputs_of(said, outputs)
    answer: dict[str, Any] = {"output_difference": far(run(model, inputs), outputs["output"])}
    if said["kind"] == "causal":
        tokens = greedy(model, inputs["input_ids"])
        answer["tokens_equal"] = int((tokens == outputs["tokens"]).sum())
    if "rounded" in outputs:  # the format rounds inputs, too: what that does in its own library
        answer["library_difference"] = far(outputs["rounded"], outputs["output"])
        answer["library_tokens"] = int((outputs["rounded_tokens"] == outputs["tokens"]).sum())
    return answer


def saved(model: Any, said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
    """Whether a save in our format loads with the same bytes and the same output."""
    inputs = inputs_of(said, outputs)
    before = run(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        name = "dtype" if said["class"].startswith("Auto") else "torch_dtype"
        again = class_of(said["class"]).from_pretrained(folder, **{name: torch.float32}).eval()
        own, new = quantized(model), quantized(again)
        same = own.keys() == new.keys() and all(_same(own[key], new[key]) for key in own)
        # A weight that was a slice of another one may run on another kernel afterwards.
        apart = far(run(again, inputs), before)
        answer = {"saves": same and apart < 1e-5, "save_difference": apart, "save_weights": same}
        answer["saved_bytes"] = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return answer


def _same(a: QTensor, b: QTensor) -> bool:
    ours, others = a.inner_tensors(), b.inner_tensors()
    return ours.keys() == others.keys() and all(
        torch.equal(ours[part].view(torch.uint8), others[part].view(torch.uint8)) for part in ours
    )


def lora(model: Any, said: dict[str, Any], outputs: dict[str, Tensor]) -> dict[str, Any]:
    """One step of LoRA, and the merge."""
    from peft import LoraConfig, get_peft_model

    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and isinstance(m.weight, QTensor)]
    experts = [name for name, p in quantized(model).items() if p.dim() == 3]
    setting: dict[str, Any] = {"r": 4, "target_modules": linear} if linear else {"r": 4, "target_modules": []}
    if experts:
        setting["target_parameters"] = experts
    wrapped = get_peft_model(model, LoraConfig(**setting)).train()
    inputs = inputs_of(said, outputs)
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=STEP)
    call(wrapped, inputs).float().pow(2).mean().backward()
    # All steps have the same length, whatever the gradient is.
    for p in trained.values():
        if p.grad is not None:
            p.grad /= p.grad.abs().max().clamp(min=1e-20)
    optimizer.step()
    changed = sum(not torch.equal(p, before[name]) for name, p in trained.items() if "lora_B" in name)
    wrapped.eval()
    unmerged = run(wrapped, inputs)
    count = len(quantized(wrapped))
    merged = wrapped.merge_and_unload()
    after = run(merged, inputs)
    return {
        "lora_adapters": sum("lora_B" in name for name in trained),
        "lora_changed": changed,
        "merge_finite": bool(after.isfinite().all()),
        "merge_difference": far(after, unmerged),
        "merge_packed": len(quantized(merged)) == count,
        "lora_effect": far(unmerged, outputs["output"]),
    }


def main() -> None:
    """Runs the steps and writes the answer after each."""
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    log = Log()
    logging.getLogger("requanto").addHandler(log)
    logging.getLogger("requanto").setLevel(logging.INFO)
    said, outputs = written(folder), load_file(folder / "outputs.safetensors")
    answer: dict[str, Any] = {"requanto": getattr(requanto, "__version__", ""), "failed": {}}

    def step(name: str, call: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer.update(call())
        except Exception as error:  # the row says whatever is raised
            answer["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        answer["log"] = list(dict.fromkeys(log.lines))[:8]
        target.write_text(json.dumps(answer), encoding="utf-8")
        return name not in answer["failed"]

    if not step("open", lambda: memory(folder, said, outputs)):
        return
    gc.collect()
    model = open_model(folder, said, torch.float32)
    dtype = getattr(torch, said["dtype"])
    step("equal", lambda: compare(model, load_file(folder / "reference.safetensors"), dtype))
    step("generates", lambda: outputs_equal(model, said, outputs))
    step("saves", lambda: saved(model, said, outputs))
    step("lora", lambda: lora(model, said, outputs))


if __name__ == "__main__":
    main()
