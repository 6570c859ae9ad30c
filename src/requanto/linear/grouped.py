"""`grouped_linear`: GEMMs of fused experts as one operator with a backward (`requanto.linear.custom_ops`)."""

from __future__ import annotations

import torch

from requanto.linear import custom_ops
from requanto.linear.columns import column_for
from requanto.runtime import onnx_nodes
from requanto.runtime.tracing import is_tracing
from requanto.scales.order import inverse
from requanto.scales.rotation import rotate
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor


def _columns_of_rows(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """The column scale of the expert of each row: ``[rows, K]`` in x's dtype."""
    column = column_for(weight, x.dtype)
    experts = lowrank.experts_of_rows(x.shape[0], offsets)
    return column[experts.clamp(max=column.shape[0] - 1)]  # rows after the last end give zeros


def _orders_of_rows(rows: int, weight: QTensor, offsets: torch.Tensor, *, undone: bool) -> torch.Tensor | None:
    """The order of columns of the expert of each row, or the order that undoes it: int64 ``[rows, K]``; None: none."""
    order = weight.order
    if order is None:
        return None
    order = inverse(order) if undone else order
    experts = lowrank.experts_of_rows(rows, offsets)
    return order[experts.clamp(max=order.shape[0] - 1)].long()


def grouped_linear(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiplies rows, sorted by expert, with the transposed weight of their expert.

    Args:
        x: ``[rows, K]``; rows ``offsets[e-1] .. offsets[e]`` belong to expert e.
        weight: quantized ``[E, N, K]``.
        offsets: integer ``[E]``, end row of each expert. Rows after the last end give zeros.

    Returns:
        ``[rows, N]``
    """
    block, transposed, column = weight.rotation, weight.transposed, None
    if "column" in weight._storage.parts:
        column = _columns_of_rows(x, weight, offsets)
    order = _orders_of_rows(x.shape[0], weight, offsets, undone=transposed)
    x_codes = x if order is None or transposed else x.gather(1, order)
    x_codes = x_codes if column is None or transposed else x_codes * column
    x_codes = x_codes if block is None or transposed else rotate(x_codes, block)
    if column is not None and transposed and x.dtype == torch.float16:
        x_codes = x.float()  # divided by a small column scale, a result may leave float16's range
    if is_tracing() and onnx_nodes.exporting():
        parts, words, shape = custom_ops.arguments(weight)
        attributes, out_shape = {"words": words, "shape": shape}, (x.shape[0], weight._spec.seen_shape[-2])
        out = onnx_nodes.node("GroupedLinear", [x_codes, offsets, *parts], attributes, x, out_shape)
    else:
        out = torch.ops.requanto.grouped_linear(x_codes, offsets, *custom_ops.arguments(weight), False)
    out = rotate(out, block) if block is not None and transposed else out
    out = (out * column).to(x.dtype) if column is not None and transposed else out
    out = out.gather(1, order) if order is not None and transposed else out
    return out if weight.up is None else out + lowrank.grouped_lowrank_matmul(x, weight, offsets)
