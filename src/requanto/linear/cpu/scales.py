"""A weight's row scales in the dtype and length that CPU kernels read."""

from __future__ import annotations

import torch

from requanto.linear.registry import Gemm
from requanto.runtime.tracing import without_ambient_state
from requanto.tensor.qtensor import QTensor


def row_scale(weight: QTensor, rows: int) -> torch.Tensor:
    """Scales of the rows, float32 ``[rows]``, padded with zeros.

    Returns the weight's scale itself if it has this dtype and length. Else returns a copy that is cached in the weight's
    storage and rewritten in each call, so that plans that reference it see in-place changes of the scale.
    """
    scale = weight.scale.reshape(-1)
    if scale.dtype == torch.float32 and scale.is_contiguous() and len(scale) == rows:
        return scale
    derived = weight._storage.derived
    copy = derived.get(("row scale", rows))
    if copy is None:
        with without_ambient_state():
            copy = derived["row scale", rows] = torch.zeros(rows, dtype=torch.float32, device=scale.device)
    with torch.no_grad():
        copy[: len(scale)].copy_(scale)
    return copy


def with_current_scales(gemm: Gemm, weight: QTensor, rows: int) -> Gemm:
    """Wraps a GEMM that reads `row_scale` with this number of rows: if it is a copy, it is rewritten before each call."""
    if ("row scale", rows) not in weight._storage.derived:
        return gemm

    def with_scales(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        row_scale(weight, rows)
        return gemm(x, weight, bias)

    return with_scales
