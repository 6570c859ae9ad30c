"""The column scale and the order of columns of a weight in its GEMM: x is multiplied and reordered before, or the result of
the transposed GEMM after.

The implementations only see the codes, so this costs one multiplication or one copy for each element of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from requanto.runtime.tracing import runs_eagerly, without_ambient_state
from requanto.scales.order import in_order, inverse
from requanto.tensor.qtensor import QTensor


class _Copy(NamedTuple):
    """A column scale in another dtype, the original and its version. A weight keeps one, the last that was asked for."""

    values: torch.Tensor
    original: torch.Tensor
    version: int

    def is_of(self, column: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether it has that column scale's values in ``dtype``. Another thread may have put it here before a change."""
        return self.values.dtype == dtype and self.original is column and self.version == column._version

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


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
    kept: _Copy | None = storage.derived.get("column")
    if kept is None or not kept.is_of(column, dtype):
        version = column._version
        with without_ambient_state():
            kept = _Copy(column.to(dtype, copy=True), column, version)
        storage.derived["column"] = kept
    return kept.values


def scale_columns(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``x * column`` for x ``[..., K]``, in its dtype; x itself for a weight without a column scale."""
    return x * column_for(weight, x.dtype) if "column" in weight._storage.parts else x


def as_stored(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """x ``[..., K]`` in the order of the stored columns; x itself for a weight without an order of its own."""
    order = weight._storage.parts.get("order")
    return x if order is None else in_order(x, order)


def as_shown(out: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``[..., K]`` in the order of stored columns, moved to the weight's own order; the reverse of `as_stored`."""
    order = weight._storage.parts.get("order")
    return out if order is None else in_order(out, inverse(order))
