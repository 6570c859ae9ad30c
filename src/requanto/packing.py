"""Sub-byte codes <-> bytes.

Codes lie next to each other along the last axis, low bits first: a 4-bit byte holds code 2k in its low nibble and code
2k+1 in its high one. A last axis that does not fill its last byte is padded with zero codes, dropped on unpacking.
"""

from __future__ import annotations

import torch


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
    lanes = codes.unflatten(-1, (-1, per_byte))
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The reverse of :func:`pack`: uint8 ``[..., length]``."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, found {packed.dtype}")
    per_byte = 8 // bits
    mask = 2**bits - 1
    lanes = torch.stack([(packed >> (bits * lane)) & mask for lane in range(per_byte)], dim=-1)
    return lanes.flatten(-2)[..., :length]
