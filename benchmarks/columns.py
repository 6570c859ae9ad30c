"""What a column scale costs: time of a GEMM with and without one, and of quantizing a weight.

    OMP_NUM_THREADS=1 python benchmarks/columns.py            # about two minutes

x in bfloat16, weights packed as at their first use. Each size has so many weights that no cache holds them, as the layers of
a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, interleaved, write
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


@torch.inference_mode()
def main() -> None:
    """Runs the benchmark and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate")
    parser.add_argument("--output", type=Path, default=RESULTS / "columns.json")
    args = parser.parse_args()
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
                times = interleaved(calls, "without", args.seconds)
                row = {"type": kind, "N": size[0], "K": size[1], "rows": rows, **times}
                gemms.append(row)
                print(
                    kind, size, rows, f"{times['without']['ms']:.4f} ms, ratio {times['with']['ratio']:.3f}", flush=True
                )
    for kind in ("int4", "int8"):
        weight = torch.randn(2048, 2048).bfloat16()
        calls = {
            str(asked): [lambda a=asked, k=kind, w=weight: QTensor.quantize(w, k, search="minmax", column_scale=a)]
            for asked in (False, "std", "root")
        }
        times = interleaved(calls, "False", args.seconds)
        quantizing.append({"type": kind, "N": 2048, "K": 2048, "method": "minmax", **times})
        print("quantize", kind, {name: round(found["ms"], 1) for name, found in times.items()}, flush=True)
    write(args.output, {"gemm": gemms, "quantize": quantizing})


if __name__ == "__main__":
    main()
