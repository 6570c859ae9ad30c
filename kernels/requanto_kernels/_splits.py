"""The sum of a split GEMM in the same launch: the last program of a tile adds the parts of all, always in the same order.

Programs that share a tile write their fp32 part to a scratch buffer and count up the tile's counter; the one that counts
last reads all parts, in the order of the splits. So the same input gives the same bits, whichever program ends last, and
no second kernel is launched. (The fix-up of "Stream-K", Osama et al. 2023, without waiting.)

What makes the parts visible: the barrier orders the stores of all threads before the count of one of them, which releases
them to the device and acquires those of the programs before. The parts are read past the L1 cache, which is not coherent.
"""

import triton
import triton.language as tl


@triton.jit
def count_part(
    acc, work_ptr, counter_ptr, tile, split, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Stores this program's part of a tile; True for the program that must call `sum_parts`, the last of the tile.

    work: fp32 `[tiles, SPLITS, BLOCK_M, BLOCK_N]`. counter: int32 zeros, one a tile, which are zeros again at the end.
    """
    place = (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    part = work_ptr + (tile.to(tl.int64) * SPLITS + split) * (BLOCK_M * BLOCK_N)
    tl.store(part + place, acc)
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1


@triton.jit
def sum_parts(work_ptr, counter_ptr, tile, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum of all parts of a tile, `[BLOCK_M, BLOCK_N]` in fp32; sets its counter to zero."""
    place = (tl.arange(0, BLOCK_M) * BLOCK_N)[:, None] + tl.arange(0, BLOCK_N)[None, :]
    parts = work_ptr + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + place
    acc = tl.load(parts, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(parts + split * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    tl.store(counter_ptr + tile, 0)
    return acc
