"""The order of codes in strips, in torch operators: what `rq_pack`, `rq_unpack` and `rq_codes` of the C library compute.

For machines without the library, on which a weight is opened that was packed elsewhere, and for fake tensors. The order is
described in requanto_cpu/csrc/requanto_cpu.h.
"""

from __future__ import annotations

import torch

#: Rows of a strip, and columns of a unit.
ROWS, COLUMNS = 16, 32
#: The sizes of the planes that codes of so many bits consist of.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def padded(rows: int, length: int) -> tuple[int, int]:
    """N and K of a matrix in strips, with the padding."""
    return -(-rows // ROWS) * ROWS, -(-length // COLUMNS) * COLUMNS


def to_strips(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Strips uint8 ``[N / 16, K / 32 * bits * 64]`` of codes uint8 ``[N, K]``, N and K without padding."""
    rows, length = codes.shape
    whole_rows, whole_length = padded(rows, length)
    if (whole_rows, whole_length) != (rows, length):
        codes = torch.nn.functional.pad(codes, (0, whole_length - length, 0, whole_rows - rows))
    strips, units = whole_rows // ROWS, whole_length // COLUMNS
    planes, below = [], 0
    for size in PLANES[bits]:
        part = (codes >> below) & (2**size - 1)
        # Column 4 q + j of a unit, q = v * per_byte + t: code t of byte 4 r + j of vector v.
        per_byte = 8 // size
        split = part.view(strips, ROWS, units, size, per_byte, 4).permute(0, 2, 3, 1, 5, 4)
        packed = split[..., 0].clone()
        for code in range(1, per_byte):
            packed |= split[..., code] << (size * code)
        planes.append(packed.reshape(strips, units, size * 64))
        below += size
    return torch.cat(planes, 2).view(strips, units * bits * 64)


def from_strips(strips: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The reverse of `to_strips`: uint8 ``[16 * strips, length]``, padding rows included."""
    count, units = strips.shape[0], -(-length // COLUMNS)
    vectors = strips.reshape(count, units, bits * 64)
    codes, below, begin = None, 0, 0
    for size in PLANES[bits]:
        per_byte = 8 // size
        plane = vectors[:, :, begin : begin + size * 64].reshape(count, units, size, ROWS, 4)
        shifted = torch.stack([(plane >> (size * code)) & (2**size - 1) for code in range(per_byte)], 3)
        part = shifted.permute(0, 4, 1, 2, 3, 5).reshape(count * ROWS, units * COLUMNS) << below
        codes = part if codes is None else codes | part
        below, begin = below + size, begin + size * 64
    assert codes is not None
    return codes[:, :length]


def rows_of_strips(strips: torch.Tensor, bits: int, length: int, index: torch.Tensor) -> torch.Tensor:
    """Codes uint8 ``[len(index), length]`` of the rows ``index`` (int64)."""
    found = from_strips(strips[torch.div(index, ROWS, rounding_mode="floor")], bits, length)
    lanes = torch.arange(len(index), device=index.device, dtype=torch.int64) * ROWS + index % ROWS
    return found[lanes]
