"""Scales and shifts in 4 to 8 bits.

The scale of a group is stored as a code of ``bits`` bits (4 to 8), times one bfloat16 scale for the whole row:

    scale = row_scale * scale_code                     scale_code in 0 .. 2^bits - 1
    shift = scale * zero_code * (2^b / 2^bits)         zero_code in 0 .. 2^bits - 1; b: bits of the weights' codes

So a group needs 2 x 8 or 2 x 4 bits instead of 2 x 16. The shift is a zero point in fractions of a code. It is within the
range of the codes, hence 0 is always between a group's smallest and largest value: the range of a group whose weights all
have one sign is extended to 0.

Whole zero points (``zero_point="integer"``) are codes of the weights, of b bits, also beside scales that are floats:

    shift = scale * zero_code                          zero_code in 0 .. 2^b - 1

That is what other programs and formats know as a zero point. 0 is exact, and a group needs 16 + b bits.

llama.cpp's K types have one float16 scale for each block of 256 weights instead of one for the row, and of affine types one
for the shifts. They are only read from files, not computed here:

    scale = row_scale * scale_code                     of signed types: row_scale * (scale_code - 2^(bits - 1))
    shift = row_shift * shift_code

The weights' codes are chosen after scale and shift were rounded, so their rounding adds no second error. (Scales of scales:
QLoRA's double quantization, Dettmers et al. 2023, arXiv:2305.14314; llama.cpp's K types round scales and minima to 6 bits.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from requanto.dtypes.bit_packing import pack, packed_length, unpack
from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_like

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


def check_zero_point(value: Any, where: str = "zero_point") -> str | None:
    """Checks how zero points are stored: ``"integer"``, or None (also for ``"float"``) for shifts that are not whole.

    Raises:
        ValueError: the value is another one.
    """
    if value in (None, "float"):
        return None
    if value != "integer":
        raise ValueError(f"{where} must be 'integer', 'float' or None, found {value!r}")
    return "integer"


def has_whole_zeros(kind: qtype, symmetric: bool | None) -> bool:
    """True if ``zero_point="integer"`` is possible for a type and the user's value of ``symmetric``."""
    return kind.bits > 1 and kind.affine_by_default and not symmetric


def around_zero(scale: torch.Tensor, shift: torch.Tensor, kind: qtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift ``[..., G]`` after extending each group's range to 0."""
    steps = 2**kind.bits - 1
    low, high = (-shift).clamp(max=0), (scale * steps - shift).clamp(min=0)
    return (high - low) / steps, -low


def whole_zeros(scale: torch.Tensor, shift: torch.Tensor, kind: qtype) -> torch.Tensor:
    """The codes (uint8) nearest to 0 for float32 scales that are not 0 and shifts ``[..., G]``."""
    return (shift / scale).round_().clamp_(0, 2**kind.bits - 1).to(torch.uint8)


def fit_scale(groups: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, kind: qtype) -> torch.Tensor:
    """The float32 scale ``[..., G]`` of least ``sum |w|^0.5 (w - dequantized)^2`` for the codes of a given one.

    Rounding a zero point moves all codes of a group, by half a step at most, so the scale that was found with the shift
    no longer is the best one.

    Args:
        groups: float32 weights ``[..., G, group]``.
        scale: float32 scales, not 0.
        zeros: the codes of 0.
        kind: type of the weights' codes.
    """
    zeros = zeros.to(torch.float32).unsqueeze(-1)
    codes = torch.div(groups, scale.unsqueeze(-1), out=scratch_like(groups, "codes"))
    codes.add_(zeros).round_().clamp_(0, 2**kind.bits - 1).sub_(zeros)
    counted = torch.abs(groups, out=scratch_like(groups, "importance")).sqrt_().mul_(codes)
    above = torch.mul(counted, groups, out=scratch_like(groups, "product")).sum(-1)
    below = counted.mul_(codes).sum(-1)
    fitted = above / below
    return torch.where((above > 0) & (below > 0), fitted, scale)


def round_scales(
    scale: torch.Tensor, shift: torch.Tensor | None, kind: qtype, bits: int, zero_bits: int | None = None
) -> CompactScales:
    """The codes nearest to float32 scales and shifts ``[..., G]``, after extending each group's range to 0.

    A scale that is 0 after that (a group of zeros) stays 0; others get a code of at least 1.

    Args:
        scale: float32 scales.
        shift: float32 shifts, or None.
        kind: type of the weights' codes.
        bits: bits of a scale.
        zero_bits: bits of a zero point; None: ``bits``.
    """
    zero_bits = zero_bits or bits
    top, low = 2**bits - 1, None
    if shift is not None:
        scale, shift = around_zero(scale, shift, kind)
        low = -shift
    row = (scale.amax(-1, keepdim=True) / top).to(ROW_DTYPE)
    divisor = torch.where(row == 0, torch.ones_like(row), row).float()
    codes = (scale / divisor).round_().clamp_(1, top).masked_fill_(scale == 0, 0)
    zeros = None
    if low is not None:
        rounded = codes * row.float()
        zeros = torch.where(rounded == 0, torch.zeros_like(rounded), -low / (rounded * zero_step(kind, zero_bits)))
        zeros = zeros.round_().clamp_(0, 2**zero_bits - 1).to(torch.uint8)
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


def expand_blocks(codes: torch.Tensor, numbers: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """float32 scales or shifts ``[..., G]`` of groups from those of blocks: ``number of the block * (code - offset)``.

    Args:
        codes: unpacked codes, ``[..., G]``.
        numbers: one for each block, ``[..., G / groups of a block]``. A float16 number times a code is exact in float32.
        offset: what is subtracted from codes that stand for negative numbers too.
    """
    blocks = numbers.shape[-1]
    wide = codes.to(torch.float32).unflatten(-1, (blocks, codes.shape[-1] // blocks))
    wide = wide.sub_(offset) if offset else wide
    return wide.mul_(numbers.to(torch.float32).unsqueeze(-1)).flatten(-2)


def stored_length(groups: int, bits: int) -> int:
    """Number of bytes for ``groups`` codes."""
    return groups if bits == 8 else packed_length(groups, bits)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The stored (packed) codes: uint8 ``[..., stored_length]``."""
    return codes if bits == 8 else pack(codes, bits)


def unpack_codes(stored: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    """The reverse of :func:`pack_codes`."""
    return stored if bits == 8 else unpack(stored.contiguous(), bits, groups)  # kernels may store them group-major
