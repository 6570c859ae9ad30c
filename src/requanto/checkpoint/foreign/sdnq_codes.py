"""SDNQ's types and the order of bits in its packed tensors.

Codes of b bits are packed along the flattened tensor, n codes into m words of 8 bits (up to 7 bits) or 16. The first m codes
are the low bits of the m words. The bits of the other codes fill what is left of the words, in an order that `_RUNS` lists.
Read from the packed tensors of SDNQ 0.2.8; its integers are packed alike since 0.1.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from requanto.dtypes.codebooks import minifloat

#: dtypes that are stored as they are
_PLAIN = {
    **{f"float{bits}_{form}": f"float{bits}_{form}" for bits, form in ((8, "e4m3fn"), (8, "e5m2"), (8, "e8m0fnu"))},
    **{f"float8_{form}": f"float8_{form}" for form in ("e4m3fnuz", "e5m2fnuz")},
    **{
        name: name for name in ("int8", "uint8", "int16", "int32", "uint16", "uint32", "float16", "bfloat16", "float32")
    },
}
_SHORT = {
    **{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp15": "float15_e5m9fn", "fp14": "float14_e5m8fn"},
    **{"fp13": "float13_e5m7fn", "fp12": "float12_e5m6fn", "fp11": "float11_e5m5fn", "fp10": "float10_e5m4fn"},
    **{"fp9": "float9_e4m4fn", "fp8": "float8_e4m3fn", "fp7": "float7_e3m3fn", "fp6": "float6_e3m2fn"},
    **{"fp5": "float5_e2m2fn", "fp4": "float4_e2m1fn", "fp3": "float3_e1m1fn", "fp2": "float2_e1m0fn"},
    **{
        "ufp16": "float16_e5m11fnu",
        "ufp15": "float15_e5m10fnu",
        "ufp14": "float14_e5m9fnu",
        "ufp13": "float13_e5m8fnu",
    },
    **{"ufp12": "float12_e5m7fnu", "ufp11": "float11_e5m6fnu", "ufp10": "float10_e5m5fnu", "ufp9": "float9_e4m5fnu"},
    **{"ufp8": "float8_e4m4fnu", "ufp7": "float7_e3m4fnu", "ufp6": "float6_e3m3fnu", "ufp5": "float5_e2m3fnu"},
    **{"ufp4": "float4_e2m2fnu", "ufp3": "float3_e1m2fnu", "ufp2": "float2_e1m1fnu", "ufp1": "float1_e1m0fnu"},
    **{"fp1": "float1_e1m0fnu", "int1": "uint1", "bool": "uint1"},
}
_INTEGER = re.compile(r"(u?)int(\d+)")
_FLOAT = re.compile(r"float(\d+)_e(\d+)m(\d+)(fnu?)(_sdnq)?")


class Kind(NamedTuple):
    """One of SDNQ's types.

    Attributes:
        name: its long name, such as ``"uint4"`` or ``"float6_e3m2fn"``.
        bits: bits of a code.
        unsigned: True for codes from 0 on, which have a zero point.
        exponent, mantissa: bits of a float; of an integer None.
        plain: torch dtype of codes that are numbers of torch; None: they are bit patterns, packed but for 8 and 16 bits.
    """

    name: str
    bits: int
    unsigned: bool
    exponent: int | None = None
    mantissa: int | None = None
    plain: torch.dtype | None = None

    @property
    def stored(self) -> tuple[torch.dtype, ...]:
        """Possible dtypes of the stored tensor. Eight codes of one bit come in an int64, which shifting a bool makes."""
        if self.plain is not None:
            return (self.plain,)
        if self.bits == 1:
            return torch.int64, torch.uint8
        if self.bits == 16:
            return (torch.uint16,)
        return (torch.uint8,) if self.bits <= 8 else (torch.int16,)

    @property
    def is_packed(self) -> bool:
        """True if the stored tensor has not the shape of the codes."""
        return self.plain is None and self.bits not in (8, 16)

    @property
    def is_float(self) -> bool:
        return self.exponent is not None or (self.plain is not None and self.plain.is_floating_point)


def kind_of(name: object) -> Kind | None:
    """SDNQ's type of a name; None: there is none."""
    if not isinstance(name, str):
        return None
    name = _SHORT.get(name, name)
    if name in _PLAIN:
        dtype = getattr(torch, _PLAIN[name])
        return Kind(name, dtype.itemsize * 8, name.startswith("uint"), plain=dtype)
    if (found := _INTEGER.fullmatch(name)) and 1 <= int(found[2]) <= 15 and not (found[2] == "1" and not found[1]):
        return Kind(name, int(found[2]), bool(found[1]))
    if found := _FLOAT.fullmatch(name):
        bits, exponent, mantissa = map(int, found.groups()[:3])
        unsigned = found[4] == "fnu"
        if 1 <= bits <= 16 and exponent and bits == exponent + mantissa + (not unsigned):
            return Kind(name, bits, unsigned, exponent, mantissa)
    return None


class _Piece(NamedTuple):
    """Bits of one code: ``count`` of them from ``low`` on lie in ``word`` from ``at`` on."""

    code: int
    low: int
    count: int
    word: int
    at: int


