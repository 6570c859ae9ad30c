"""float8 (e4m3) weights for the kernels of torch.compile: blocks of 64 rows, K outside.

One row of x is multiplied with the codes as they are read; more rows with bfloat16, in oneDNN's order, block by block
(`requanto.linear.blocked`). Packed only where those kernels can be had (``requanto.settings.compiled``).
"""

from __future__ import annotations

import torch

from requanto.layout import Packed, packed_as
from requanto.linear import ahead, blocked, compiled
from requanto.linear.int8 import by_row
from requanto.linear.onednn import row_scale
from requanto.linear.table import Product
from requanto.qtensor import QTensor
from requanto.qtypes import qfloat8_e4m3fn, qtype

LAYOUT = "float8-blocked"
#: Rows of x that are multiplied with the codes one by one; beyond, dequantization is shared by enough rows.
FEW = 2


class Float8Codes(Packed):
    """e4m3 ``[N, K]`` as bytes ``[N / 64, K, 64]``."""

    layout = LAYOUT

    def __init__(self, codes: torch.Tensor) -> None:
        super().__init__()
        rows, self.length = codes.shape
        self.dtype = codes.dtype
        self.blocks = codes.view(torch.uint8).view(rows // blocked.ROWS, blocked.ROWS, -1).transpose(1, 2).contiguous()

    def plain(self) -> torch.Tensor:
        return self.blocks.transpose(1, 2).reshape(-1, self.length).view(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


def fits(weight: QTensor) -> bool:
    """True for the weights that the kernels take: e4m3, a scale a row, whole blocks."""
    return (
        ahead.wanted(compiled.FLOAT8)
        and weight.qtype == qfloat8_e4m3fn
        and weight.group_size is None
        and not weight.affine
        and blocked.fits(weight.shape[0], weight.row_length)
    )


def pack(weight: QTensor) -> Float8Codes:
    """The packed form of a plain weight that `fits`, once the kernels are `compiled.ready`."""
    return Float8Codes(weight.qdata)


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w.T + bias``; x in bfloat16, or few rows of any dtype."""
    product = _product(packed_as(weight, Float8Codes, pack), weight, x.shape[0])
    return product(x, weight, bias)


def bind(weight: QTensor, rows: int, dtype: torch.dtype) -> Product | None:
    """`run` for one shape of x."""
    packed = weight.packed
    return _product(packed, weight, rows) if isinstance(packed, Float8Codes) else None


def _product(packed: Float8Codes, weight: QTensor, rows: int) -> Product:
    codes, scale = packed.blocks, row_scale(weight)
    if rows > FEW:
        scales = scale.view(-1, blocked.ROWS)
        return blocked.bind(*weight.shape, rows, lambda part: compiled.fill_e4m3(codes[part], scales[part]))
    row = compiled.e4m3_row(codes, scale)
    if rows == 1:
        return by_row(row)
    return by_row(lambda x: torch.stack([row(one) for one in x.reshape(rows, -1)]))
