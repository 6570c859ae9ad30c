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
from requanto.linear.cpu.onednn_int8 import checked_index
from requanto.linear.cpu.scales import refreshed, row_scale
from requanto.linear.registry import Gemm
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

#: Rows of x that are multiplied with the codes one by one; beyond, dequantization is shared by enough rows.
FEW = 2


class Float8Layout(Layout):
    """e4m3 ``[N, K]`` as bytes ``[ceil(N / 64), K, 64]``, K filled up with zeros to a multiple of 64."""

    name = "float8-64"
    rows_are_views = False

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        rows, length = spec.matrix_shape
        blocks, long, block = self.codes_form(spec)[0]
        codes = parts["qdata"].view(torch.uint8).reshape(rows, length)
        if (blocks * block, long) != (rows, length):
            codes = torch.nn.functional.pad(codes, (0, long - length, 0, blocks * block - rows))
        return {"qdata": codes.view(blocks, block, long).transpose(1, 2).contiguous()}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        return self.codes(spec, parts, 0, spec.matrix_shape[0]).view(spec.codes_shape)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        first = start // onednn_bf16.ROWS
        blocks = parts["qdata"][first : -(-stop // onednn_bf16.ROWS)]
        codes = blocks.transpose(1, 2).reshape(-1, blocks.shape[1])
        begin = first * onednn_bf16.ROWS
        return codes[start - begin : stop - begin, : spec.row_length].contiguous().view(spec.qtype.dtype)

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        index = checked_index(index, spec.matrix_shape[0])
        found = parts["qdata"][index // onednn_bf16.ROWS, :, index % onednn_bf16.ROWS]
        return found[:, : spec.row_length].contiguous().view(spec.qtype.dtype)

    def codes_form(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = (onednn_bf16.padded(size) for size in spec.matrix_shape)
        return torch.Size([rows // onednn_bf16.ROWS, length, onednn_bf16.ROWS]), torch.uint8


LAYOUT = register_layout(Float8Layout())


def fits(weight: QTensor) -> bool:
    """True for the weights that the kernels take: e4m3, a scale a row, whole blocks or nearly."""
    return (
        cache.wanted(calls.FLOAT8)
        and weight.qtype == qfloat8_e4m3fn
        and weight.group_size is None
        and not weight.affine
        and onednn_bf16.fits(*weight.matrix_shape)
    )


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w.T + bias``; x in bfloat16, or few rows of any dtype."""
    gemm = bind(weight, x.shape[0], x.dtype)
    assert gemm is not None
    return gemm(x, weight, bias)


def bind(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """`run` for one shape of x."""
    layout, parts = weight._storage.state
    if layout is not LAYOUT:
        return None
    codes, (out_features, own) = parts["qdata"], weight.matrix_shape
    length, filled = codes.shape[1], onednn_bf16.padded(out_features)
    scale = row_scale(weight, filled)
    if rows > FEW:
        scales = scale.view(-1, onednn_bf16.ROWS)
        gemm = onednn_bf16.bind(out_features, length, rows, lambda part: calls.fill_e4m3(codes[part], scales[part]))
        return refreshed(onednn_bf16.widened(gemm, own, length), weight, filled)
    row = calls.e4m3_row(codes, scale)

    def one_by_one(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row(one).view(-1)[:out_features] for one in x.reshape(rows, length)])

    gemm = by_row(row if rows == 1 else one_by_one, out_features)
    return refreshed(onednn_bf16.widened(gemm, own, length), weight, filled)
