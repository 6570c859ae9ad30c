"""The column scale of a weight in its GEMM: x is multiplied before, or the result of the transposed GEMM after.

The implementations only see the codes, so this costs one multiplication for each element of x.
"""

from __future__ import annotations

import torch

from requanto.runtime.tracing import runs_eagerly, without_ambient_state
from requanto.tensor.qtensor import QTensor


def column_for(weight: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight's column scale ``[..., K]`` in ``dtype``: itself, or a copy that the weight's storage keeps."""
    storage = weight._storage
    column = storage.parts["column"]
    if not runs_eagerly():
        return column.to(dtype)
    # Not kept: of an inference tensor, which has no version to tell that it changed (and which autograd cannot save); and on
    # an accelerator, where a captured graph would go on reading a copy that is dropped when the weight changes.
    if column.is_inference() or (column.dtype != dtype and not column.is_cpu):
        return column.to(dtype, copy=True)
    if column.dtype == dtype:
        return column
    key = ("column", dtype, column._version)
    copy = storage.derived.get(key)
    if copy is None:
        with without_ambient_state():
            copy = storage.derived[key] = column.to(dtype, copy=True)
    return copy


def scale_columns(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``x * column`` for x ``[..., K]``, in its dtype; x itself for a weight without a column scale."""
    return x * column_for(weight, x.dtype) if "column" in weight._storage.parts else x
