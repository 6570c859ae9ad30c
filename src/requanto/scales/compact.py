"""Scales and shifts in 4 to 8 bits.

The scale of a group is stored as a code of ``bits`` bits (4 to 8), times one bfloat16 scale for the whole row:

    scale = row_scale * scale_code                     scale_code in 0 .. 2^bits - 1
    shift = scale * zero_code * (2^b / 2^bits)         zero_code in 0 .. 2^bits - 1; b: bits of the weights' codes

So a group needs 2 x 8 or 2 x 4 bits instead of 2 x 16. The shift is a zero point in fractions of a code. It is within the
range of the codes, hence 0 is always between a group's smallest and largest value: the range of a group whose weights all
have one sign is extended to 0.

The weights' codes are chosen after scale and shift were rounded, so their rounding adds no second error. (Scales of scales:
QLoRA's double quantization, Dettmers et al. 2023, arXiv:2305.14314; llama.cpp's K types round scales and minima to 6 bits.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from requanto.dtypes.bit_packing import pack, packed_length, unpack
from requanto.dtypes.qtypes import qtype

#: dtype of a row's scale: float32's range in 16 bits. Its rounding adds no error, since the codes are chosen after it.
ROW_DTYPE = torch.bfloat16


class CompactScales(NamedTuple):
    """Codes (uint8, not packed) of the groups' scales and zero points, ``[..., G]``, and the rows' scales ``[..., 1]``."""

    scale: torch.Tensor
    shift: torch.Tensor | None
    row_scale: torch.Tensor


def check_scale_bits(value: Any, where: str = "scale_bits", kind: qtype | None = None) -> int | None:
    """Checks a number of bits for scales: 4 to 8, or None (also for 16) for scales stored as floats.

    Args:
        kind: the type of the weight, if it is known.

    Raises:
        ValueError: the value is another one, or the type has scales of its own.
    """
    if value in (None, 16):
        return None
    if kind is not None and kind.blocks is not None:
        raise ValueError(f"{where}={value!r} does not fit {kind.name}, whose scales have 8 bits; leave it out")
    if not isinstance(value, int) or isinstance(value, bool) or not 4 <= value <= 8:
        raise ValueError(f"{where} must be 4 to 8, or 16 or None for scales stored as floats; found {value!r}")
    return value


def round_scales(scale: torch.Tensor, shift: torch.Tensor | None, kind: qtype, bits: int) -> CompactScales:
    """The codes nearest to float32 scales and shifts ``[..., G]``, after extending each group's range to 0.

    A scale that is 0 after that (a group of zeros) stays 0; others get a code of at least 1.
    """
    steps, top = 2**kind.bits - 1, 2**bits - 1
    if shift is not None:
        low, high = (-shift).clamp(max=0), (scale * steps - shift).clamp(min=0)
        scale = (high - low) / steps
    row = (scale.amax(-1, keepdim=True) / top).to(ROW_DTYPE)
    divisor = torch.where(row == 0, torch.ones_like(row), row).float()
    codes = (scale / divisor).round_().clamp_(1, top).masked_fill_(scale == 0, 0)
    zeros = None
    if shift is not None:
        rounded = codes * row.float()
        zeros = torch.where(rounded == 0, torch.zeros_like(rounded), -low / (rounded * zero_step(kind, bits)))
        zeros = zeros.round_().clamp_(0, top).to(torch.uint8)
    return CompactScales(codes.to(torch.uint8), zeros, row)


def zero_step(kind: qtype, bits: int) -> float:
    """Size of one step of a zero point, in codes of the weights."""
    return 2.0 ** (kind.bits - bits)


def expand_scale(codes: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """float32 scales ``[..., G]`` from unpacked codes. Code times bfloat16 has 16 bits: exact in float32."""
    return codes.to(torch.float32) * row_scale.to(torch.float32)


def expand_shift(zeros: torch.Tensor, scale: torch.Tensor, kind: qtype, bits: int) -> torch.Tensor:
    """float32 shifts ``[..., G]`` from unpacked zero points and expanded scales. Exact: 24 bits."""
    return zeros.to(torch.float32).mul_(zero_step(kind, bits)).mul_(scale)


def stored_length(groups: int, bits: int) -> int:
    """Number of bytes for ``groups`` codes."""
    return groups if bits == 8 else packed_length(groups, bits)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The stored (packed) codes: uint8 ``[..., stored_length]``."""
    return codes if bits == 8 else pack(codes, bits)


def unpack_codes(stored: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """The reverse of :func:`pack_codes`."""
    return stored if bits == 8 else unpack(stored, bits, groups)
