"""``x @ w.T`` and ``x @ w`` in torch's GEMM: the weight is dequantized block by block into a scratch buffer.

For many rows, transposed weights (the backward), layouts and types that the library does not multiply, and where there is no
library.
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.activations import quantize_activations
from requanto.linear.cpu import gemm, library
from requanto.linear.cpu.dequantize import by_library, dequantize_rows, row_scaled
from requanto.linear.cpu.scratch_matmul import matmul, scaled_into
from requanto.linear.registry import Gemm
from requanto.runtime.buffers import rows_that_fit, scratch_buffer
from requanto.runtime.tracing import without_autocast
from requanto.tensor.qtensor import QTensor

#: Bytes of a dequantized weight that are multiplied at a time: by the library, and by torch's operators, whose passes each
#: read them again.
BLOCK_BYTES, OPERATORS_BLOCK_BYTES = 16 * 2**20, 4 * 2**20


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch multiplies x of ``dtype`` fastest: float16 nowhere, bfloat16 where the processor has it."""
    if dtype != torch.bfloat16:
        return torch.float32
    used = library.find()
    return dtype if used is None or used.has_bfloat16 else torch.float32


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias``, or ``x @ w + bias`` of a transposed weight, for x ``[rows, K]``."""
    dtype, steps = x.dtype, None
    if activation is not None:
        x, steps = quantize_activations(x, activation, input_scale)
    out = _coded(x, weight) if steps is not None else None
    if out is None:
        with without_autocast(x.device):  # it would convert the dequantized weight to its dtype
            out = matmul_dequantized(x.to(float_dtype(dtype)), weight)
    if steps is not None:
        out = out.float().mul_(steps)
    if bias is not None:
        out = out.add_(bias)
    return out.to(dtype)


def _coded(x: torch.Tensor, weight: QTensor) -> torch.Tensor | None:
    """``x @ w.T`` of codes (as float32), which are exact in float32; None where torch's GEMM is to run."""
    if weight.transposed or library.for_tensors(x) is None:
        return None
    return gemm.run_float(x, weight)


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run` for one shape of x: it only skips the selection. None with quantized activations."""
    if weight._spec.activation is not None:
        return None
    transposed, out_features = weight._spec.transposed, weight._spec.seen_shape[0]

    def planned(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            matrix = weight if transposed else weight.as_matrix()
            if x.dim() == 2:
                return run(x, matrix, bias)
            return run(x.reshape(rows, -1), matrix, bias).view(*x.shape[:-1], out_features)

    return planned


def matmul_dequantized(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``x @ w.T``, or ``x @ w`` of a transposed weight, in x's dtype."""
    stored_rows, length = weight.lead.numel(), weight.row_length
    fast = by_library(weight, x.dtype)
    at_once = BLOCK_BYTES if fast else OPERATORS_BLOCK_BYTES
    step = rows_that_fit(2 * length * x.dtype.itemsize, max(64, at_once // max(1, length * x.dtype.itemsize)))
    if weight.transposed:
        return _matmul_transposed(x, weight, step)
    # Scales multiply the weight; or the result, if there is one per row, x has few rows and torch's operators dequantize.
    scaled = fast or not row_scaled(weight) or (weight.qtype == qint8 and 2 * x.shape[0] >= length)
    if scaled and stored_rows <= step:
        return torch.mm(x, dequantize_rows(weight, 0, stored_rows, scratch_buffer((stored_rows, length), x.dtype)).t())
    scale = None if scaled else weight.scale.reshape(-1).to(torch.float32)
    out = x.new_empty(x.shape[0], stored_rows)
    for start in range(0, stored_rows, step):
        stop = min(start + step, stored_rows)
        block = scratch_buffer((stop - start, length), x.dtype)
        dequantize_rows(weight, start, stop, block, scaled=scaled)
        columns = out[:, start:stop]
        if scale is None:
            columns.copy_(matmul(x, block.t()))
        else:
            scaled_into(columns, matmul(x, block.t()), scale[start:stop])
    return out


def _matmul_transposed(x: torch.Tensor, weight: QTensor, step: int) -> torch.Tensor:
    # x @ w: partial sums over blocks of stored rows are accumulated in float32 and rounded once.
    stored_rows, length = weight.lead.numel(), weight.row_length
    total = None
    for start in range(0, stored_rows, step):
        stop = min(start + step, stored_rows)
        block = dequantize_rows(weight, start, stop, scratch_buffer((stop - start, length), x.dtype))
        part = (x[:, start:stop] @ block).float()
        total = part if total is None else total.add_(part)
    return (x.new_zeros(x.shape[0], length) if total is None else total).to(x.dtype)
