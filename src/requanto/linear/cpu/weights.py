"""Quantized weights as the C library takes them: one `RqWeight` for a matrix, one for each expert of a fused weight.

A description holds addresses of the weight's tensors. It is cached with the weight's storage, which drops it when it gets
other tensors; values that are changed in place are read as they are. What the library cannot read as it is stored (float64
scales, a codebook in another dtype than float32) is copied, and copied anew when the original has changed.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import library
from requanto.linear.cpu.strips import MOST_TABLE_BITS, STRIPS
from requanto.runtime.tracing import without_ambient_state
from requanto.scales.compact import zero_step
from requanto.tensor.layout import PLAIN, Parts
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

#: torch's dtypes as `RqDtype`.
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
#: `RqCode`
_INTEGER, _TABLE = 0, 1
_FLOAT8 = {torch.float8_e4m3fn: 2, torch.float8_e5m2: 3, torch.float8_e4m3fnuz: 4}
#: `RqScaleKind`
_NONE, _PLAIN, _CODES, _E8M0, _E4M3 = 0, 1, 2, 3, 4
#: Entries of a table, whatever the bits: vector instructions read whole vectors.
_ENTRIES = 64
#: Rounding a codebook's values to integers may add so much to the weights' own rounding error (root mean square).
MOST_TABLE_ERROR = 0.25


class Described:
    """A weight as the library takes it.

    Attributes:
        codes: the weight's codes.
        matrices: one `RqWeight` for the matrix, or for each expert.
        strips: whether the codes are in strips; else they are in the plain layout.
    """

    __slots__ = ("_copies", "_kept", "codes", "matrices", "strips")

    def __init__(self, spec: WeightSpec, parts: Parts, strips: bool) -> None:
        self.codes, self.strips = parts["qdata"], strips
        self._copies: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._kept: list[torch.Tensor] = []
        experts = spec.shape[0] if spec.axis == 1 else 1
        parts = {name: self._readable(name, part, strips) for name, part in parts.items() if name in _READ}
        if "row_shift" in parts and parts["row_shift"].dtype != parts["row_scale"].dtype:
            parts |= {n: self._copied(parts[n], torch.float32) for n in ("row_scale", "row_shift")}
        self.matrices = tuple(self._matrix(spec, parts, strips, expert, experts) for expert in range(experts))

    @property
    def nbytes(self) -> int:
        """Bytes of copies."""
        return sum(copy.nbytes for _, copy, _ in self._copies)

    def is_current(self) -> bool:
        """False if a tensor was changed in place of which this holds a copy."""
        return all(part._version == version for part, _, version in self._copies)

    @property
    def has_copies(self) -> bool:
        """Whether it holds copies, which `is_current` is to be asked for."""
        return bool(self._copies)

    @property
    def is_cachable(self) -> bool:
        """False with copies of inference tensors, which have no version to tell a change."""
        return not any(version < 0 for _, _, version in self._copies)

    def _readable(self, name: str, part: torch.Tensor, strips: bool) -> torch.Tensor:
        if name == "codebook":  # its table is shared by all weights with these values
            version = -1 if part.is_inference() else part._version
            self._copies.append((part, part.detach()[:0], version))
            return part
        if name == "qdata":  # vectors of strips are read with aligned loads; a file may hold them at any address
            return self._copied(part, part.dtype) if strips and part.data_ptr() % 64 and part.numel() else part
        if part.dtype not in DTYPES:
            return self._copied(part, torch.float32)
        if name.startswith("row_") and not part.is_contiguous():
            return self._copied(part, part.dtype)
        self._kept.append(part)
        return part

    def _copied(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        version = -1 if part.is_inference() else part._version
        with without_ambient_state():
            copy = part.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        self._copies.append((part, copy, version))
        return copy

    def _matrix(self, spec: WeightSpec, parts: Parts, strips: bool, expert: int, experts: int) -> Any:
        rows, length = spec.matrix_shape
        rows //= experts
        kind, group = spec.qtype, spec.group_size or max(1, length)
        codes = parts["qdata"]
        self._kept.append(codes)
        found = library.structs().RqWeight()
        found.codes = codes.data_ptr() + codes.nbytes // experts * expert
        found.rows, found.length, found.group, found.groups = rows, length, group, spec.groups
        found.bits = kind.bits
        found.block = _block(spec)
        self._set_code(found, spec, parts, strips)
        for name, set_kind in (("scale", _scale_kind), ("shift", _shift_kind)):
            part = parts.get(name)
            setattr(found, f"{name}_kind", set_kind(spec))
            if part is None:
                continue
            setattr(found, f"{name}_dtype", DTYPES[part.dtype])
            setattr(found, f"{name}_bits", spec.code_bits.get(name, 8))
            own = part.unflatten(0, (experts, rows))[expert] if part.dim() == 2 else part[expert]
            setattr(found, name, own.data_ptr())
            stride_n, stride_g = own.stride()
            setattr(found, f"{name}_stride_n", stride_n)
            setattr(found, f"{name}_stride_g", stride_g)
        for name in ("row_scale", "row_shift"):
            if name in parts:
                part = parts[name]
                setattr(found, name, part.data_ptr() + part.nbytes // experts * expert)
                found.row_dtype = DTYPES[part.dtype]
        found.scale_groups = spec.groups if spec.scale_block is None else spec.scale_block // group
        found.scale_zero = 2 ** (spec.scale_bits - 1) if spec.signed and spec.scale_block and spec.scale_bits else 0
        bits = spec.shift_code_bits
        found.shift_factor = 1.0 if bits is None or spec.scale_block is not None else zero_step(kind, bits)
        return found

    def _set_code(self, found: Any, spec: WeightSpec, parts: Parts, strips: bool) -> None:
        kind = spec.qtype
        if kind.is_codebook:
            found.code = _TABLE
            own = parts.get("codebook")
            table = fixed_table(kind) if own is None else _table_of(tuple(own.float().tolist()))
            found.table, found.levels = table.values.data_ptr(), table.levels.data_ptr()
            found.level_scale = table.step
            self._kept += [table.values, table.levels]
        elif kind.is_floating_point:
            found.code = _FLOAT8[kind.dtype]
        else:
            found.code = _INTEGER
            signed_bytes = strips and kind.storage_dtype == torch.int8  # strips have code + 128
            found.zero_code = 128 if signed_bytes else 0 if spec.affine else kind.zero_code


#: Parts that the library reads.
_READ = ("qdata", "scale", "shift", "row_scale", "row_shift", "codebook")


def described(weight: QTensor) -> Described | None:
    """The weight as the library takes it; None if there is no library, or it cannot read the codes where they are."""
    storage, spec = weight._storage, weight._spec
    derived = storage.derived  # before the parts: a change in another thread replaces this dictionary
    layout, parts = storage.state
    codes = parts["qdata"]
    found: Described | None = derived.get("cpu")
    # A snapshot shares the dictionary, into which another thread may put what it read after a change.
    if found is not None and found.codes is codes and found.is_current():
        return found
    if (layout is not STRIPS and layout is not PLAIN) or spec.axis > 1 or not codes.is_contiguous():
        return None
    if spec.qtype.is_codebook and spec.qtype.bits > MOST_TABLE_BITS:
        return None
    if library.for_tensors(codes) is None:
        return None
    found = Described(spec, parts, layout is STRIPS)
    if found.is_cachable:
        derived["cpu"] = found
    return found


class Table(NamedTuple):
    """A codebook for kernels.

    Attributes:
        values: float32 ``[64]``.
        levels: uint8 ``[64]``, ``values ~ step * (levels - 128)``.
        step: the float32 size of a level.
        error: root mean square of the levels' error, divided by the weights' own rounding error.
    """

    values: torch.Tensor
    levels: torch.Tensor
    step: float
    error: float


@functools.lru_cache(maxsize=64)
def fixed_table(kind: qtype) -> Table:
    """The codebook of a type with fixed values, as kernels take it."""
    assert kind.values is not None
    return make_table(kind.values)


@functools.lru_cache(maxsize=1024)
def _table_of(values: tuple[float, ...]) -> Table:
    return make_table(values)


def table_of(weight: QTensor) -> Table:
    """The codebook of a weight as kernels take it."""
    own = weight._storage.parts.get("codebook")
    return fixed_table(weight._spec.qtype) if own is None else _table_of(tuple(own.float().tolist()))


def make_table(values: Sequence[float]) -> Table:
    """A codebook for kernels.

    The values of small floats are multiples of the smallest one, so where 127 of these reach the largest, levels are exact.
    Otherwise the step is the one with the smallest error among those of which 64 to 127 reach the largest value.
    """
    finite = [value for value in values if math.isfinite(value)]
    largest = max((abs(value) for value in finite), default=0.0)
    smallest = min((abs(value) for value in finite if value), default=1.0)
    if largest <= 127 * smallest and all(float(value / smallest).is_integer() for value in finite):
        step = smallest
    else:
        steps = [ctypes.c_float(largest / count).value or 1.0 for count in range(127, 63, -1)]
        step = min(steps, key=lambda one: sum((one * round(value / one) - value) ** 2 for value in finite))
    levels = [round(value / step) + 128 if math.isfinite(value) else 128 for value in values]
    ordered = sorted(set(finite))
    # The rounding error of a value between two neighbours is a twelfth of their distance squared, on average.
    own = sum((high - low) ** 2 / 12 for low, high in itertools.pairwise(ordered)) / max(1, len(ordered) - 1)
    added = sum((step * (level - 128) - value) ** 2 for level, value in zip(levels, values)) / max(1, len(levels))
    error = math.inf if len(finite) < len(values) else math.sqrt(added / own) if own else 0.0
    missing = _ENTRIES - len(values)
    with without_ambient_state():
        table = torch.tensor([*values, *[0.0] * missing], dtype=torch.float32, device="cpu")
        bytes_ = torch.tensor([*levels, *[128] * missing], dtype=torch.uint8, device="cpu")
    return Table(table, bytes_, step, error)


def _block(spec: WeightSpec) -> int:
    """Columns of x that share a scale."""
    if spec.groups == 1:
        return 32
    return next(size for size in (32, 16, 8, 1) if spec.group_size % size == 0)  # type: ignore[operator]


def _scale_kind(spec: WeightSpec) -> int:
    if spec.qtype.blocks is not None:
        return _E4M3 if spec.qtype.blocks.scale == "e4m3" else _E8M0
    return _PLAIN if spec.scale_bits is None else _CODES


def _shift_kind(spec: WeightSpec) -> int:
    if not spec.affine:
        return _NONE
    return _PLAIN if spec.shift_code_bits is None else _CODES
