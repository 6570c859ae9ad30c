"""What the weights of torchao's classes have in common: the column scale, and scales of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignWeight, Parts
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.foreign.torchao_entry import FLOATS, Entry, count_of
from requanto.checkpoint.format import CheckpointError
from requanto.tensor.spec import WeightSpec


def add_weight(
    entry: Entry,
    found: ForeignCheckpoint,
    spec: WeightSpec,
    build: Callable[[Source], Parts],
    note: str = "",
) -> None:
    """Enters a weight, with its column scale if it has one."""
    if entry.has("act_pre_scale"):
        length = spec.row_length
        shape = entry.shape("act_pre_scale", *FLOATS)
        if shape.numel() != length or shape[-1:] != (length,):
            entry.expect("act_pre_scale", (length,), *FLOATS)
        spec = spec.replace(column=True)
        build = functools.partial(_with_column, build, entry.tensor("act_pre_scale"), (*spec.lead[:-1], length))
    found.weights[entry.name] = ForeignWeight(spec.text(), entry.sources(), build, note)


def _with_column(build: Callable[[Source], Parts], name: str, shape: tuple[int, ...], source: Source) -> Parts:
    column = source[name].reshape(-1).expand(shape).contiguous()
    return {**build(source), "column": column}


def rows_and_groups(entry: Entry, shape: torch.Size, block: list[int]) -> tuple[int, int | None]:
    """Axis and group size of a weight whose blocks are the product of one size for each axis.

    Raises:
        CheckpointError: a scale belongs to weights that lie apart.
    """
    if len(shape) < 2:
        raise CheckpointError(f"{entry.name} is quantized and has the shape {tuple(shape)}, expected a matrix")
    # Three axes are experts, except for the weight of a one-dimensional convolution.
    axis = 1 if len(shape) == 3 and (entry.leaf != "weight" or block[1] != shape[1]) else 0
    inner, sizes = block[axis + 1 :], shape[axis + 1 :]
    if torch.Size(inner) == sizes:
        return axis, None
    if len(sizes) > 1:
        raise entry.wrong("block_size", "the same scale for a whole row of a convolution")
    return axis, inner[0]


def spread(scale: torch.Tensor, spec: WeightSpec, block: list[int]) -> torch.Tensor:
    """Numbers of blocks, one for each row and group: [*lead, groups]."""
    scale = scale.reshape(count_of(spec.shape, block))
    for axis in range(len(spec.lead)):
        scale = scale.repeat_interleave(block[axis], axis)
    return scale.reshape(*spec.lead, spec.groups).contiguous()
