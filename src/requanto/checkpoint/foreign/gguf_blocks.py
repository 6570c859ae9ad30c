"""The blocks of GGUF's types, taken apart into codes and scales of our format, without rounding anything.

A row of a GGUF tensor is a run of blocks, each of 32 or 256 weights with their scales. Layouts and arithmetic are those of
the ggml library (`ggml-common.h`, `ggml-quants.c`); the names here are its names:

    Q4_0, Q5_0, Q8_0     w = d * (q - 2^(bits - 1))               d: float16, one for 32 weights; of Q8_0 q is signed
    Q4_1, Q5_1           w = d * q + m                            m: float16
    Q2_K, Q4_K, Q5_K     w = d * sc * q - dmin * mn               sc, mn: codes of a group, d, dmin: float16 of 256 weights
    Q3_K, Q6_K           w = d * (sc - 2^(bits - 1)) * (q - 2^(bits - 1))      of Q6_K sc is signed
    MXFP4                w = 2^(e - 127) * e2m1(q)
    IQ4_NL               w = d * value[q]                         the same 16 values for all tensors
    IQ4_XS               w = d * (sc - 2^5) * value[q]
    TQ2_0                w = d * (q - 1)

Everything is done on bytes, row by row, so rows can be permuted before or after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from requanto.dtypes.bit_packing import pack, unpack
from requanto.scales.compact import pack_codes
from requanto.tensor.spec import WeightSpec, parse_words

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Blocks:
    """How a type is held in our format.

    Attributes:
        count: weights of a block.
        size: bytes of a block.
        kind: our type of the codes.
        words: the words of its line that follow the shape.
        parts: makes our parts from blocks ``[rows, blocks of a row, size]``, uint8; all parts have ``rows`` rows.
        values: of a codebook: what each code stands for, which is a part of its own (`codebook`).
    """

    count: int
    size: int
    kind: str
    words: str
    parts: Callable[[torch.Tensor], Parts]
    values: tuple[int, ...] = ()

    @property
    def codebook(self) -> Parts:
        """The part that all rows share; none for most types."""
        return {"codebook": torch.tensor(self.values, dtype=torch.float32, device="cpu")} if self.values else {}

    def line(self, shape: torch.Size, axis: int = 0, **properties: bool) -> str:
        """The line of a weight in our table.

        Args:
            shape: the stored shape: ``[N, K]``, of experts ``[E, N, K]``.
            axis: 0, or 1 for experts.
            properties: further fields of `WeightSpec`: ``transposed``, ``order``.
        """
        fields = parse_words(f"{self.kind} {self.words}")
        return WeightSpec(shape=shape, dtype=torch.float32, axis=axis, **fields, **properties).text()


# ---------------------------------------------------------------------- fields of a block


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """A float16 number of each block: ``[rows, blocks]``."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _fields(data: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """Fields of ``bits`` bits as ggml stores them: of each run of bytes first the lowest field of all, then the next.

    Args:
        data: ``[..., bytes]``.
        bits: 1, 2 or 4.
        run: number of bytes in a run.

    Returns:
        uint8 ``[..., bytes * 8 / bits]``.
    """
    runs = data.unflatten(-1, (-1, 1, run))
    fields = torch.cat([runs >> shift for shift in range(0, 8, bits)], -2)
    return fields.bitwise_and_(2**bits - 1).flatten(-3)


def _row(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[rows, blocks, count]`` as packed rows of our format."""
    return pack(codes.flatten(1), bits)


# ---------------------------------------------------------------------- blocks of 32


def _q4_0(blocks: torch.Tensor) -> Parts:
    return {"qdata": _row(_fields(blocks[..., 2:], 4, 16), 4), "scale": _half(blocks, 0)}


def _q4_1(blocks: torch.Tensor) -> Parts:
    codes = _fields(blocks[..., 4:], 4, 16)
    return {"qdata": _row(codes, 4), "scale": _half(blocks, 0), "shift": -_half(blocks, 2)}


