"""float8 weights with one scale for a tensor, for each row, or for blocks of rows and columns.

    value = scale * code, computed in float32

A block of our form has one row, so scales are repeated over the rows of a block. The last block may be smaller. If blocks
do not divide the rows' length, smaller groups that divide both do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from requanto.checkpoint.foreign.found import ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.pieces import float_scale, line, per_row, power_of_two, unfit
from requanto.checkpoint.foreign.source import Source

#: stored dtype -> our types: with float scales, and with powers of two for groups
KINDS = {
    torch.float8_e4m3fn: ("qfloat8_e4m3fn", "qmxfp8_e4m3"),
    torch.float8_e5m2: ("qfloat8_e5m2", "qmxfp8_e5m2"),
    torch.float8_e4m3fnuz: ("qfloat8_e4m3fnuz", ""),
}
#: dtypes of a scale that is a power of two
POWERS = (torch.uint8, torch.float8_e8m0fnu)
SCALES = (torch.float32, torch.bfloat16, torch.float16, *POWERS)
#: With smaller groups scales would take more bytes than a weight in 16 bits saves.
SMALLEST_GROUP = 8


def float8_weight(
    source: Source,
    name: str,
    scale: str,
    block: tuple[int, int] | None = None,
    *,
    also: Sequence[str] = (),
    activation: str = "",
    transposed: bool = False,
    note: str = "",
) -> ForeignWeight | ForeignFloat:
    """Describes a float8 weight ``[N, K]`` or ``[E, N, K]``.

    Args:
        name: the stored codes, under the weight's own name.
        scale: the stored scales: one number, one for each row, or one for each block.
        block: rows and columns of a block; None: there are none.
        also: further tensors that are not loaded.
        activation: type of the inputs, quantized on the fly; empty: they stay float.
        transposed: the experts are stored ``[E, K, N]``; scales have one number for each of the N.
        note: see `ForeignWeight`.

    Raises:
        CheckpointError: a tensor is missing, or shapes do not fit.
    """
    shape, dtype = source.need(name, name)
    if dtype not in KINDS or len(shape) not in (2, 3):
        raise unfit(name, source.header(name), "float8 with 2 axes, or 3 of experts")
    found = source.need(scale, name)
    stored = torch.Size([*shape[:-2], shape[-1], shape[-2]]) if transposed else shape
    lead, (rows, length) = stored[:-1], stored[-2:]
    sources = (name, scale, *also)
    if found.dtype not in SCALES:
        raise unfit(scale, found, "scales in float32, bfloat16, float16 or e8m0")
    words = (
        f"axis={len(stored) - 2}" if len(stored) > 2 else "",
        "transposed" if transposed else "",
        f"activation={activation}" if activation else "",
    )
    if found.shape.numel() == 1 or tuple(found.shape) in _row_scales(lead):
        build = functools.partial(_by_rows, name=name, scale=scale, lead=lead, transposed=transposed)
        return ForeignWeight(line(name, KINDS[dtype][0], shape, *words), sources, build, note)
    seen = found.shape
    if len(shape) == 2 and len(seen) == 4 and seen[1] == seen[3] == 1:  # as ModelOpt's quantizer has blocks
        seen = torch.Size([seen[0], seen[2]])
    grid = None if block is None or transposed else _grid(seen, stored, block)
    if block is None or grid is None:
        wanted = "" if block is None else f", or blocks of {block[0]}x{block[1]}: {_blocks(stored, block)}"
        raise unfit(scale, found, f"one scale for {name} {tuple(shape)}, one for each row ({rows}){wanted}")
    group = math.gcd(block[1], length)
    build = functools.partial(_by_blocks, name=name, scale=scale, seen=seen, grid=grid, group=group, columns=block[1])
    if group < SMALLEST_GROUP:
        dense = functools.partial(_dense, build=build, group=group)
        reason = f"blocks of {block[1]} columns do not divide rows of {length} into groups of {SMALLEST_GROUP} or more"
        return ForeignFloat(shape, torch.float32, sources, dense, reason)
    if found.dtype in POWERS and block[0] == 1 and length % block[1] == 0 and KINDS[dtype][1]:
        build = functools.partial(_microscaled, name=name, scale=scale)
        return ForeignWeight(line(name, KINDS[dtype][1], shape, *words, group=group), sources, build, note)
    text = line(name, KINDS[dtype][0], shape, *words, group=group if group < length else None)
    return ForeignWeight(text, sources, build, note)


def _row_scales(lead: torch.Size) -> set[tuple[int, ...]]:
    """Shapes of scales that belong to whole rows, or to whole experts."""
    experts = (
        {(*lead[:-1],), (*lead[:-1], 1), (*lead[:-1], 1, 1), (*lead[:-1], 1, lead[-1])} if len(lead) > 1 else set()
    )
    return {(*lead,), (*lead, 1)} | experts


def _blocks(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _grid(scales: torch.Size, shape: torch.Size, block: tuple[int, int]) -> tuple[int, int] | None:
    """Which row of scales a row has, as (rows of a run, rows of a block); None if the scales have another shape.

    Projections that were joined (``gate_up_proj``) begin a block of their own.
    """
    if tuple(scales) == _blocks(shape, block):
        return (shape[-2], block[0])
    half = (*shape[:-2], shape[-2] // 2, shape[-1])
    rows, columns = _blocks(half, block)[-2:]
    if len(shape) == 3 and shape[-2] % 2 == 0 and tuple(scales) == (*shape[:-2], 2 * rows, columns):
        return (half[-2], block[0])
    return None


def _scale(source: Source, name: str) -> torch.Tensor:
    stored = source[name]
    return power_of_two(stored) if stored.dtype in POWERS else float_scale(stored)


def _by_rows(source: Source, name: str, scale: str, lead: torch.Size, transposed: bool) -> Parts:
    codes = source[name]
    codes = codes.transpose(-1, -2).contiguous() if transposed else codes
    return {"qdata": codes, "scale": per_row(_scale(source, scale), lead)}


def _by_blocks(
    source: Source, name: str, scale: str, seen: torch.Size, grid: tuple[int, int], group: int, columns: int
) -> Parts:
    codes, scales = source[name], _scale(source, scale).reshape(seen)
    rows, length = codes.shape[-2:]
    run, block = grid
    row = torch.arange(rows, device=scales.device)
    row = row // run * -(-run // block) + row % run // block
    column = torch.arange(length // group, device=scales.device) * group // columns
    return {"qdata": codes, "scale": scales.index_select(-2, row).index_select(-1, column)}


def _microscaled(source: Source, name: str, scale: str) -> Parts:
    return {"qdata": source[name], "scale": source[scale].view(torch.uint8)}


def _dense(source: Source, build: functools.partial[Parts], group: int) -> torch.Tensor:
    parts = build(source)
    values = parts["qdata"].to(torch.float32).unflatten(-1, (-1, group))
    return (values * parts["scale"].to(torch.float32).unsqueeze(-1)).flatten(-2)
