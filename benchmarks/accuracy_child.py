"""Quantizes models with the settings of one library; accuracy.py starts it in that library's Python and measures.

    python benchmarks/accuracy_child.py JOB.json PIPE

For each model and row it writes the dequantized weights to a file, writes a line of JSON to the pipe (the number of an open
file), and waits for a line on stdin. Every library quantizes the same layers by its own public call. Needs torch,
transformers, safetensors and the library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accuracy_libraries import LIBRARIES, version_of
from safetensors.torch import save_file
from torch import Tensor, nn


def layers(model: nn.Module, left: list[str]) -> dict[str, nn.Linear]:
    """The layers to quantize: every Linear layer but output layers, which share their weight with an embedding."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in left
    }


def quantize(row: dict[str, Any], model: nn.Module, left: list[str], material: Any) -> tuple[dict[str, Tensor], Any]:
    """The weights that changed, in the model's dtype, and what they cost: bits a weight and seconds."""
    chosen = layers(model, left)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    start = time.perf_counter()
    stored = counted = total = 0.0
    done: dict[str, Tensor] = {}
    for name, result in LIBRARIES[row["library"]](model, chosen, material, **row["setting"]):
        own = before[f"{name}.weight"]
        if tuple(result.weight.shape) != tuple(own.shape):
            raise RuntimeError(f"{row['library']} gave {name} the shape {tuple(result.weight.shape)}, was {own.shape}")
        if not result.weight.isfinite().all():
            raise RuntimeError(f"{row['library']} gave {name} weights that are not finite")
        done[f"{name}.weight"] = result.weight.detach().to(own.dtype).contiguous().clone()
        stored, counted, total = stored + result.stored, counted + result.counted, total + own.numel()
    seconds = time.perf_counter() - start
    missing = sorted(name for name in chosen if f"{name}.weight" not in done)
    if missing:
        raise RuntimeError(f"{row['library']} left {len(missing)} layers float: {', '.join(missing[:3])} ...")
    if row["library"] == "requanto":  # folds change other parameters too
        for name, value in model.named_parameters():
            if name in before and name not in done and not torch.equal(value, before[name]):
                done[name] = value.detach().clone()
    if row["library"] != "float" and all(torch.equal(value, before[name]) for name, value in done.items()):
        raise RuntimeError(f"{row['library']} changed no weight")
    return done, {"bits": 8 * counted / total, "stored_bits": 8 * stored / total, "seconds": round(seconds, 2)}


def main() -> None:
    """Runs the job's rows; a failure is a line with the reason."""
    import transformers

    answers = os.fdopen(int(sys.argv[2]), "w", encoding="utf-8")

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    for task in job["tasks"]:
        torch.manual_seed(0)
        answer: dict[str, Any] = {"row": task["row"]["name"], "model": task["model"]}
        try:
            model = getattr(transformers, task["class"]).from_pretrained(task["path"], dtype=torch.bfloat16).eval()
            material = {"path": task["path"], "samples": torch.load(task["samples"], weights_only=True)}
            weights, cost = quantize(task["row"], model, job["left"], material)
            save_file(weights, task["out"])
            answer |= {"version": version_of(task["row"]["library"]), "file": task["out"], **cost}
        except Exception as error:  # the row contains whatever the library raises
            answer["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps(answer), file=answers, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main()
