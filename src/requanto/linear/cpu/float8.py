"""float8 (e4m3) weights, prepacked for compiled kernels: blocks of 64 rows, ``[K, 64]`` in each.

One or two rows of x are multiplied with the codes directly (fused dequantize). For more rows, blocks of the weight are
dequantized to bfloat16 in oneDNN's layout (`requanto.linear.cpu.onednn_bf16`). Weights are packed only if compiled kernels
are available (``requanto.settings.compiled``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qtype
from requanto.linear.cpu import onednn_bf16
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.int8 import by_row
from requanto.linear.cpu.onednn_int8 import checked_index
from requanto.linear.cpu.scales import row_scale, with_current_scales
from requanto.linear.registry import Gemm
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

#: Up to so many rows of x are multiplied with the codes one by one; from there on, dequantizing first is faster.
MAX_ROW_KERNEL_ROWS = 2


class Float8Layout(Layout):
    """e4m3 ``[N, K]`` as bytes ``[ceil(N / 64), K, 64]``, with K padded with zeros to a multiple of 64."""

    name = "float8-64"
    rows_are_views = False

    def accepts(self, spec: WeightSpec) -> bool:
        return spec.qtype == qfloat8_e4m3fn and not spec.affine and spec.group_size is None

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        rows, length = spec.matrix_shape
        blocks, long, block = self.codes_shape_dtype(spec)[0]
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

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = (onednn_bf16.padded(size) for size in spec.matrix_shape)
        return torch.Size([rows // onednn_bf16.ROWS, length, onednn_bf16.ROWS]), torch.uint8


LAYOUT = register_layout(Float8Layout())


def fits(weight: QTensor) -> bool:
    """True for weights that the kernels support: e4m3, one scale per row, little padding, kernels enabled."""
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
    """Computes ``x @ w.T + bias`` for x in bfloat16, or with at most `MAX_ROW_KERNEL_ROWS` rows of any dtype."""
    gemm = make_plan(weight, x.shape[0], x.dtype)
    assert gemm is not None
    return gemm(x, weight, bias)


def _fill(codes: torch.Tensor, scale: torch.Tensor) -> Callable[[slice], onednn_bf16.Fill]:
    scales = scale.view(-1, onednn_bf16.ROWS)
    return lambda part: calls.fill_e4m3(codes[part], scales[part])


def run_transposed(x: torch.Tensor, weight: QTensor) -> torch.Tensor | None:
    """Computes ``x @ w``, ``[rows, K]``, in bfloat16: the GEMM of the backward. None if there is no kernel for it."""
    layout, parts = weight._storage.state
    if layout is not LAYOUT or x.dtype != torch.bfloat16 or not calls.ready(calls.FLOAT8):
        return None
    codes, (rows, columns) = parts["qdata"], weight.matrix_shape
    fill = _fill(codes, row_scale(weight, onednn_bf16.padded(rows)))
    out = onednn_bf16.matmul_transposed(x, weight, rows, codes.shape[1], fill)
    return out if codes.shape[1] == columns else out[:, :columns].contiguous()


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run` for one shape of x; None if the weight is not in this layout."""
    layout, parts = weight._storage.state
    if layout is not LAYOUT:
        return None
    codes, (out_features, in_features) = parts["qdata"], weight.matrix_shape
    length, padded_rows = codes.shape[1], onednn_bf16.padded(out_features)
    scale = row_scale(weight, padded_rows)
    if rows > MAX_ROW_KERNEL_ROWS:
        gemm = onednn_bf16.make_plan(out_features, length, rows, _fill(codes, scale))
        return with_current_scales(onednn_bf16.with_padded_columns(gemm, in_features, length), weight, padded_rows)
    row = calls.e4m3_row(codes, scale)

    def row_by_row(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row(one).view(-1)[:out_features] for one in x.reshape(rows, length)])

    gemm = by_row(row if rows == 1 else row_by_row, out_features)
    return with_current_scales(onednn_bf16.with_padded_columns(gemm, in_features, length), weight, padded_rows)
