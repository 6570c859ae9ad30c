"""GEMMs of the C library: cached plans, each one call with the addresses of x, of the result and of a scratch buffer.

A plan holds an `RqGemm` that is filled in once for a weight and a shape of x: a small model makes hundreds of these calls
for a token, so all else happens when the plan is made.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import library
from requanto.linear.cpu.weights import DTYPES, MOST_TABLE_ERROR, Described, described, table_of
from requanto.linear.quick import Quick
from requanto.linear.registry import Gemm, run_chosen
from requanto.runtime.buffers import scratch_memory
from requanto.runtime.settings import settings
from requanto.runtime.tracing import without_ambient_state
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

#: `RqArithmetic`
BLOCKS8, BLOCKS16, FLOAT, CODED, PARTS = range(5)
#: Most bits of codes that are multiplied with x rounded to 8 bits; above, x has 16. With 6 bits, rounding x to 8 costs up to
#: 0.7 of what rounding the weights does (tests/linear/test_cpu_rounding.py; SmolLM2's activations), with 5 up to 0.34.
MOST_BITS_WITH_8 = 5
#: Most rows of x that the library multiplies by the column scale, without AMX; of more rows torch's operator takes little of
#: the time. With it, they are multiplied as long as they take at most this part of the workspace.
MOST_SCALED_ROWS = 16
SCALED_PART = 4
#: Columns of x that share a scale, where groups of the weight are multiples of it.
BLOCK = 32
#: Most rows for which two products of int8 are faster than one of bfloat16, on processors that have it.
MOST_ROWS_WITH_16 = 64
#: With AMX: most rows for which int8 products are faster than decoding the weight to bfloat16, which takes as long for any
#: number of rows; of weights that get 8 bits of x, and 16.
MOST_ROWS_BESIDE_TILES = {BLOCKS8: 24, BLOCKS16: 16}
#: The same for x in float32 and float16 as two numbers of bfloat16, of weights in 6 to 8 bits with one scale a row.
MOST_ROWS_BESIDE_PARTS = 32
#: Most rows for which float32 takes no longer than bfloat16, since reading the weight does.
MOST_ROWS_EXACT = 4
#: Largest result (bytes) that is allocated like a tensor that exists, which takes half the time.
_SMALL = 16 * 1024
#: ``rq_gemm`` with addresses as arguments: a third faster than with ctypes' pointers.
_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


def arithmetic(
    kind: qtype, group: int | None, rows: int, dtype: torch.dtype, table_error: float = 0.0, affine: bool = False
) -> int:
    """How a weight of that type is multiplied with float x.

    Args:
        group: columns of a scale; None: one scale a row.
        rows, dtype: of x.
        table_error: see `Table.error`; 0 for types that are no codebooks.
        affine: whether the weight has a shift.
    """
    if settings.cpu_arithmetic == "float" or kind.is_floating_point or table_error > MOST_TABLE_ERROR:
        return FLOAT
    if group is not None and group % BLOCK:
        return FLOAT  # sums of 8 or 16 products are widened and scaled as often as floats are multiplied
    how = BLOCKS8 if kind.bits <= MOST_BITS_WITH_8 else BLOCKS16
    if how == BLOCKS16 and dtype != torch.bfloat16:
        exact = group is None and not affine and not kind.is_codebook  # in bfloat16: codes, whose sums are scaled
        return PARTS if exact and rows > MOST_ROWS_BESIDE_PARTS and _has_tiles() else how
    return FLOAT if rows > _most_integer_rows(how) else how


def _most_integer_rows(how: int) -> int:
    """Most rows that BLOCKS8 or BLOCKS16 take, where x may be multiplied as bfloat16 too."""
    if _has_tiles():
        return MOST_ROWS_BESIDE_TILES[how]
    return MOST_ROWS_WITH_16 if how == BLOCKS16 and _has_bfloat16() else 2**62


def _has_tiles() -> bool:
    used = library.find()
    return used is not None and used.has_tiles


def _has_bfloat16() -> bool:
    used = library.find()
    return used is not None and used.has_bfloat16


def is_narrowed(kind: qtype, rows: int, dtype: torch.dtype, how: int) -> bool:
    """Whether x in float32 or float16 is rounded to bfloat16: many rows of coarse weights that are multiplied as floats.

    Processors that multiply bfloat16 do so twice as fast as float32. It rounds x to 8 bits in place of an element's own
    24 or 11; weights of 8-bit floats have 4.
    """
    if how != FLOAT or dtype == torch.bfloat16 or rows <= MOST_ROWS_EXACT or settings.cpu_arithmetic == "float":
        return False
    return (kind.is_floating_point or kind.bits <= MOST_BITS_WITH_8) and _has_bfloat16()


def arithmetic_of(weight: QTensor, rows: int, dtype: torch.dtype) -> int:
    """`arithmetic` of a weight, with its own codebook."""
    spec = weight._spec
    group = None if spec.groups == 1 else spec.group_size
    error = table_of(weight).error if spec.qtype.is_codebook else 0.0
    return arithmetic(spec.qtype, group, rows, dtype, error, spec.affine)


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` of x ``[rows, K]`` and a packed weight; x is rounded as `arithmetic` says."""
    gemm = make_plan(weight, x.shape[0], x.dtype)
    assert gemm is not None
    return gemm(x, weight, bias)


