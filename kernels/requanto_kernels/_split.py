"""The sum of a GEMM whose K is split over programs, in the launch that computes the parts.

The programs of one tile, on the second axis of the grid, each compute a part of K. Each stores its part in a workspace, then
counts itself at the tile's counter. The one that finds all others there adds the parts in their order: the same bits each
time, whichever program is last.
"""

import torch
import triton
import triton.language as tl

from ._counters import counters
from ._device import on_device


@triton.jit
def range_of_part(K, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """(first k, end) of this program's part of K, whole steps of BLOCK_K. SPLIT: whether the grid has a second axis."""
    if SPLIT:
        steps = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        return tl.program_id(1) * steps, min((tl.program_id(1) + 1) * steps, K)
    else:
        return 0, K


@triton.jit
def _places(work_ptr, tile, split, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    number = (tile * tl.num_programs(1) + split).to(tl.int64)
    cells = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return work_ptr + number * (ROWS * COLUMNS) + cells


@triton.jit
def store_part(work_ptr, tile, part):
    """Stores this program's part of the tile, `[ROWS, COLUMNS]` in the workspace's dtype."""
    tl.store(_places(work_ptr, tile, tl.program_id(1), part.shape[0], part.shape[1]), part)


@triton.jit
def is_last(count_ptr, tile):
    """Counts this program, whose parts are stored; True in the last one of the tile, which may read all parts."""
    tl.debug_barrier()  # the stores of all threads come before the count of one
    last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if last:
        tl.store(count_ptr + tile, 0)  # for the next launch
    return last


@triton.jit
def sum_of_parts(work_ptr, tile, like):
    """The sum of the tile's parts, in order, of the shape and dtype of `like`."""
    total = tl.zeros_like(like)
    for split in range(tl.num_programs(1)):
        total += tl.load(_places(work_ptr, tile, split, like.shape[0], like.shape[1]), cache_modifier=".cg")
    return total


def workspace(
    tiles: int, splits: int, cells: int, dtype: torch.dtype, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(workspace, counters) of a launch, on the device of `unused`, which stands for both if K is not split.

    cells: of one part.
    """
    if splits == 1:
        return unused, unused
    work = torch.empty(tiles * splits * cells, dtype=dtype, device=unused.device)
    with on_device(unused):  # the counters are those of this device's stream
        return work, counters(tiles, unused.device)


def grid_of(tiles: int, splits: int) -> tuple[int, ...]:
    return (tiles,) if splits == 1 else (tiles, splits)
