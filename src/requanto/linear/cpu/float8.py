"""float8 (e4m3) weights for the kernels of torch.compile: blocks of 64 rows, K outside.

One row of x is multiplied with the codes as they are read; more rows with bfloat16, in oneDNN's order, block by block
(`requanto.linear.cpu.onednn_bf16`). Packed only where those kernels can be had (``requanto.settings.compiled``).
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qtype
from requanto.linear.cpu import onednn_bf16
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.int8 import by_row
from requanto.linear.registry import Product
from requanto.tensor.layout import Packed, packed_as
from requanto.tensor.qtensor import QTensor

LAYOUT = "float8-blocked"
#: Rows of x that are multiplied with the codes one by one; beyond, dequantization is shared by enough rows.
FEW = 2


class Float8Codes(Packed):
    """e4m3 ``[N, K]`` as bytes ``[ceil(N / 64), K, 64]``, K filled up with zeros to a multiple of 64."""

    layout = LAYOUT

    def __init__(self, codes: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = codes.shape, codes.dtype
        rows, self.length = (onednn_bf16.padded(size) for size in codes.shape)
        codes = codes.view(torch.uint8)
        if (rows, self.length) != self.shape:
            codes = torch.nn.functional.pad(codes, (0, self.length - self.shape[1], 0, rows - self.shape[0]))
        self.blocks = codes.view(rows // onednn_bf16.ROWS, onednn_bf16.ROWS, -1).transpose(1, 2).contiguous()

    def plain(self) -> torch.Tensor:
        rows, length = self.shape
        codes = self.blocks.transpose(1, 2).reshape(-1, self.length)
        return codes[:rows, :length].contiguous().view(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


def fits(weight: QTensor) -> bool:
    """True for the weights that the kernels take: e4m3, a scale a row, whole blocks or nearly."""
    return (
        cache.wanted(calls.FLOAT8)
        and weight.qtype == qfloat8_e4m3fn
        and weight.group_size is None
        and not weight.affine
        and onednn_bf16.fits(*weight.matrix_shape)
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
    codes, length, (out_features, own) = packed.blocks, packed.length, packed.shape
    scale = packed.row_scale(weight, onednn_bf16.padded(out_features))
    if rows > FEW:
        scales = scale.view(-1, onednn_bf16.ROWS)
        product = onednn_bf16.bind(out_features, length, rows, lambda part: calls.fill_e4m3(codes[part], scales[part]))
        return onednn_bf16.widened(product, own, length)
    row = calls.e4m3_row(codes, scale)
    if rows == 1:
        return onednn_bf16.widened(by_row(row, out_features), own, length)

    def one_by_one(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row(one).view(-1)[:out_features] for one in x.reshape(rows, length)])

    return onednn_bf16.widened(by_row(one_by_one, out_features), own, length)
