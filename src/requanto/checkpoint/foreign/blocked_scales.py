"""Block scales in the order of Blackwell's tensor cores, and back.

A matrix of scales [N, G] is padded to blocks of 128 x 4, which are stored one after the other. In a block scale (r, c) is
element (r mod 32) * 16 + (r div 32) * 4 + c: four rows that lie 32 apart are next to each other. (cuBLAS documentation,
"1D Block Scaling Factors Layout".)
"""

from __future__ import annotations

import torch

ROWS, COLUMNS = 128, 4


def blocked_numel(rows: int, columns: int) -> int:
    """Number of stored scales for a matrix of them."""
    return -(-rows // ROWS) * ROWS * (-(-columns // COLUMNS) * COLUMNS)


def plain_scales(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The matrix [rows, columns] of blocked scales.

    Args:
        stored: `blocked_numel` scales, of any shape.
    """
    down, across = -(-rows // ROWS), -(-columns // COLUMNS)
    # block row, block column, r mod 32, r div 32, c
    blocks = stored.reshape(down, across, 32, ROWS // 32, COLUMNS)
    matrix = blocks.permute(0, 3, 2, 1, 4).reshape(down * ROWS, across * COLUMNS)
    return matrix[:rows, :columns].contiguous()
