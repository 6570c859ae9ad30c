"""The quantized types: how many bits a code has, what it may hold, how it is stored. All of them: docs/types.md.

Names and fields are those of optimum-quanto 0.2.7, so that code written against it keeps its meaning; types that it lacks
have further fields.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import torch

from requanto.dtypes.codebooks import FP4, MINIFLOATS, NF4, minifloat, minifloat_name, normal_float


@dataclass(frozen=True, eq=True)
class qtype:  # the name optimum-quanto gave it
    """A quantized type.

    Attributes:
        name: unique name, e.g. ``"qint4"``.
        is_floating_point: True for float8 codes; False for integers and for numbers of a codebook's entries.
        bits: bits of one code.
        dtype: torch dtype in which one unpacked code is held.
        qmin, qmax: smallest and largest value of a signed code; of a codebook.
        is_unsigned: codes ``0 .. 2^bits - 1`` that always have a shift.
        values: what each code stands for, before the scale; None: codes are numbers themselves.
        is_learned: each tensor has values of its own, fitted to it.
    """

    name: str
    is_floating_point: bool
    bits: int
    dtype: torch.dtype
    qmin: float
    qmax: float
    is_unsigned: bool = False
    values: tuple[float, ...] | None = None
    is_learned: bool = False

    def __str__(self) -> str:
        return f"quanto.{self.name}"

    def __hash__(self) -> int:
        return hash(str(self))

    # A type is a constant: every copy of a tensor shares it.
    def __copy__(self) -> qtype:
        return self

    def __deepcopy__(self, memo: dict) -> qtype:
        return self

    @property
    def is_packed(self) -> bool:
        """True when several codes share one byte."""
        return self.bits < 8

    @property
    def storage_dtype(self) -> torch.dtype:
        """dtype of the stored codes: uint8 where codes are packed, else the code's own dtype."""
        return torch.uint8 if self.is_packed else self.dtype

    @property
    def zero_code(self) -> int:
        """The middle of unsigned codes (2^(bits-1)), which means 0 in a symmetric, packed tensor; 0 elsewhere."""
        return 2 ** (self.bits - 1) if (self.is_packed or self.is_unsigned) and not self.is_codebook else 0

    @property
    def is_codebook(self) -> bool:
        """True where a code is the number of a value, not a value."""
        return self.values is not None or self.is_learned

    @property
    def span(self) -> float:
        """The value that a group's largest absolute weight gets under absmax scaling, where codes are a codebook's."""
        return 1.0 if self.is_learned or self.values is None else max(abs(value) for value in self.values)

    @property
    def affine_by_default(self) -> bool:
        """Whether a shift is stored unless the user says otherwise."""
        return self.is_unsigned or (self.bits < 8 and not self.is_codebook)

    def affine(self, symmetric: bool | None, name: str = "weight") -> bool:
        """Whether a shift is stored when the user asks for ``symmetric``.

        Raises:
            ValueError: the type has no such form.
        """
        if symmetric is None:
            return self.affine_by_default
        if self.is_unsigned and symmetric:
            raise ValueError(
                f"{name}: {self.name} codes are unsigned and need a shift; symmetric=True goes with a signed type, such as "
                f"'int{max(2, self.bits)}'"
            )
        if not symmetric and (self.is_codebook or (self.bits == 8 and not self.is_unsigned)):
            better = "'uint8'" if self.bits == 8 else f"'uint{self.bits}'"
            raise ValueError(
                f"{name}: {self.name} codes are symmetric and have no shift; symmetric=False goes with an integer type of "
                f"fewer than 8 bits or an unsigned one, such as {better}"
            )
        return not symmetric

    def with_values(self, values: tuple[float, ...]) -> qtype:
        """A learned type with the values that one tensor has; never part of a tensor, whose values are stored."""
        return replace(self, values=values)


