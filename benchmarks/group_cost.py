"""What smaller groups, scales in few bits, whole zero points and column scales cost in a GEMM on a CPU, beside int4 g64.

    OMP_NUM_THREADS=1 python benchmarks/group_cost.py        # two minutes; writes results/group_cost.json

bfloat16, one row of x (decoding) and 64 rows (a prompt). The forms take turns; ``ratio`` is the median over the rounds of
the time of groups of 64 / own time: above 1 is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from common import RESULTS, interleaved, write
from torch import nn

from requanto import QTensor
from requanto.linear import linear

FORMS: dict[str, dict[str, Any]] = {
    "g64": {},
    "g64, columns": {"column_scale": True},
    "g64, columns, whole zero points": {"column_scale": True, "zero_point": "integer"},
    "g64, columns, scale_bits=8": {"column_scale": True, "scale_bits": 8},
    "g32, columns": {"group_size": 32, "column_scale": True},
    "g32, columns, scale_bits=8": {"group_size": 32, "column_scale": True, "scale_bits": 8},
    "g32, columns, scale_bits=4": {"group_size": 32, "column_scale": True, "scale_bits": 4},
    "g16, columns, scale_bits=4": {"group_size": 16, "column_scale": True, "scale_bits": 4},
}
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096))
COPIES = 3


def main() -> None:
    """Measures all forms and writes the results."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        weight = torch.randn(*shape, generator=generator).bfloat16()
        for count in (1, 64):
            x = torch.randn(count, shape[1], generator=generator).bfloat16()
            calls: dict[str, list[Any]] = {}
            for name, how in FORMS.items():
                copies = [
                    nn.Parameter(QTensor.quantize(weight, "int4", **how), requires_grad=False) for _ in range(COPIES)
                ]
                calls[name] = [(lambda x=x, copy=copy: linear(x, copy)) for copy in copies]
            found = interleaved(calls, "g64", seconds=1.0)
            rows.append({"shape": list(shape), "rows": count, "forms": found})
            print(shape, count, {name: round(one["ratio"], 2) for name, one in found.items()}, flush=True)
    write(RESULTS / "group_cost.json", {"results": rows})


if __name__ == "__main__":
    main()
