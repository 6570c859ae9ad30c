"""Rows of a quantized table."""

from __future__ import annotations

import torch

from requanto.dtypes.bit_packing import unpack
from requanto.linear.cpu.dequantize import codes_to_float
from requanto.linear.prepack import keep_plain
from requanto.runtime.tracing import has_numbers
from requanto.tensor.qtensor import QTensor, scaled_values


def embedding(indices: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """Rows of a quantized table: only the rows asked for are dequantized.

    Args:
        indices: integer, any shape.
        weight: quantized ``[entries, features]``.

    Returns:
        ``[*indices.shape, features]`` in the table's dtype.
    """
    if weight.transposed or weight.axis != 0:
        raise NotImplementedError("embedding needs a table quantized along its rows; call .dequantize() first")
    keep_plain(weight)
    with torch._C.DisableTorchFunctionSubclass():  # every look at a shape would be a call of its own
        flat = indices.reshape(-1)
        if _simple(weight):
            rows = _values(weight, flat)
        else:
            shared = weight.shared_along(0)
            inner = weight.inner_tensors().items()
            picked = {name: part if name in shared else _rows(part, flat) for name, part in inner}
            rows = weight.with_inner(picked, shape=(flat.numel(), *weight.shape[1:])).dequantize()
        return rows.view(*indices.shape, *weight.shape[1:])


def _simple(weight: QTensor) -> bool:
    """True where codes, scale and shift are all there is: no tensor has to be made of the rows first."""
    return (
        weight.rotation is None
        and weight.up is None
        and weight.scale_bits is None
        and not weight.qtype.is_codebook
        and weight.dim() == 2
        and weight.numel() > 0
    )


def _values(weight: QTensor, indices: torch.Tensor) -> torch.Tensor:
    """What `QTensor.dequantize` gives for these rows, without a tensor being made of them: the same numbers."""
    kind = weight.qtype
    codes, scale = _rows(weight.traced_codes(), indices), _rows(weight._scale, indices)
    if kind.is_floating_point and codes.is_cpu and has_numbers():
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        codes_to_float(codes, kind, values)
    else:
        values = (unpack(codes, kind.bits, weight.row_length) if kind.is_packed else codes).to(torch.float32)
    shift = None if weight._shift is None else _rows(weight._shift, indices)
    return scaled_values(values, kind, scale, shift, weight.row_length).to(weight.dtype)


def _rows(part: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    # As bytes, which torch copies row by row; an index that is out of range is an error, as in F.embedding.
    if part.dtype.itemsize > 1:
        return torch.index_select(part, 0, indices)
    return torch.index_select(part.view(torch.uint8), 0, indices).view(part.dtype)
