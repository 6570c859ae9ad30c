"""4-bit codes in the order of PyTorch's CUDA kernel ``_weight_int4pack_mm``, back in rows.

A word of 32 bits holds eight codes of one row for one lane t of a warp, t div 4 being the row in a tile of eight. From the
lowest nibble on, they are those of columns k, k + 8, k + 16, k + 24, k + 1, k + 9, k + 17, k + 25, k being 2 (t mod 4) in a
run of 32 columns. (PyTorch, aten/src/ATen/native/cuda/int4mm.cu, ``matrix_to_m16n8k16_Bint4_layout``. AMD's GPUs have
another order, in tensors of the same shape.)
"""

from __future__ import annotations

import torch


def codes_of_tiles(stored: torch.Tensor) -> torch.Tensor:
    """The codes of a matrix.

    Args:
        stored: int32 ``[..., N / 8, K / (32 w), 32, w]``, w words of a lane one after the other (1, 2 or 4).

    Returns:
        uint8 ``[..., N, K]``.
    """
    *lead, tiles, runs, _, words = stored.shape
    # low and high nibble of each byte: nibble 2j and 2j + 1 of a word
    low_first = stored.contiguous().view(torch.uint8).reshape(*lead, tiles, runs, 8, 4, words, 4)
    nibbles = torch.stack((low_first & 0xF, low_first >> 4), dim=-1)
    # nibble = 4 (column mod 2) + (column mod 32) div 8: byte = 2 (column mod 2) + that div 2
    nibbles = nibbles.reshape(*lead, tiles, runs, 8, 4, words, 2, 4)
    # row tile, row, run, word, (column mod 32) div 8, pair of columns, column mod 2
    first = len(lead)
    order = [*range(first), *(first + axis for axis in (0, 2, 1, 4, 6, 3, 5))]
    return nibbles.permute(order).reshape(*lead, tiles * 8, runs * words * 32)
