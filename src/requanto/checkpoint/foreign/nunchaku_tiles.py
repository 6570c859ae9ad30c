"""Nunchaku's tensors, tiled for its CUDA kernels, back in rows and columns.

Read from the packers of mit-han-lab/deepcompressor and nunchaku-tech/nunchaku (``pack_weight``, ``pack_scale``,
``pack_micro_scale``, ``pack_lowrank_weight``, ``pack_w4``). N is a multiple of 128, K of 128. Row n is 128 t + 16 p + 8 h + l.

| tensor | stored as | axes |
|---|---|---|
| ``qweight`` int8 [N, K / 2] | words of 8 codes | t, k div 64, p, l, (k mod 32) div 8, h, (k mod 64) div 32 |
| ``wscales`` [K / 64, N]; vectors [N] or [K] | | t, group, p, (n mod 8) div 2, h, n mod 2 |
| ``wscales`` e4m3 [K / 16, N] | | t, k div 64, n mod 8, (n mod 32) div 8, (n mod 128) div 32, group mod 4 |
| ``proj_down`` [K, r], ``proj_up`` [N, r] | tiles of 16 x 16 | below |
| ``qweight`` int32 [N / 4, K / 2] of 16-bit layers | 4 nibbles in 16 bits | n div 4, k div 64, n mod 4, (k mod 64) div 32, k mod 8 |
"""  # noqa: E501  (a table)

from __future__ import annotations

import torch


def rows_of_codes(stored: torch.Tensor) -> torch.Tensor:
    """The bytes of our rows, uint8 ``[N, K / 2]``, from ``qweight`` int8 ``[N, K / 2]``."""
    rows, half = stored.shape
    words = stored.contiguous().view(torch.int32).reshape(rows // 128, half // 32, 8, 8, 4, 2, 2)
    # tile, p, h, l, then along the row: 64 columns, their half, four words of eight codes
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(rows, half // 4).view(torch.uint8)


def rows_of_scales(stored: torch.Tensor) -> torch.Tensor:
    """Scales ``[N, G]`` from ``wscales`` ``[G, N]`` of 16 bits."""
    groups, rows = stored.shape
    tiles = stored.reshape(rows // 128, groups, 8, 4, 2, 2)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def vector(stored: torch.Tensor) -> torch.Tensor:
    """One number for each row or column, in order."""
    return rows_of_scales(stored.reshape(1, -1)).reshape(-1)


def rows_of_small_scales(stored: torch.Tensor) -> torch.Tensor:
    """Scales ``[N, G]`` from ``wscales`` ``[G, N]`` of 8 bits."""
    groups, rows = stored.shape
    tiles = stored.reshape(rows // 128, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)


def up_factor(stored: torch.Tensor) -> torch.Tensor:
    """``[N, r]`` from ``proj_up``: tiles of 16 x 16; in each row mod 8, (column mod 8) div 2, both halves, column mod 2."""
    rows, rank = stored.shape
    tiles = stored.reshape(rows // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(rows, rank)


def down_factor(stored: torch.Tensor) -> torch.Tensor:
    """``[r, K]`` from ``proj_down`` ``[K, r]``: the same tiles, whose rows are those of the result."""
    length, rank = stored.shape
    tiles = stored.reshape(length // 16, rank // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, length)


def codes_of_words(stored: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[N, K]`` from ``qweight`` int32 ``[N / 4, K / 2]`` of a layer with 16-bit inputs."""
    blocks, half = stored.shape
    halves = stored.contiguous().view(torch.int16).reshape(blocks, half // 32, 4, 2, 8)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=stored.device)
    # nibble q of a number holds the code of column 8 q + its place
    codes = (halves.unsqueeze(-2) >> shifts.unsqueeze(-1)) & 0xF
    return codes.to(torch.uint8).permute(0, 2, 1, 3, 4, 5).reshape(blocks * 4, half * 2)
