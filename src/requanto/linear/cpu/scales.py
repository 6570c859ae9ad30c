"""A weight's scales as CPU kernels read them."""

from __future__ import annotations

import torch

from requanto.linear.registry import Gemm
from requanto.runtime.tracing import neutral
from requanto.tensor.qtensor import QTensor


def row_scale(weight: QTensor, rows: int) -> torch.Tensor:
    """The scales of the rows: float32 ``[rows]``, zeros behind the weight's own.

    The weight's own memory where it is that; else a copy that the storage keeps, written anew at each call, so that whoever
    holds it sees a scale that was changed in place.
    """
    scale = weight.scale.reshape(-1)
    if scale.dtype == torch.float32 and scale.is_contiguous() and len(scale) == rows:
        return scale
    derived = weight._storage.derived
    held = derived.get(("row scale", rows))
    if held is None:
        with neutral():
            held = derived["row scale", rows] = torch.zeros(rows, dtype=torch.float32, device=scale.device)
    with torch.no_grad():
        held[: len(scale)].copy_(scale)
    return held


def refreshed(gemm: Gemm, weight: QTensor, rows: int) -> Gemm:
    """A GEMM that reads `row_scale` of so many rows: where that is a copy, it is written anew before each call."""
    if ("row scale", rows) not in weight._storage.derived:
        return gemm

    def with_scales(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        row_scale(weight, rows)
        return gemm(x, weight, bias)

    return with_scales
