"""Sums over K that several programs share, in one launch and in a fixed order: the same input gives the same bits.

Each program of a tile writes its part to an fp32 workspace and counts itself; the one that counts to `splits` adds all parts
(its own is read back, too), part 0 first, and goes on with the sum. No program waits for another, so any order of programs
and any number of them at a time is right. (The "split-K" of Osama et al. 2023, "Stream-K".)

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

import triton
import triton.language as tl

#: Marks a word as a counter; 48 bits of the golden ratio, which no other code should store.
MARK = tl.constexpr(0x5E3779B97F4A)


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


@triton.jit
def add_parts(
    acc, work_ptr, tile, tiles, split, splits, m0, M, n0, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(whether this program is the tile's last, the sum over all splits if so). acc: this program's part.

    work_ptr: fp32, aligned to 8 bytes: a counter of two words for each of `tiles`, then `[splits, M, N]`.
    """
    rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    part = work_ptr + 2 * tiles + (rm.to(tl.int64)[:, None] * N + rn[None, :])
    size = tl.cast(M, tl.int64) * N
    tl.store(part + split * size, acc, mask=mask)
    tl.debug_barrier()
    counter_ptr = work_ptr.to(tl.pointer_type(tl.int64)) + tile
    last = _count(counter_ptr) == splits
    if last:
        tl.store(counter_ptr, tl.cast(0, tl.int64))
        acc = tl.load(part, mask=mask, other=0, cache_modifier=".cg")
        for other in tl.range(1, splits, loop_unroll_factor=4):
            acc += tl.load(part + other * size, mask=mask, other=0, cache_modifier=".cg")
    return last, acc


def workspace_size(tiles: int, splits: int, m: int, n: int) -> int:
    """Floats that `add_parts` needs; 0 if there is nothing to share."""
    return 2 * tiles + splits * m * n if splits > 1 else 0
