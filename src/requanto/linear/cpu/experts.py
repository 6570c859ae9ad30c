"""GEMMs of fused experts: one call of the C library for each expert that has rows."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from requanto.linear import reference
from requanto.linear.cpu import library
from requanto.linear.cpu.conditions import gemm_rows
from requanto.linear.cpu.dequantize import dequantize_rows
from requanto.linear.cpu.gemm import arithmetic_of, function_of, is_narrowed, scratch_bytes
from requanto.linear.cpu.multiply import float_dtype
from requanto.linear.cpu.weights import DTYPES, Described, described
from requanto.runtime.buffers import scratch_buffer, scratch_memory
from requanto.runtime.tracing import without_autocast
from requanto.tensor.qtensor import QTensor


def run_grouped(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows of x ``[rows, K]``, sorted by expert, times the transposed weight of their expert: ``[rows, N]``.

    Args:
        weight: ``[E, N, K]``, in strips or plain.
        offsets: ``[E]``, end row of each expert. Rows after the last end give zeros.
    """
    used = library.for_tensors(x)
    found = None if used is None else described(weight)
    if used is None or found is None or x.dtype not in library.FLOATS:
        return reference.run_grouped(x, weight, offsets)
    x = x.resolve_neg().contiguous()
    ends = [min(max(0, end), len(x)) for end in offsets.tolist()]
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    multiplied = found.strips and not weight.transposed
    calls: dict[int, Any] = {}
    for expert, end in enumerate(ends):
        count = end - start
        if count <= 0:
            continue
        how = arithmetic_of(weight, count, x.dtype)
        if multiplied and count <= gemm_rows(how, x.dtype):
            own = x[start:end].to(torch.bfloat16) if is_narrowed(weight.qtype, count, x.dtype, how) else x[start:end]
            if count not in calls:
                calls[count] = _gemm(used, found, how, count, own.dtype, x.dtype)
            gemm = calls[count]
            gemm.weight = ctypes.pointer(found.matrices[expert])
            scratch = scratch_memory(gemm.scratch_bytes, "gemm")
            into = out.data_ptr() + start * out.shape[1] * out.itemsize
            used.check(function_of(used)(ctypes.addressof(gemm), own.data_ptr(), into, scratch.data_ptr()))
        else:
            _dequantized(x[start:end], weight, expert, out[start:end])
        start = end
    out[start:].zero_()
    return out


def _gemm(
    used: library.Library, found: Described, how: int, count: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> Any:
    matrix = found.matrices[0]
    gemm = used.interface.RqGemm()
    gemm.weight, gemm.rows = ctypes.pointer(matrix), count
    gemm.x_stride, gemm.out_stride = matrix.length, matrix.rows
    gemm.x_dtype, gemm.out_dtype = DTYPES[dtype], DTYPES[out_dtype]
    gemm.arithmetic = how
    gemm.scratch_bytes = scratch_bytes(used, gemm, count)
    return gemm


def _dequantized(x: torch.Tensor, weight: QTensor, expert: int, out: torch.Tensor) -> None:
    """One expert's rows times its weight, dequantized into a scratch buffer."""
    stored_rows, length = weight._spec.shape[1:]
    dtype = float_dtype(x.dtype)
    first = expert * stored_rows
    values = dequantize_rows(weight, first, first + stored_rows, scratch_buffer((stored_rows, length), dtype))
    with without_autocast(x.device):
        out.copy_(torch.mm(x.to(dtype), values if weight.transposed else values.t()))