def _spread(code: int, top: int, count: int, words: int, at: int) -> list[_Piece]:
    """The bits of a code below ``top``, ``count`` at a time, in the free bits of words 0, 1 ..."""
    return [_Piece(code, top - count * (word + 1), count, word, at) for word in range(words)]


def _pieces(bits: int) -> tuple[int, int, list[_Piece]]:
    """Words of a run, its codes, and where the bits of the codes are."""
    if bits in (1, 2, 4):
        return 1, 8 // bits, [_Piece(i, 0, bits, 0, bits * i) for i in range(8 // bits)]
    words, codes, more = _RUNS[bits]
    first = [_Piece(i, 0, bits, i, 0) for i in range(words)]
    return words, codes, ([piece for piece in first if piece.word not in _OWN.get(bits, ())] + more)


def _row(codes: range, low: int, count: int, word: int, at: int) -> list[_Piece]:
    """The same bits of several codes, each in a word of its own."""
    return [_Piece(code, low, count, word + i, at) for i, code in enumerate(codes)]


#: words that hold no code of their own, only pieces of others
_OWN = {9: (8,), 11: (8, 9, 10)}
#: bits -> words, codes, and the pieces that are not the low bits of a word
_RUNS: dict[int, tuple[int, int, list[_Piece]]] = {
    3: (
        *(3, 8),
        _row(range(3, 6), 0, 3, 0, 3) + _row(range(6, 8), 0, 2, 0, 6) + [_Piece(6, 2, 1, 2, 6), _Piece(7, 2, 1, 2, 7)],
    ),
    5: (
        *(5, 8),
        _row(range(5, 8), 0, 3, 0, 5) + _row(range(5, 7), 3, 2, 3, 5) + [_Piece(7, 4, 1, 3, 7), _Piece(7, 3, 1, 4, 7)],
    ),
    6: (3, 4, _spread(3, 6, 2, 3, 6)),
    7: (7, 8, _spread(7, 7, 1, 7, 7)),
    9: (9, 16, _row(range(8, 16), 0, 7, 0, 9) + [_Piece(8 + i, 7, 2, 8, 2 * i) for i in range(8)]),
    10: (
        *(5, 8),
        _row(range(5, 8), 0, 6, 0, 10) + _row(range(5, 7), 6, 4, 3, 10) + [_Piece(7, 8, 2, 3, 14), _Piece(7, 6, 2, 4, 14)],
    ),
    11: (
        *(11, 16),
        _row(range(8, 16), 0, 5, 0, 11) + _row(range(8, 11), 5, 6, 8, 0) + _row(range(11, 14), 5, 6, 8, 6)
        + _row(range(14, 16), 5, 4, 8, 12) + [_Piece(14, 9, 2, 10, 12), _Piece(15, 9, 2, 10, 14)],
    ),
    12: (3, 4, _spread(3, 12, 4, 3, 12)),
    13: (
        *(13, 16),
        [piece for step in range(4) for piece in _row(range(13, 16), 3 * step, 3, 3 * step, 13)]
        + [_Piece(13 + i, 12, 1, 12, 13 + i) for i in range(3)],
    ),
    14: (7, 8, _spread(7, 14, 2, 7, 14)),
    15: (15, 16, _spread(15, 15, 1, 15, 15)),
}  # fmt: skip


def packed_numel(kind: Kind, stored: int) -> int | None:
    """Number of codes in a stored tensor of ``stored`` elements; None: it holds no whole number of runs."""
    if not kind.is_packed:
        return stored
    words, codes, _ = _pieces(kind.bits)
    return None if stored % words else stored // words * codes


def codes_of(stored: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The codes of a packed tensor from 0 on, flat: uint8 up to 8 bits, else int32."""
    width = torch.uint8 if kind.bits <= 8 else torch.int32
    if not kind.is_packed:
        return stored.reshape(-1).to(width)
    words, count, pieces = _pieces(kind.bits)
    read = stored.reshape(-1, words)
    # A word of 16 bits is stored as signed: its bits are wanted.
    read = read.to(torch.uint8) if kind.bits <= 8 else read.to(torch.int32) & 0xFFFF
    codes = torch.zeros(read.shape[0], count, dtype=width, device=read.device)
    for piece in pieces:
        found = (read[:, piece.word] >> piece.at) & (2**piece.count - 1)
        codes[:, piece.code] |= found << piece.low
    return codes.reshape(-1)


def numbers_of(stored: torch.Tensor, kind: Kind, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that the codes stand for, before scale and zero point: of packed tensors flat, else of their shape."""
    if kind.plain is not None:
        return stored.to(dtype)
    codes = codes_of(stored, kind).to(torch.int32)
    if kind.exponent is None:
        return (codes if kind.unsigned else codes - 2 ** (kind.bits - 1)).to(dtype)
    table = minifloat(kind.exponent, kind.mantissa or 0)
    table = table[: len(table) // 2] if kind.unsigned else table
    found = torch.tensor(table, dtype=torch.float32, device=stored.device)[codes].to(dtype)
    return found if kind.is_packed else found.reshape(stored.shape)
