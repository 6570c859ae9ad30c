"""The quantized types: bits, range and storage of a code (list of all types: docs/types.md).

Names and fields are those of optimum-quanto 0.2.7, for compatibility; types that optimum-quanto lacks have further fields.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

import torch

from requanto.dtypes.codebooks import FP4, MINIFLOATS, NF4, minifloat, minifloat_name, normal_float


@dataclass(frozen=True)
class BlockFormat:
    """How the codes and scales of a type look whose scales take 8 bits each (`requanto.scales.blocks`).

    Attributes:
        size: default number of codes that share a scale.
        scale: format of the stored scales, ``"e4m3"`` (times a float32 number) or ``"e8m0"`` (powers of two).
        exponent, mantissa: bits of exponent and mantissa of a code.
    """

    size: int
    scale: str
    exponent: int
    mantissa: int

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)


@dataclass(frozen=True, eq=True)
class qtype:  # optimum-quanto's name
    """A quantized type.

    Attributes:
        name: unique name, e.g. ``"qint4"``.
        is_floating_point: True for float8 codes; False for integers and for indices into a codebook.
        bits: bits of one code.
        dtype: torch dtype of an unpacked code.
        qmin, qmax: smallest and largest code, or value of a codebook.
        is_unsigned: True for codes ``0 .. 2^bits - 1`` that always have a shift.
        values: value of each code of a codebook, before the scale; None: codes are numbers.
        is_learned: True if each tensor has its own codebook, fitted to it.
        blocks: of types whose scales are numbers of 8 bits (NVFP4, MX): their format; None: scales are floats.
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
    blocks: BlockFormat | None = None

    def __str__(self) -> str:
        return f"quanto.{self.name}"

    def __hash__(self) -> int:
        return hash(str(self))

    # A type is a constant, so copies return the same object.
    def __copy__(self) -> qtype:
        return self

    def __deepcopy__(self, memo: dict) -> qtype:
        return self

    @property
    def is_packed(self) -> bool:
        """True if several codes share one byte."""
        return self.bits < 8

    @property
    def storage_dtype(self) -> torch.dtype:
        """dtype of the stored codes: uint8 for packed codes, else `dtype`."""
        return torch.uint8 if self.is_packed else self.dtype

    @property
    def zero_code(self) -> int:
        """The stored code for 0 in a symmetric, packed tensor: 2^(bits-1); 0 for codebooks and signed 8-bit codes."""
        return 2 ** (self.bits - 1) if (self.is_packed or self.is_unsigned) and not self.is_codebook else 0

    @property
    def is_codebook(self) -> bool:
        """True if a code is an index into a codebook."""
        return self.values is not None or self.is_learned

    @property
    def fits_activations(self) -> bool:
        """True if inputs can be quantized to it on the fly: signed 8-bit types per token, those with `blocks` per block."""
        return self.blocks is not None or (self.bits == 8 and not self.is_unsigned)

    @property
    def span(self) -> float:
        """Largest absolute value of a codebook, to which absmax scaling maps a group's largest absolute weight."""
        return 1.0 if self.is_learned or self.values is None else max(abs(value) for value in self.values)

    @property
    def affine_by_default(self) -> bool:
        """Whether a shift is stored by default."""
        return self.is_unsigned or (self.bits < 8 and not self.is_codebook)

    def affine(self, symmetric: bool | None, name: str = "weight") -> bool:
        """Whether a shift is stored for the user's value of ``symmetric``.

        Raises:
            ValueError: the type does not support it.
        """
        if symmetric is None:
            return self.affine_by_default
        if self.is_unsigned and symmetric:
            raise ValueError(
                f"{name}: {self.name} codes are unsigned and need a shift; symmetric=True needs a signed type, such as "
                f"'int{max(2, self.bits)}'"
            )
        if not symmetric and (self.is_codebook or (self.bits == 8 and not self.is_unsigned)):
            better = "'uint8'" if self.bits == 8 else f"'uint{self.bits}'"
            raise ValueError(
                f"{name}: {self.name} codes are symmetric and have no shift; symmetric=False needs an integer type of "
                f"fewer than 8 bits or an unsigned one, such as {better}"
            )
        return not symmetric

    def with_values(self, values: tuple[float, ...]) -> qtype:
        """A copy of a learned type with the values of one tensor, for quantizing it; a QTensor stores them as codebook."""
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


def _block_float(name: str, size: int, scale: str, exponent: int, mantissa: int) -> qtype:
    """A small float in blocks: of 4 or 6 bits a codebook, of 8 bits torch's float8."""
    form, bits = BlockFormat(size, scale, exponent, mantissa), 1 + exponent + mantissa
    if bits == 8:
        return replace(_float8(getattr(torch, _FLOAT8[exponent])), name=f"q{name}", blocks=form)
    return replace(_codebook(name, minifloat(exponent, mantissa)), blocks=form)


#: bits of exponent -> torch's float8 of the MX specification
_FLOAT8 = {4: "float8_e4m3fn", 5: "float8_e5m2"}


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
qnvfp4, qmxfp4 = _block_float("nvfp4", 16, "e4m3", 2, 1), _block_float("mxfp4", 32, "e8m0", 2, 1)
qmxfp6_e2m3, qmxfp6_e3m2 = (_block_float(f"mxfp6_e{a}m{b}", 32, "e8m0", a, b) for a, b in ((2, 3), (3, 2)))
qmxfp8_e4m3, qmxfp8_e5m2 = (_block_float(f"mxfp8_e{a}m{b}", 32, "e8m0", a, b) for a, b in ((4, 3), (5, 2)))

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
        *(qnvfp4, qmxfp4, qmxfp6_e2m3, qmxfp6_e3m2, qmxfp8_e4m3, qmxfp8_e5m2),
    )
}
qtypes["qfloat8"] = qfloat8

# Further names that users may write in a config: "int4", "float8", "fp8" ...
_ALIASES = {name.removeprefix("q"): t for name, t in qtypes.items()}
_ALIASES |= {"fp8": qfloat8, "fp8_e4m3fn": qfloat8, "fp8_e5m2": qfloat8_e5m2, "fp8_e4m3fnuz": qfloat8_e4m3fnuz}
_ALIASES |= {"mxfp6": qmxfp6_e2m3, "mxfp8": qmxfp8_e4m3}


def resolve_qtype(value: str | qtype | torch.dtype) -> qtype:
    """The qtype for a user's string, qtype or torch dtype.

    Raises:
        ValueError: the type is unknown; the message lists the known ones and the nearest.
        TypeError: the value is neither string, qtype nor torch dtype.
    """
    if isinstance(value, qtype):
        return value
    if isinstance(value, torch.dtype):
        for candidate in qtypes.values():
            if candidate.dtype == value and candidate.bits == 8 and candidate.blocks is None:
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
    raise ValueError(f"unknown quantized type {value!r}{hint}. Known: {', '.join(sorted(_ALIASES))}")


def short_name(value: qtype) -> str:
    """The name in a config: ``qint4`` -> ``int4``, ``qfloat8_e4m3fn`` -> ``float8``."""
    return "float8" if value == qfloat8 else value.name.removeprefix("q")