def _five_bits(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Codes of 5 bits from the fifth bits of 32 codes in 4 bytes, and the other bits in 16."""
    return _fields(low, 4, 16).bitwise_or_(unpack(high.contiguous(), 1, 32) << 4)


def _q5_0(blocks: torch.Tensor) -> Parts:
    return {"qdata": _row(_five_bits(blocks[..., 2:6], blocks[..., 6:]), 5), "scale": _half(blocks, 0)}


def _q5_1(blocks: torch.Tensor) -> Parts:
    codes = _five_bits(blocks[..., 4:8], blocks[..., 8:])
    return {"qdata": _row(codes, 5), "scale": _half(blocks, 0), "shift": -_half(blocks, 2)}


def _q8_0(blocks: torch.Tensor) -> Parts:
    return {"qdata": blocks[..., 2:].flatten(1).view(torch.int8), "scale": _half(blocks, 0)}


def _mxfp4(blocks: torch.Tensor) -> Parts:
    return {"qdata": _row(_fields(blocks[..., 1:], 4, 16), 4), "scale": blocks[..., 0].contiguous()}


# ---------------------------------------------------------------------- blocks of 256


def _groups(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of scales ``[rows, blocks, groups of a block]`` as our format packs them."""
    return pack_codes(codes.flatten(1), bits)


def _q2_k(blocks: torch.Tensor) -> Parts:
    scales = blocks[..., :16]
    return {
        "qdata": _row(_fields(blocks[..., 16:80], 2, 32), 2),
        "scale": _groups(scales & 15, 4),
        "shift": _groups(scales >> 4, 4),
        "row_scale": _half(blocks, 80),
        "row_shift": _half(blocks, 82),
    }


def _q3_k(blocks: torch.Tensor) -> Parts:
    # The third bit is set where the code is 4 or more, so codes are 0 to 7 and stand for code - 4.
    codes = _fields(blocks[..., 32:96], 2, 32).bitwise_or_(_fields(blocks[..., :32], 1, 32) << 2)
    low, high = _fields(blocks[..., 96:104], 4, 8), _fields(blocks[..., 104:108], 2, 4)
    return {
        "qdata": _row(codes, 3),
        "scale": _groups(low | (high << 4), 6),
        "row_scale": _half(blocks, 108),
    }


def _scales_of_six_bits(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 8 scales and 8 shifts from 12 bytes, as Q4_K and Q5_K store them.

    Of the bytes 0 to 3 the low 6 bits are scales 0 to 3, of 4 to 7 shifts 0 to 3. The bytes 8 to 11 hold the low 4 bits of
    scales and shifts 4 to 7, whose high 2 bits are those of the bytes 0 to 7.
    """
    first, second, third = data[..., :4], data[..., 4:8], data[..., 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], -1)
    shifts = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], -1)
    return scales, shifts


def _q4_k(blocks: torch.Tensor) -> Parts:
    return _q45_k(blocks, _fields(blocks[..., 16:], 4, 32), 4)


def _q5_k(blocks: torch.Tensor) -> Parts:
    high = _fields(blocks[..., 16:48], 1, 32)
    return _q45_k(blocks, _fields(blocks[..., 48:], 4, 32).bitwise_or_(high << 4), 5)


def _q45_k(blocks: torch.Tensor, codes: torch.Tensor, bits: int) -> Parts:
    scales, shifts = _scales_of_six_bits(blocks[..., 4:16])
    return {
        "qdata": _row(codes, bits),
        "scale": _groups(scales, 6),
        "shift": _groups(shifts, 6),
        "row_scale": _half(blocks, 0),
        "row_shift": _half(blocks, 2),
    }


def _q6_k(blocks: torch.Tensor) -> Parts:
    codes = _fields(blocks[..., :128], 4, 64).bitwise_or_(_fields(blocks[..., 128:192], 2, 32) << 4)
    return {
        "qdata": _row(codes, 6),
        "scale": _groups(blocks[..., 192:208] ^ 128, 8),  # a signed byte + 128
        "row_scale": _half(blocks, 208),
    }


def _iq4_xs(blocks: torch.Tensor) -> Parts:
    low, high = _fields(blocks[..., 4:8], 4, 1), _fields(blocks[..., 2:4], 2, 1)
    return {
        "qdata": _row(_fields(blocks[..., 8:], 4, 16), 4),
        "scale": _groups(low | (high << 4), 6),
        "row_scale": _half(blocks, 0),
    }


def _tq2_0(blocks: torch.Tensor) -> Parts:
    scale = _half(blocks, 64)
    return {"qdata": _row(_fields(blocks[..., :64], 2, 32), 2), "scale": scale, "shift": scale.clone()}


#: what the codes of IQ4_NL and IQ4_XS stand for
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

#: types that stay quantized, by their names in GGUF
TYPES: dict[str, Blocks] = {
    "Q4_0": Blocks(32, 18, "qint4", "group=32 signed", _q4_0),
    "Q4_1": Blocks(32, 20, "qint4", "group=32 affine", _q4_1),
    "Q5_0": Blocks(32, 22, "qint5", "group=32 signed", _q5_0),
    "Q5_1": Blocks(32, 24, "qint5", "group=32 affine", _q5_1),
    "Q8_0": Blocks(32, 34, "qint8", "group=32", _q8_0),
    "Q2_K": Blocks(256, 84, "qint2", "group=16 affine scales=4 block=256", _q2_k),
    "Q3_K": Blocks(256, 110, "qint3", "group=16 scales=6 signed block=256", _q3_k),
    "Q4_K": Blocks(256, 144, "qint4", "group=32 affine scales=6 block=256", _q4_k),
    "Q5_K": Blocks(256, 176, "qint5", "group=32 affine scales=6 block=256", _q5_k),
    "Q6_K": Blocks(256, 210, "qint6", "group=16 scales=8 signed block=256", _q6_k),
    "MXFP4": Blocks(32, 17, "qmxfp4", "group=32", _mxfp4),
    "IQ4_NL": Blocks(32, 18, "qcodebook4", "group=32 signed", _q4_0, _IQ4),
    "IQ4_XS": Blocks(256, 136, "qcodebook4", "group=32 scales=6 signed block=256", _iq4_xs, _IQ4),
    "TQ2_0": Blocks(256, 66, "qint2", "group=256 affine", _tq2_0),
}
