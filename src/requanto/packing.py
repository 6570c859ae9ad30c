"""Sub-byte codes <-> bytes.

Codes lie next to each other along the last axis, low bits first: a 4-bit byte holds code 2k in its low nibble and code
2k+1 in its high one. A last axis that does not fill its last byte is padded with zero codes, dropped on unpacking.
"""

from __future__ import annotations

import torch

# integer as wide as the unpacked codes of one byte
_WORDS = {2: torch.int16, 4: torch.int32}


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits (2 or 4) take."""
    per_byte = 8 // bits
    return -(-length // per_byte)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs unsigned codes.

    Args:
        codes: uint8 ``[..., K]``, each in ``0 .. 2^bits - 1``.
        bits: 2 or 4.

    Returns:
        uint8 ``[..., ceil(K * bits / 8)]``.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes to pack must be uint8, found {codes.dtype}")
    if bits not in (2, 4):
        raise ValueError(f"only 2 and 4 bit codes are packed, found bits={bits}")
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    if codes.numel() == 0:
        return codes.new_empty(*codes.shape[:-1], codes.shape[-1] // per_byte)
    # The codes of one byte are read as one little-endian word (code i at bit 8i) and slid together to bit bits*i: one
    # pass over contiguous words, where picking every second or fourth code apart would be several strided ones.
    word = codes.contiguous().view(_WORDS[per_byte])
    packed = word.clone()
    for lane in range(1, per_byte):
        packed |= word >> ((8 - bits) * lane)
    return packed.to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The reverse of :func:`pack`: uint8 ``[..., length]``."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, found {packed.dtype}")
    per_byte = 8 // bits
    if packed.numel() == 0:
        return packed.new_empty(*packed.shape[:-1], length)
    word = packed.to(_WORDS[per_byte])
    spread = word.clone()
    for lane in range(1, per_byte):
        spread |= word << ((8 - bits) * lane)
    # One code in the low bits of every byte of the word.
    spread &= sum((2**bits - 1) << (8 * lane) for lane in range(per_byte))
    return spread.view(torch.uint8)[..., :length]
