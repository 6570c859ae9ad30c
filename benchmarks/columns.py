"""What a column scale costs: time of a GEMM with and without one, and of quantizing a weight.

    OMP_NUM_THREADS=1 python benchmarks/columns.py            # about two minutes

x in bfloat16, weights packed as at their first use. Each size has so many weights that no cache holds them, as the layers of
a model. On one thread; the times are those of the thread on its core, so other programs add only what they take of caches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import RESULTS, write
from torch import nn

from requanto import QTensor, prepare

#: N, K: layers of SmolLM2-135M and of models of one and seven billion parameters
SIZES = [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096)]
KINDS = ["int4", "int8", "nf4"]
#: bytes of weights in turn
BYTES = 64 * 2**20


def layers(kind: str, size: tuple[int, int], column_scale: bool | str) -> list[nn.Linear]:
    """As many layers with weights of that type as take `BYTES`."""
    torch.manual_seed(0)
    weight = (torch.randn(size) * (torch.randn(size[1]) / 4).exp()).bfloat16()
    count = max(2, BYTES // (weight.numel() * (2 if kind == "int8" else 1) // 2))
    found = []
    for _ in range(min(count, 64)):
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(QTensor.quantize(weight, kind, column_scale=column_scale), requires_grad=False)
        found.append(layer)
    prepare(nn.ModuleList(found))
    return found


def interleaved(candidates: dict[str, list[Callable[[], object]]], seconds: float) -> dict[str, float]:
    """Milliseconds of a call by candidate: of rounds that run each of them on all of its weights, the median."""
    for calls in candidates.values():
        for call in 3 * calls:  # packs, plans, and uses the plan
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.thread_time()
    while time.thread_time() - start < seconds * len(candidates) or len(next(iter(times.values()))) < 7:
        for name, calls in candidates.items():
            begin = time.thread_time()
            for call in calls:
                call()
            times[name].append((time.thread_time() - begin) / len(calls))
    return {name: round(1e3 * median(taken), 4) for name, taken in times.items()}


@torch.inference_mode()
def main() -> None:
    """Runs the benchmark and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate")
    parser.add_argument("--output", type=Path, default=RESULTS / "columns.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gemms, quantizing = [], []
    for kind in KINDS:
        for size in SIZES:
            both = {"without": layers(kind, size, False), "with": layers(kind, size, "root")}
            for rows in (1, 128):
                x = torch.randn(rows, size[1]).bfloat16()
                calls = {
                    name: [lambda x=x, w=layer.weight: F.linear(x, w) for layer in found]
                    for name, found in both.items()
                }
                times = interleaved(calls, args.seconds)
                gemms.append({"type": kind, "N": size[0], "K": size[1], "rows": rows, "ms": times})
                print(kind, size, rows, times, flush=True)
    for kind in ("int4", "int8"):
        weight = torch.randn(2048, 2048).bfloat16()
        calls = {
            str(asked): [lambda a=asked, k=kind, w=weight: QTensor.quantize(w, k, search="minmax", column_scale=a)]
            for asked in (False, "std", "root")
        }
        times = interleaved(calls, args.seconds)
        quantizing.append({"type": kind, "N": 2048, "K": 2048, "method": "minmax", "ms": times})
        print("quantize", kind, times, flush=True)
    write(args.output, {"gemm": gemms, "quantize": quantizing})


if __name__ == "__main__":
    main()
