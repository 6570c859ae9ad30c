"""Rows of a weight as floats, by the C library: for convolutions, embeddings, GEMMs of many rows, and the backward.

Each value is computed in float32 and rounded once: ``code * scale - shift``, as `QTensor.dequantize` computes it.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from requanto.linear.cpu import library
from requanto.linear.cpu.weights import DTYPES, Described, described
from requanto.runtime.settings import settings
from requanto.runtime.tracing import is_fake, runs_eagerly
from requanto.tensor import qtensor
from requanto.tensor.qtensor import QTensor


def fill(weight: QTensor, start: int, stop: int, out: torch.Tensor) -> bool:
    """Dequantizes rows ``start .. stop`` of the stored matrix into ``out`` ``[stop - start, K]``.

    Returns:
        False if the library cannot, and nothing was written.
    """
    if out.dtype not in library.FLOATS or (out.shape[1] > 1 and out.stride(1) != 1):
        return False
    used = library.for_tensors(out)
    found = None if used is None else described(weight)
    if used is None or found is None:
        return False
    per_matrix = found.matrices[0].rows if found.matrices else 0  # fused experts may be none
    dtype, stride, address = DTYPES[out.dtype], out.stride(0) if len(out) > 1 else out.shape[1], out.data_ptr()
    begin = start
    while begin < stop:  # of a fused weight, expert by expert
        expert = begin // max(1, per_matrix)
        end = min(stop, (expert + 1) * per_matrix)
        first = begin - expert * per_matrix
        place = address + (begin - start) * stride * out.dtype.itemsize
        matrix = ctypes.byref(found.matrices[expert])
        used.check(_call(used, weight, found, matrix, first, first + end - begin, place, dtype, stride))
        begin = end
    return True


class Lookup:
    """``rows(index) -> [*index.shape, K]`` of one matrix in one dtype: an embedding's lookup, as a call of the library.

    Raises:
        IndexError: an index is out of range.
    """

    __slots__ = ("_dtype", "_found", "_function", "_how", "_length", "_used")

    def __init__(self, used: library.Library, found: Described, weight: QTensor, dtype: torch.dtype) -> None:
        self._used, self._found, self._dtype, self._length = used, found, dtype, found.matrices[0].length
        name, types = ("rq_dequantize", _STRIPS) if found.strips else ("rq_dequantize_plain", _PLAIN)
        address = ctypes.cast(getattr(used.functions, name), ctypes.c_void_p).value
        self._function = types(address)
        first = (ctypes.addressof(found.matrices[0]),)
        self._how = first if found.strips else (*first, int(_is_signed(weight)))

    def is_current(self) -> bool:
        """False if a tensor was changed in place of which it holds a copy."""
        return not self._found.has_copies or self._found.is_current()

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        if index.dtype != torch.int64 or not index.is_contiguous():
            index = index.to(torch.int64).contiguous()
        length = self._length
        out = torch.empty((*index.shape, length), dtype=self._dtype, device=_CPU)
        where = (index.data_ptr(), out.data_ptr(), DTYPES[self._dtype], length)
        code = self._function(*self._how, 0, index.numel(), *where)
        if code:
            if code == self._used.interface.E_INDEX:
                raise IndexError(
                    f"index out of range: found {int(index.min())}..{int(index.max())} for a table of "
                    f"{self._found.matrices[0].rows} rows"
                )
            self._used.check(code)
        return out


_CPU = torch.device("cpu")
_SIZES = (ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64)
_STRIPS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *_SIZES)
_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, *_SIZES)


def lookup(weight: QTensor, dtype: torch.dtype) -> Lookup | None:
    """The cached `Lookup` of a matrix; None if the library cannot read it. Outside of traces and transforms only."""
    derived = weight._storage.derived  # before the weight's description: see `described`
    key = ("lookup", dtype, settings.compiled)
    held: _Held | None = derived.get(key)
    if held is not None and held.lookup.is_current():
        return held.lookup
    used = library.find() if dtype in library.FLOATS else None
    found = None if used is None else described(weight)
    if used is None or found is None or len(found.matrices) != 1:
        return None
    made = Lookup(used, found, weight, dtype)
    if found.is_cachable:
        derived[key] = _Held(made)
    return made


class _Held(NamedTuple):
    """A lookup among what a storage derived from its parts; it has no bytes of its own."""

    lookup: Lookup
    nbytes: int = 0


def gather(weight: QTensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The rows ``index`` of a matrix as ``[*index.shape, K]``; None if the library cannot.

    Raises:
        IndexError: an index is out of range.
    """
    found = None if library.for_tensors(index) is None else lookup(weight, dtype)
    return None if found is None else found(index)


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
    if dtype not in library.FLOATS or not runs_eagerly() or is_fake(parts["qdata"]):
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
    out: int,
    dtype: int,
    stride: int,
) -> int:
    if not found.strips:
        return used.functions.rq_dequantize_plain(matrix, _is_signed(weight), start, stop, None, out, dtype, stride)  # type: ignore[no-any-return]
    return used.functions.rq_dequantize(matrix, start, stop, None, out, dtype, stride)  # type: ignore[no-any-return]


def _is_signed(weight: QTensor) -> bool:
    """Whether plain codes are signed bytes."""
    return weight._spec.qtype.dtype == torch.int8 and not weight._spec.qtype.is_packed
