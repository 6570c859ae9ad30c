"""int8 activations times integer weights by the C library: x is quantized per token, or with a static scale, then multiplied
as integers, with exact int32 sums within a group.
"""

from __future__ import annotations

import ctypes

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import library
from requanto.linear.cpu.gemm import CODED, function_of, scratch_bytes
from requanto.linear.cpu.weights import DTYPES, Described, described
from requanto.linear.registry import Gemm
from requanto.runtime.buffers import scratch_memory
from requanto.tensor.qtensor import QTensor

#: Longest row without groups: 255 * 128 times this fits into int32.
MAX_K = 2**31 // (255 * 128)


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` of x ``[rows, K]``, quantized to int8, and a packed integer weight."""
    found = described(weight)
    assert found is not None
    return CodedCall(found, x.shape[0], x.dtype)(x, weight, bias, input_scale)


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run` for one shape of x, with one scale per token; None if the library cannot read the weight in strips."""
    found = described(weight)
    if found is None or found.has_copies or not found.strips:
        return None
    return CodedCall(found, rows, dtype)


class CodedCall:
    """``gemm(x, weight, bias)`` for one shape of x: quantizes x into a scratch buffer, then multiplies.

    Args:
        found: the weight; it is kept.
        rows, dtype: of x.
    """

    __slots__ = ("_codes", "_dtype", "_found", "_function", "_gemm", "_rows", "_steps", "_used", "_whole")

    def __init__(self, found: Described, rows: int, dtype: torch.dtype) -> None:
        used = library.find()
        assert used is not None
        matrix = found.matrices[0]
        self._found, self._used, self._rows, self._dtype = found, used, rows, DTYPES[dtype]
        self._function = function_of(used)
        gemm = used.interface.RqGemm()
        gemm.weight, gemm.rows = ctypes.pointer(matrix), rows
        gemm.x_stride, gemm.out_stride = matrix.length, matrix.rows
        gemm.out_dtype, gemm.arithmetic = DTYPES[dtype], CODED
        gemm.scratch_bytes = scratch_bytes(used, gemm, rows)
        self._gemm = gemm
        # The scratch buffer holds the library's own, then the steps, then the codes.
        self._steps = _aligned(gemm.scratch_bytes)
        self._codes = self._steps + _aligned(4 * rows)
        self._whole = self._codes + rows * matrix.length

    def __call__(
        self,
        x: torch.Tensor,
        weight: QTensor,
        bias: torch.Tensor | None,
        input_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        matrix, used = self._found.matrices[0], self._used
        x = x.resolve_neg().contiguous()
        out = x.new_empty(*x.shape[:-1], matrix.rows)
        memory = scratch_memory(self._whole, "gemm")
        scratch = memory.data_ptr()
        steps, codes = scratch + self._steps, scratch + self._codes
        fixed = None if input_scale is None else input_scale.detach().to(torch.float32).reshape(-1).contiguous()
        address = None if fixed is None else fixed.data_ptr()
        length = matrix.length
        used.check(
            used.functions.rq_rows_to_int8(x.data_ptr(), self._dtype, self._rows, length, length, address, codes, steps)
        )
        gemm = type(self._gemm).from_buffer_copy(self._gemm)  # several threads may run a plan
        gemm.steps = steps
        late = bias
        right = bias is not None and bias.shape == (matrix.rows,) and bias.is_contiguous()
        if bias is not None and right and library.reads_floats(bias):
            gemm.bias, gemm.bias_dtype, late = bias.data_ptr(), DTYPES[bias.dtype], None
        used.check(self._function(ctypes.addressof(gemm), codes, out.data_ptr(), scratch))
        return out if late is None else out.add_(late)


def _aligned(count: int) -> int:
    return -(-count // 64) * 64
