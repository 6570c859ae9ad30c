"""What the digests of a checkpoint cost: saving and loading a quantized model with and without them.

    python benchmarks/digests.py

A Llama of 0.4 billion weights in int8 is saved and loaded in turn with and without digests, from the page cache. A plain
load only maps the files into memory; "and read" also reads every byte of the weights once, as the first use of a model does.
Writes benchmarks/results/digests.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from common import RESULTS, command, machine

import requanto


def timed(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds and CPU seconds of a call, and its result."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}, found


def read_all(model: torch.nn.Module) -> int:
    """Reads every byte of the quantized weights."""
    total = 0
    for parameter in model.parameters():
        if isinstance(parameter, requanto.QTensor):
            total += sum(
                int(p.contiguous().view(-1).view(torch.uint8).max()) for p in parameter.inner_tensors().values()
            )
    return total


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=options.layers, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=512, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    requanto.quantize(model, "int8", exclude="lm_head", optimizer=requanto.AbsmaxOptimizer())
    requanto.freeze(model)
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "model"
        model.save_pretrained(place)
        for _ in range(options.repeats):
            for on in (True, False):
                requanto.settings.write_digests = requanto.settings.check_digests = on
                said = "with digests" if on else "without"
                found, _ = timed(lambda: model.save_pretrained(Path(scratch) / "saved"))
                results.setdefault(f"save {said}", []).append(found)
                found, loaded = timed(lambda: transformers.AutoModelForCausalLM.from_pretrained(place))
                results.setdefault(f"load {said}", []).append(found)
                more, _ = timed(functools.partial(read_all, loaded))
                both = {key: found[key] + more[key] for key in found}
                results.setdefault(f"load and read {said}", []).append(both)
        quantized = sum(p.nbytes for p in model.parameters() if isinstance(p, requanto.QTensor))
    medians = {
        name: {key: round(median(run[key] for run in runs), 4) for key in runs[0]}
        for name, runs in sorted(results.items())
    }
    record = {"command": command(), "machine": machine(), "quantized_mb": round(quantized / 1e6, 1), "medians": medians}
    (RESULTS / "digests.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
