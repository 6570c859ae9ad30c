"""The sum of a GEMM whose K is split over programs, in the launch that computes the parts.

The programs of one tile, on the second axis of the grid, each compute a part of K. Each stores its part in a workspace, then
counts itself at the tile's counter. The one that finds all others there adds the parts in their order: the same bits each
time, whichever program is last. No program waits for another, so any order of programs and any number of them at a time is
right. (The "split-K" of Osama et al. 2023, "Stream-K".)

**Order of memory.** A part is stored by all threads of a program, then a barrier, then one thread counts by an atomic
operation of acquire-release order at the scope of the device: it publishes all stores before the barrier. The last program's
operation follows those of the others, so after it (and the barrier by which its result reaches all threads) all parts are
visible. They are read past the L1 cache.

**Counters need no zeroed memory.** A buffer of counters that outlives a launch is right only while launches that use it
never run at the same time: not with several streams, nor with CUDA graphs, which are captured on one stream and replayed on
others. Memory that a call allocates is right in all of these: PyTorch's allocator gives it to one stream, or to one graph,
until the launch is over. But it is not zeroed, and zeroing it would be a second launch. So a counter is a 64-bit word with
MARK in its high 48 bits; any other word counts as 0. Memory contains MARK by chance once in 2^48 words, and not from an
earlier launch, since the last program clears its counter. The first guess of a program is 0: what the launch before left in
the same memory.
"""

import torch
import triton
import triton.language as tl
from triton.language.target_info import current_target

#: Marks a word as a counter: 47 bits of the golden ratio, which no other code should store.
MARK = tl.constexpr(0x5E3779B97F4A)


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
def _count(counter_ptr):
    """Adds one to a counter, and returns the new count."""
    # The first guess must be the same for all threads: only what an atomic operation returns is.
    seen = tl.atomic_cas(counter_ptr, tl.cast(0, tl.int64), tl.cast((MARK << 16) + 1, tl.int64), sem="acq_rel")
    count = tl.cast(1, tl.int64)
    done = seen == 0
    while not done:
        count = tl.where((seen >> 16) == MARK, seen & 0xFFFF, 0) + 1
        found = tl.atomic_cas(counter_ptr, seen, (tl.cast(MARK, tl.int64) << 16) + count, sem="acq_rel")
        done = found == seen
        seen = found
    return count


@triton.constexpr_function
def barrier_waits_for_no_store() -> bool:
    """True on AMD's CDNA GPUs (gfx9): the thread that counts would publish the stores of its own wave only.

    On newer ones Triton's barrier waits for stores, and NVIDIA's memory model has releases publish what a barrier ordered.
    """
    target = current_target()
    return target is not None and target.backend == "hip" and str(target.arch).startswith("gfx9")


@triton.jit
def is_last(count_ptr, tile):
    """Counts this program, whose parts are stored; True in the last one of the tile, which may read all parts."""
    if barrier_waits_for_no_store():
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v", [tl.arange(0, 64)], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip
    tl.debug_barrier()  # the stores of all threads come before the count of one
    last = _count(count_ptr + tile) == tl.num_programs(1)
    if last:
        tl.store(count_ptr + tile, tl.cast(0, tl.int64))  # for the next launch in this memory
    return last


@triton.jit
def sum_of_parts(work_ptr, tile, like):
    """The sum of the tile's parts, in order, of the shape and dtype of `like`."""
    total = tl.zeros_like(like)
    for split in range(tl.num_programs(1)):
        total += tl.load(_places(work_ptr, tile, split, like.shape[0], like.shape[1]), cache_modifier=".cg")
    return total


@triton.jit
def add_rows(
    acc, work_ptr, count_ptr, tile, m0, M, n0, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(whether this program is the tile's last, the sum of all parts if so), for tiles of which few rows exist.

    acc: this program's part of the `[M, N]` at (m0, n0). work_ptr: fp32 `[splits, M, N]`.
    """
    rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    part = work_ptr + (rm.to(tl.int64)[:, None] * N + rn[None, :])
    size = tl.cast(M, tl.int64) * N
    tl.store(part + tl.program_id(1) * size, acc, mask=mask)
    last = is_last(count_ptr, tile)
    if last:
        acc = tl.load(part, mask=mask, other=0, cache_modifier=".cg")
        for other in tl.range(1, tl.num_programs(1), loop_unroll_factor=4):
            acc += tl.load(part + other * size, mask=mask, other=0, cache_modifier=".cg")
    return last, acc


def workspace(
    tiles: int, splits: int, size: int, dtype: torch.dtype, unused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(workspace, counters) of a launch, on the device of `unused`, which stands for both if K is not split.

    size: elements of one part of the whole result.
    """
    if splits == 1:
        return unused, unused
    work = torch.empty(splits * size, dtype=dtype, device=unused.device)
    return work, torch.empty(tiles, dtype=torch.int64, device=unused.device)


def slices(k: int, block_k: int, wanted: int) -> tuple[int, int]:
    """(slices of K, steps of block_k in each), at most as many slices as wanted and none of them empty."""
    steps = -(-k // block_k)
    per_slice = -(-steps // wanted)
    return -(-steps // per_slice), per_slice


def grid_of(tiles: int, splits: int) -> tuple[int, ...]:
    return (tiles,) if splits == 1 else (tiles, splits)
