"""Weights as floats on a GPU, by the kernel `wq_dequant`: for convolutions, embeddings, and whoever reads values.

The kernel computes in float32 and rounds once, so values are those of torch's operators up to the last bit (it subtracts
the shift without rounding the product first). What is not in the codes follows by torch's operators, on a part of the rows
at a time: rotation, column scale, order of columns and low-rank term.
"""

from __future__ import annotations

from typing import Any

import torch

from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu.layout import described
from requanto.runtime.devices import made_current
from requanto.runtime.tracing import is_fake, runs_eagerly, without_autocast
from requanto.scales.order import in_order, inverse
from requanto.scales.rotation import rotate
from requanto.tensor import qtensor
from requanto.tensor.parts import float_scale, float_shift, scales_of_rows
from requanto.tensor.qtensor import QTensor

#: Most bytes of a weight that are dequantized at a time: every layer of a 70B model fits, a large output head does not.
SCRATCH_BYTES = 512 * 2**20
#: Most bytes of float32 values that are rotated, scaled, reordered or added to at a time.
PART_BYTES = 128 * 2**20


def by_kernel(weight: QTensor) -> bool:
    """True where a kernel dequantizes the weight: on a GPU that runs one, outside of traces and torch.func's transforms."""
    codes = weight._storage.parts["qdata"]
    if codes.device.type not in rules.DEVICES or not runs_eagerly() or is_fake(codes) or not weight.numel():
        return False
    with made_current(codes.device.type, codes.device.index):
        return rules.decodes(codes.device.type, weight.qtype, weight.layout_name)


def stored_rows(weight: QTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Codes and scales of rows ``start .. stop`` of the stored matrix as ``[stop - start, K]``; for `by_kernel` weights."""
    codes, common = described(weight)
    scale, shift = scales_of_rows(weight._spec, weight._storage.parts, start, stop)
    rows = codes.reshape(weight._spec.matrix_shape[0], -1)[start:stop]
    return run(rows, scale, shift, weight.row_length, dtype, common)


def dequantized_rows(
    weight: QTensor, start: int, stop: int, dtype: torch.dtype, *, low_rank: bool = True
) -> torch.Tensor:
    """Rows ``start .. stop`` of the weight as stored, ``[stop - start, K]``, with all that belongs to it.

    Args:
        low_rank: with the low-rank term.
    """
    up = weight.up if low_rank else None
    if weight.rotation is None and weight.column is None and weight.order is None and up is None:
        return stored_rows(weight, start, stop, dtype)
    out = torch.empty((stop - start, weight.row_length), dtype=dtype, device=weight.device)
    per_matrix = weight.lead[-1]
    step = max(1, PART_BYTES // (4 * weight.row_length))
    begin = start
    while begin < stop:
        matrix = begin // per_matrix
        end = min(stop, begin + step, (matrix + 1) * per_matrix)
        values = stored_rows(weight, begin, end, torch.float32)
        own = None if up is None else up.reshape(weight.lead.numel(), -1)[begin:end]
        out[begin - start : end - start] = finished(values, weight, matrix, own)
        begin = end
    return out


def gathered_rows(weight: QTensor, index: torch.Tensor) -> torch.Tensor:
    """The rows ``index`` of a weight ``[N, K]`` as ``[len(index), K]`` in its dtype: an embedding's lookup.

    torch's ``index_select`` reads the rows of codes and scales, and checks the indices as it does for any tensor.
    """
    codes, common = described(weight)
    parts = weight._storage.parts
    found = {n: _picked(parts[n], index) for n in ("scale", "shift", "row_scale", "row_shift", "up") if n in parts}
    scale, shift = float_scale(weight._spec, found), float_shift(weight._spec, found)
    rows = _picked(codes.reshape(weight.shape[0], -1), index)
    plain = weight.rotation is None and weight.column is None and weight.order is None and weight.up is None
    values = run(rows, scale, shift, weight.row_length, weight.dtype if plain else torch.float32, common)
    if plain:
        return values
    with without_autocast(weight.device):
        return finished(values, weight, 0, found.get("up")).to(weight.dtype)


def values(
    weight: QTensor, dtype: torch.dtype, *, as_stored: bool = False, low_rank: bool = True
) -> torch.Tensor | None:
    """The weight ``[*lead, K]`` in ``dtype``; None where no kernel dequantizes it, or autograd has to see the low-rank term.

    Args:
        as_stored: codes and scales alone, in the rotated basis and the order that is stored.
    """
    if not by_kernel(weight):
        return None
    if (
        low_rank
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (weight.up, weight.down))
    ):
        return None
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        count = weight._spec.matrix_shape[0]
        if as_stored:
            found = stored_rows(weight, 0, count, dtype)
        else:
            found = dequantized_rows(weight, 0, count, dtype, low_rank=low_rank)
        return found.view(*weight.lead, weight.row_length)


def run(
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    length: int,
    dtype: torch.dtype,
    how: dict[str, Any],
) -> torch.Tensor:
    """The launch: codes and float scales of some rows as ``[rows, length]`` in ``dtype``, by way of float32 for float64."""
    from requanto_kernels import wq_dequant

    width = dtype if dtype in rules.FLOATS else torch.float32
    return wq_dequant(codes, scale, shift, k=length, dtype=width, **how).to(dtype)


def finished(values: torch.Tensor, weight: QTensor, matrix: int, up: torch.Tensor | None) -> torch.Tensor:
    """float32 rows ``[rows, K]`` of the stored matrix number ``matrix`` as rows of the weight; ``up`` are their own rows."""
    length = weight.row_length
    values = values if weight.rotation is None else rotate(values, weight.rotation)
    values = values if weight.column is None else values * weight.column.reshape(-1, length)[matrix].float()
    values = values if weight.order is None else in_order(values, inverse(weight.order.reshape(-1, length)[matrix]))
    if up is None or weight.down is None:
        return values
    return values.addmm_(up.float(), weight.down.reshape(-1, weight.rank, length)[matrix].float())


def _picked(part: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    if part.dtype.itemsize > 1:
        return torch.index_select(part, 0, index)
    return torch.index_select(part.view(torch.uint8), 0, index).view(part.dtype)


qtensor.value_kernels |= dict.fromkeys(rules.DEVICES, values)
