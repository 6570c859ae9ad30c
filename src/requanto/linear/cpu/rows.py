"""Rows of a weight as floats, by the C library: for convolutions, embeddings, GEMMs of many rows, and the backward.

Each value is computed in float32 and rounded once: ``code * scale - shift``, as `QTensor.dequantize` computes it.
"""

from __future__ import annotations

import ctypes

import torch

from requanto.linear.cpu import library
from requanto.linear.cpu.weights import DTYPES, Described, described
from requanto.runtime.tracing import is_fake, runs_eagerly
from requanto.tensor import qtensor
from requanto.tensor.qtensor import QTensor

#: dtypes that the library writes.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fill(weight: QTensor, start: int, stop: int, out: torch.Tensor) -> bool:
    """Dequantizes rows ``start .. stop`` of the stored matrix into ``out`` ``[stop - start, K]``.

    Returns:
        False if the library cannot, and nothing was written.
    """
    if out.dtype not in FLOATS or (out.shape[1] > 1 and out.stride(1) != 1):
        return False
    used = library.for_tensors(out)
    found = None if used is None else described(weight)
    if used is None or found is None:
        return False
    per_matrix = found.matrices[0].rows
    dtype, stride, address = DTYPES[out.dtype], out.stride(0) if len(out) > 1 else out.shape[1], out.data_ptr()
    begin = start
    while begin < stop:  # of a fused weight, expert by expert
        expert = begin // max(1, per_matrix)
        end = min(stop, (expert + 1) * per_matrix)
        first = begin - expert * per_matrix
        place = address + (begin - start) * stride * out.dtype.itemsize
        matrix = ctypes.byref(found.matrices[expert])
        code = _call(used, weight, found, matrix, first, first + end - begin, None, place, dtype, stride)
        if code == used.interface.E_MISSING:
            return False
        used.check(code)
        begin = end
    return True


def gather(weight: QTensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The rows ``index`` of a matrix as ``[len(index), K]``; None if the library cannot.

    Raises:
        IndexError: an index is out of range.
    """
    if dtype not in FLOATS or index.dim() != 1:
        return None
    index = index if index.dtype == torch.int64 else index.to(torch.int64)
    index = index.contiguous()
    used = library.for_tensors(index)
    found = None if used is None else described(weight)
    if used is None or found is None or len(found.matrices) != 1:
        return None
    matrix = found.matrices[0]
    out = torch.empty((len(index), matrix.length), dtype=dtype, device="cpu")
    code = _call(
        used,
        weight,
        found,
        ctypes.byref(matrix),
        0,
        len(index),
        index.data_ptr(),
        out.data_ptr(),
        DTYPES[dtype],
        matrix.length,
    )
    if code == used.interface.E_INDEX:
        raise IndexError(
            f"index out of range: found {int(index.min())}..{int(index.max())} for a table of {matrix.rows} rows"
        )
    if code == used.interface.E_MISSING:
        return None
    used.check(code)
    return out


def values(
    weight: QTensor, dtype: torch.dtype, *, as_stored: bool = False, low_rank: bool = True
) -> torch.Tensor | None:
    """The weight ``[*lead, K]`` in ``dtype``; None where the library cannot, or more than codes and scales belong to it.

    Args:
        as_stored: codes and scales alone.
        low_rank: with the low-rank term.
    """
    spec, parts = weight._spec, weight._storage.parts
    if not as_stored:
        besides = ("column", "order", "up") if low_rank else ("column", "order")
        if spec.rotation is not None or any(name in parts for name in besides):
            return None
    if dtype not in FLOATS or not runs_eagerly() or is_fake(parts["qdata"]):
        return None
    out = torch.empty(spec.matrix_shape, dtype=dtype, device="cpu")
    with torch._C.DisableTorchFunctionSubclass():
        return out.view(*spec.lead, spec.row_length) if fill(weight, 0, len(out), out) else None


qtensor.value_kernels["cpu"] = values


def _call(
    used: library.Library,
    weight: QTensor,
    found: Described,
    matrix: object,
    start: int,
    stop: int,
    index: int | None,
    out: int,
    dtype: int,
    stride: int,
) -> int:
    if not found.strips:
        signed = weight._spec.qtype.dtype == torch.int8 and not weight._spec.qtype.is_packed
        return used.functions.rq_dequantize_plain(matrix, signed, start, stop, index, out, dtype, stride)  # type: ignore[no-any-return]
    return used.functions.rq_dequantize(matrix, start, stop, index, out, dtype, stride)  # type: ignore[no-any-return]