def run_float(x: torch.Tensor, weight: QTensor) -> torch.Tensor | None:
    """Computes ``x @ w.T`` without rounding x; None if the weight is not packed."""
    found = described(weight)
    if found is None or not found.strips:
        return None
    return Call(found, 0, FLOAT, x.shape[0], x.dtype)(x, weight, None)


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run` for one shape of x; None if the library cannot read the weight in strips."""
    found = described(weight)
    if found is None or not found.strips:
        return None
    how = arithmetic_of(weight, rows, dtype)
    narrow = is_narrowed(weight._spec.qtype, rows, dtype, how)
    call = Call(found, 0, how, rows, dtype, narrow=narrow)
    return call if not found.has_copies else _renewed(call, found, rows, dtype)


def _renewed(call: Call, found: Described, rows: int, dtype: torch.dtype) -> Gemm:
    """The plan of a weight of which copies were made; another one once their originals have changed in place."""

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        current = call if found.is_current() else make_plan(weight, rows, dtype)
        if current is None:  # another thread has unpacked the weight
            return run_chosen(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
        return current(x, weight, bias)

    return gemm


class Call:
    """``gemm(x, weight, bias)`` for one shape of x and one matrix.

    Args:
        found: the weight; it is kept.
        expert: number of the matrix.
        how: BLOCKS8, BLOCKS16, FLOAT or PARTS.
        rows, dtype: of x.
        column: see `with_column`.
        narrow: see `is_narrowed`.
    """

    __slots__ = (
        "_bias_shape",
        "_biased",
        "_column",
        "_function",
        "_like",
        "_made_of",
        "_narrow",
        "_plain",
        "_shape",
        "_threads",
        "_used",
        "out_features",
    )

    def __init__(
        self,
        found: Described,
        expert: int,
        how: int,
        rows: int,
        dtype: torch.dtype,
        column: torch.Tensor | None = None,
        narrow: bool = False,
    ) -> None:
        used = library.find()
        assert used is not None
        matrix = found.matrices[expert]
        self._made_of, self._column, self._used = (found, expert, how, rows, dtype), column, used
        self._function = function_of(used)
        self.out_features, self._bias_shape = matrix.rows, (matrix.rows,)
        gemm = used.interface.RqGemm()
        gemm.weight, gemm.rows = ctypes.pointer(matrix), rows
        gemm.x_stride, gemm.out_stride = matrix.length, matrix.rows
        gemm.x_dtype = DTYPES[torch.bfloat16 if narrow else dtype]
        gemm.out_dtype = DTYPES[dtype]
        gemm.arithmetic = how
        self._narrow = narrow
        if column is not None:
            gemm.column, gemm.column_dtype = column.data_ptr(), DTYPES[column.dtype]
        gemm.scratch_bytes = scratch_bytes(used, gemm, rows)
        self._plain = gemm
        # Threads for which the scratch buffer has room; 0: all use the same memory.
        self._threads = torch.get_num_threads() if how in (FLOAT, PARTS) else 0
        # (address and dtype of the bias, the struct with it); replaced as a whole, since several threads may run a plan
        self._biased: tuple[int, torch.dtype | None, Any] = (0, None, None)
        self._shape: torch.Size | None = None
        self._like: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, weight: QTensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if not x.is_contiguous() or x.is_neg():
            x = x.resolve_neg().contiguous()
        if x.shape == self._shape:
            out = torch.empty_like(self._like)
        else:
            out = self._allocated(x)
        late = None
        if self._threads and torch.get_num_threads() > self._threads:
            self._make_room()
        if bias is None:
            gemm = self._plain
        else:
            start, kind, gemm = self._biased
            # A negated view has the address of the bias itself.
            if start != bias.data_ptr() or kind is not bias.dtype or bias.is_neg():
                gemm = self._with_bias(bias)
            if gemm is None or bias.shape != self._bias_shape or not bias.is_contiguous():
                gemm, late = self._plain, bias
        if self._narrow:
            x = x.to(torch.bfloat16)
        scratch = scratch_memory(gemm.scratch_bytes, "gemm")
        code = self._function(ctypes.addressof(gemm), x.data_ptr(), out.data_ptr(), scratch.data_ptr())
        if code:
            self._used.check(code)
        return out if late is None else out.add_(late)

    def quick(self, shape: torch.Size, dtype: torch.dtype, version: int, spec: WeightSpec) -> Quick | None:
        """This plan for x of that shape and dtype as `quick_gemm` calls it; None if its calls need more steps."""
        if self._narrow or self._threads:
            return None
        shape_of_out = (*shape[:-1], self.out_features)
        if math.prod(shape_of_out) * dtype.itemsize > _SMALL:
            return None
        where, size = ctypes.addressof(self._plain), self._plain.scratch_bytes
        like, check = _template(shape_of_out, dtype), self._used.check
        return Quick(shape, dtype, version, spec, like, self._function, where, size, check, (self, self._plain))

    def with_column(self, column: torch.Tensor) -> Call | None:
        """The same GEMM of x times a column scale ``[K]``, rounded to x's dtype; None if the library cannot multiply them.

        It reads the column scale as it is in each call, so a change in place takes effect.
        """
        found, expert, how, rows, dtype = self._made_of
        length = found.matrices[expert].length
        right = column.dim() == 1 and column.numel() == length and column.is_contiguous()
        if self._narrow:  # rounded to bfloat16 once, after the multiplication
            return None
        few = rows <= MOST_SCALED_ROWS
        if self._used.has_tiles and how in (FLOAT, PARTS):
            few = few or rows * length * dtype.itemsize <= settings.workspace_bytes // SCALED_PART
        if not right or not few or not library.reads_floats(column):
            return None
        return Call(*self._made_of, column)

    def _allocated(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        if out.nbytes <= _SMALL and type(out) is torch.Tensor:
            self._like, self._shape = _template(tuple(out.shape), out.dtype), x.shape
        return out

    def _make_room(self) -> None:
        """Enlarges the scratch buffer of later calls, after `torch.set_num_threads`; other threads may run the plan."""
        threads, gemm = torch.get_num_threads(), type(self._plain).from_buffer_copy(self._plain)
        gemm.scratch_bytes = scratch_bytes(self._used, gemm, gemm.rows)
        self._plain, self._biased, self._threads = gemm, (0, None, None), threads

    def _with_bias(self, bias: torch.Tensor) -> Any:
        """The struct with that bias; None if the library cannot add it."""
        if not library.reads_floats(bias):
            return None
        gemm = type(self._plain).from_buffer_copy(self._plain)
        gemm.bias, gemm.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
        self._biased = (bias.data_ptr(), bias.dtype, gemm)
        return gemm


def scratch_bytes(used: library.Library, gemm: Any, rows: int) -> int:
    """The bytes of the scratch buffer for a GEMM: for all rows at once, or what half of the workspace holds."""
    wanted = used.functions.rq_gemm_scratch(ctypes.byref(gemm), rows)
    least = used.functions.rq_gemm_least_scratch(ctypes.byref(gemm))
    used.check(wanted)
    used.check(least)
    return max(least, min(wanted, settings.workspace_bytes // 2))


@functools.lru_cache(maxsize=4)
def function_of(used: library.Library) -> Callable[..., int]:
    address = ctypes.cast(used.functions.rq_gemm, ctypes.c_void_p).value
    assert address is not None
    return _PROTOTYPE(address)


@functools.lru_cache(maxsize=256)
def _template(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with without_ambient_state():
        return torch.empty(shape, dtype=dtype, device="cpu")
