"""How a weight is multiplied with a tile: depth, slots, and where scales are applied. `_accumulate.py` explains the forms.

Chosen by the size of what a thread must hold, from instruction counts of compiled kernels; nothing was timed.
"""

from dataclasses import dataclass

from . import _check as check
from .config import Config

#: Most columns that a tile of few rows is laid out in for slots; most results of a thread, of which "after" has two sets.
MOST_COLUMNS = 64
MOST_RESULTS = 64
#: Most rows of a tile for whose sums, which a shift needs, "after" costs less than "before".
MOST_ROWS_WITH_SHIFT = 16
#: Least columns of a matrix instruction: of tiles of up to 8 rows, which only ship for NVIDIA's GPUs, and of others.
LEAST_COLUMNS = 8, 16


@dataclass(frozen=True)
class Form:
    """Arguments of `accumulate`: BLOCK_M, BLOCK_K, DEPTH, SLOTS, SCALE, BY_FIELD."""

    block_m: int
    block_k: int
    depth: int
    slots: int
    scale: str
    fields: bool


def form_of(weight: check.Weight, config: Config, m: int | None = None) -> Form:
    """The form for m rows of x; None: unknown, or rows that the config's block_m fits."""
    block_k, group = config.block_k, weight.group
    block = check.exec_block(weight.bits) if weight.exec else 1
    fields = weight.exec and config.fields and (group == 0 or group % 32 == 0 or group in (16, 8))
    if fields:
        block_k = block
    elif weight.exec:
        block_k = max(block_k, block)
    elif weight.bits < 8:
        # Joining bytes needs a tile's codes in registers twice; half the depth avoids spills.
        block_k = min(block_k, 64)
    depth = 32 if fields else block_k
    if group == 0:
        return Form(config.block_m, block_k, depth, 1, "end", fields)
    results = config.block_n * config.block_m // (32 * config.num_warps)
    most_rows = config.block_m if weight.shift is None else MOST_ROWS_WITH_SHIFT
    fits = results <= MOST_RESULTS and config.block_m <= most_rows
    if fields:
        after = group % depth == 0 and fits
        return Form(config.block_m, block_k, depth, 1, "after" if after else "before", True)
    if group % block_k == 0:
        return Form(config.block_m, block_k, depth, 1, "after" if fits else "before", False)
    if block_k % group == 0:
        slots = block_k // group
        rows = config.block_m if m is None else min(config.block_m, 1 << (m - 1).bit_length())
        rows = max(rows, LEAST_COLUMNS[config.block_m > 8] // slots)
        if slots * rows <= MOST_COLUMNS and rows <= config.block_m and rows <= most_rows:
            return Form(rows, block_k, depth, slots, "after", False)
    return Form(config.block_m, block_k, depth, 1, "before", False)