def _integer(bits: int) -> qtype:
    return qtype(f"qint{bits}", False, bits, torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _unsigned(bits: int) -> qtype:
    return qtype(f"quint{bits}", False, bits, torch.uint8, 0, 2**bits - 1, is_unsigned=True)


def _codebook(name: str, values: tuple[float, ...]) -> qtype:
    bits = (len(values) - 1).bit_length()
    return qtype(f"q{name}", False, bits, torch.uint8, min(values), max(values), values=values)


def _learned(bits: int) -> qtype:
    return qtype(f"qcodebook{bits}", False, bits, torch.uint8, -1.0, 1.0, is_learned=True)


def _float8(dtype: torch.dtype) -> qtype:
    info = torch.finfo(dtype)
    return qtype(f"q{str(dtype).removeprefix('torch.')}", True, 8, dtype, info.min, info.max)


qint2, qint3, qint4, qint5, qint6, qint7, qint8 = (_integer(bits) for bits in range(2, 9))
quint1, quint2, quint3, quint4, quint5, quint6, quint7, quint8 = (_unsigned(bits) for bits in range(1, 9))
qnf2, qnf3, qnf4 = _codebook("nf2", normal_float(2)), _codebook("nf3", normal_float(3)), _codebook("nf4", NF4)
qfp4 = _codebook("fp4", FP4)
qcodebook2, qcodebook3, qcodebook4 = (_learned(bits) for bits in (2, 3, 4))
qfloat8_e4m3fn = _float8(torch.float8_e4m3fn)
qfloat8_e4m3fnuz = _float8(torch.float8_e4m3fnuz)
qfloat8_e5m2 = _float8(torch.float8_e5m2)
qfloat8 = qfloat8_e4m3fn

#: every type by its name
qtypes: dict[str, qtype] = {
    kind.name: kind
    for kind in (
        *(qint2, qint3, qint4, qint5, qint6, qint7, qint8),
        *(qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2),
        *(quint1, quint2, quint3, quint4, quint5, quint6, quint7, quint8),
        *(qnf2, qnf3, qnf4, qfp4),
        *(_codebook(f"fp{bits}_e{a}m{b}", minifloat(a, b)) for bits, a, b in MINIFLOATS),
        *(qcodebook2, qcodebook3, qcodebook4),
    )
}
qtypes["qfloat8"] = qfloat8

# What users write in a config: "int4", "float8", "fp8", "qint4" ...
_ALIASES = {name.removeprefix("q"): t for name, t in qtypes.items()}
_ALIASES |= {"fp8": qfloat8, "fp8_e4m3fn": qfloat8, "fp8_e5m2": qfloat8_e5m2, "fp8_e4m3fnuz": qfloat8_e4m3fnuz}


def resolve_qtype(value: str | qtype | torch.dtype) -> qtype:
    """The qtype that a user's string, qtype or torch dtype names.

    Raises:
        ValueError: the string names no known type; the message lists the known ones and the nearest.
        TypeError: the value is neither string, qtype nor torch dtype.
    """
    if isinstance(value, qtype):
        return value
    if isinstance(value, torch.dtype):
        for candidate in qtypes.values():
            if candidate.dtype == value and candidate.bits == 8:
                return candidate
        value = str(value).removeprefix("torch.")
    if not isinstance(value, str):
        raise TypeError(f"a quantized type is given as a string or a qtype, found {type(value).__name__}: {value!r}")
    key = value.lower()
    small_float = minifloat_name(key.removeprefix("q"))
    key = key if small_float is None else f"q{small_float}"
    if key in qtypes:
        return qtypes[key]
    if key in _ALIASES:
        return _ALIASES[key]
    near = difflib.get_close_matches(key, _ALIASES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown quantized type {value!r}{hint} Known: {', '.join(sorted(_ALIASES))}")


def short_name(value: qtype) -> str:
    """The name a config uses: ``qint4`` -> ``int4``, ``qfloat8_e4m3fn`` -> ``float8``."""
    return "float8" if value == qfloat8 else value.name.removeprefix("q")
