"""Quantizes two models with one setting of a library and measures them; accuracy.py starts it in that library's Python.

    python benchmarks/accuracy_child.py JOB.json OUT.json

Every library quantizes the same layers by its own public call. The dequantized weights are put into the float model,
which is measured: this compares the libraries' weights, not their kernels. Needs torch, transformers and safetensors,
and Requanto only for its own rows.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy_libraries import LIBRARIES, LayerResult, version_of
from safetensors.torch import load_file
from torch import Tensor, nn


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to quantize: every Linear layer but the output layer, which shares its weight with the embedding."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def quantize(library: str, setting: dict[str, Any], model: nn.Module, material: dict[str, Tensor]) -> dict[str, float]:
    """Puts dequantized weights into the model; returns bits a weight and seconds."""
    chosen = layers(model)
    float_weights = {name: module.weight.detach() for name, module in chosen.items()}
    start = time.perf_counter()
    found: Iterator[tuple[str, LayerResult]] = LIBRARIES[library](model, chosen, material, **setting)
    stored = counted = total = 0.0
    done = {}
    for name, result in found:
        weight = float_weights[name]
        if tuple(result.weight.shape) != tuple(weight.shape):
            raise RuntimeError(
                f"{library} gave {name} the shape {tuple(result.weight.shape)}, was {tuple(weight.shape)}"
            )
        done[name] = result.weight.detach().to(weight.dtype)
        stored, counted, total = stored + result.stored, counted + result.counted, total + weight.numel()
    missing = sorted(set(float_weights) - set(done))
    if missing:
        raise RuntimeError(f"{library} left {len(missing)} layers float: {', '.join(missing[:3])} ...")
    if library != "float" and all(torch.equal(done[name], float_weights[name]) for name in done):
        raise RuntimeError(f"{library} changed no weight")
    seconds = time.perf_counter() - start
    for name, weight in done.items():
        parent = model.get_submodule(name)
        parent.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return {"bits": 8 * counted / total, "stored_bits": 8 * stored / total, "seconds": seconds}


@torch.inference_mode()
def perplexity(model: Any, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood of all tokens but each window's first; ``[windows, tokens]``."""
    total = 0.0
    for ids in windows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        for rows, wanted in zip(logits.split(128), ids[1:].split(128), strict=True):
            total += F.cross_entropy(rows.float(), wanted, reduction="sum").double().item()
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def embeddings(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean-pooled embeddings, ``[batches * sentences, features]`` of ``[batches, sentences, tokens]``."""
    found = []
    for batch, own_mask in zip(ids, mask, strict=True):
        hidden = model(input_ids=batch, attention_mask=own_mask).last_hidden_state
        weights = own_mask.unsqueeze(-1).to(hidden.dtype)
        found.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.cat(found)


def language_model(job: dict[str, Any], material: dict[str, Tensor]) -> dict[str, Any]:
    """Perplexity of SmolLM2 on each of the job's texts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["smollm2"], dtype=torch.bfloat16).eval()
    row: dict[str, Any] = {}
    cost = quantize(job["library"], job["setting"], model, {"samples": material["samples"]} | {"path": job["smollm2"]})
    row |= {key: round(value, 4) for key, value in cost.items()}
    for text in job["texts"]:
        row[text] = round(perplexity(model, material[text]), 4)
        print(f"  {text}: perplexity {row[text]:,.2f}", file=sys.stderr, flush=True)
    return row


def encoder(job: dict[str, Any], material: dict[str, Tensor]) -> dict[str, Any]:
    """Mean cosine of MiniLM's embeddings to the float32 model's. Weights are rounded to bfloat16 before, so that scales
    take as many bits as in SmolLM2; the model runs in float32."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(job["minilm"], dtype=torch.bfloat16).eval()
    cost = quantize(job["library"], job["setting"], model, {"path": job["minilm"]})
    found = embeddings(model.float(), material["minilm_ids"], material["minilm_mask"])
    cosine = F.cosine_similarity(found.double(), material["minilm_float"].double()).mean().item()
    print(f"  minilm: cosine {cosine:.5f}", file=sys.stderr, flush=True)
    return {"minilm_bits": round(cost["bits"], 4), "minilm_cosine": round(cosine, 6)}


def main() -> None:
    """Reads the job and writes the row; a failure is a row with the reason."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    row: dict[str, Any] = {}
    try:
        material = load_file(job["material"])
        row["version"] = version_of(job["library"])
        if job["minilm"]:
            row |= encoder(job, material)
        if job["texts"]:
            row |= language_model(job, material)
    except Exception as error:  # the row contains whatever the library raises
        message = " ".join(str(error).split())
        row["failed"] = f"{type(error).__name__}: {message[:300]}"
        print(f"  {row['failed']}", file=sys.stderr, flush=True)
    Path(sys.argv[2]).write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main()
