"""The quantized types: how many bits a code has, what it may hold, how it is stored.

Names and fields are those of optimum-quanto 0.2.7, so that code written against it keeps its meaning.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=True)
class qtype:  # the name optimum-quanto gave it
    """A quantized type.

    Attributes:
        name: unique name, e.g. ``"qint4"``.
        is_floating_point: True for float8 codes, False for integers.
        bits: bits of one code.
        dtype: torch dtype in which one unpacked code is held.
        qmin, qmax: smallest and largest value of a signed code.
    """

    name: str
    is_floating_point: bool
    bits: int
    dtype: torch.dtype
    qmin: float
    qmax: float

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
        """The unsigned code that means 0 in a symmetric, packed tensor (2^(bits-1)); 0 elsewhere."""
        return 2 ** (self.bits - 1) if self.is_packed else 0


def _integer(bits: int) -> qtype:
    return qtype(f"qint{bits}", False, bits, torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _float8(dtype: torch.dtype) -> qtype:
    info = torch.finfo(dtype)
    return qtype(f"q{str(dtype).removeprefix('torch.')}", True, 8, dtype, info.min, info.max)


qint2 = _integer(2)
qint4 = _integer(4)
qint8 = _integer(8)
qfloat8_e4m3fn = _float8(torch.float8_e4m3fn)
qfloat8_e4m3fnuz = _float8(torch.float8_e4m3fnuz)
qfloat8_e5m2 = _float8(torch.float8_e5m2)
qfloat8 = qfloat8_e4m3fn

#: every type by its name
qtypes: dict[str, qtype] = {t.name: t for t in (qint2, qint4, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2)}
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
