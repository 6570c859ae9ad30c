"""GGUF files: llama.cpp's format, of one file for everything.

Types that our format can hold (`gguf_blocks.TYPES`) stay quantized, bit for bit; F32, F16 and BF16 stay float; all others
are dequantized when they are read.

A file names tensors as llama.cpp does. Which weight of a model they are, and in which order its rows are, only the library
knows that has the model: see `integrations.gguf`. `scan` keeps the file's names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.gguf_blocks import TYPES
from requanto.checkpoint.foreign.gguf_header import TensorInfo
from requanto.checkpoint.foreign.gguf_source import GgufSource
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError, expected_parts, rebuild

#: metadata of image models: the shape of a weight that ComfyUI's converter stored in another one
_OTHER_SHAPE = "comfy.gguf.orig_shape."
#: bytes of blocks that are taken apart at once
_STEP = 2**22


@dataclass(frozen=True)
class Rows:
    """A weight as rows of stored tensors of one type.

    Attributes:
        sources: the tensors.
        shape: its stored shape: ``[N, K]``, of experts ``[E, N, K]``.
        index: int64 ``[number of rows]``: which row, counted through all sources, each row is; None: the same.
        transposed: True if the model has its last two axes swapped.
        order: int32 ``[K]``: which column of the weight each stored column is; None: the same.
    """

    sources: tuple[str, ...]
    shape: torch.Size
    index: torch.Tensor | None = None
    transposed: bool = False
    order: torch.Tensor | None = None


def stays_quantized(info: TensorInfo) -> bool:
    """Whether a stored tensor is one that our format holds: a matrix, or a stack of them, of a known type."""
    return info.type.name in TYPES and len(info.shape) in (2, 3)


def weight_of(source: GgufSource, rows: Rows) -> ForeignWeight:
    """A weight that stays quantized. All of its sources are of the same type."""
    blocks = TYPES[source.info(rows.sources[0]).type.name]
    properties = {"transposed": True} if rows.transposed else {}
    if rows.order is not None:
        properties["order"] = True
    text = blocks.line(rows.shape, len(rows.shape) - 2, **properties)
    return ForeignWeight(text, rows.sources, lambda _: parts_of(source, rows, text))


def parts_of(source: GgufSource, rows: Rows, text: str) -> Parts:
    """Makes the parts of a weight: in memory are they and some blocks, never the floats, nor a second copy of the codes.

    Args:
        text: its line.

    Raises:
        CheckpointError: the file is shorter than when it was opened.
    """
    lead = rows.shape[:-1]
    made: Parts = {}
    place = None if rows.index is None else _inverse(rows.index, sum(source.info(n).rows for n in rows.sources))
    begin = 0
    for name in rows.sources:
        info = source.info(name)
        blocks = TYPES[info.type.name]
        step = max(1, _STEP // max(1, info.row_bytes))
        for first in range(0, info.rows, step):
            last = min(info.rows, first + step)
            places = slice(begin + first, begin + last) if place is None else place[begin + first : begin + last]
            if place is not None and not bool((places >= 0).any()):
                continue
            found = blocks.parts(source.rows(name, first, last).unflatten(-1, (-1, blocks.size)))
            for part, values in found.items():
                if part not in made:
                    made[part] = values.new_empty(lead.numel(), *values.shape[1:])
                if place is None:
                    made[part][places] = values
                else:
                    taken = places >= 0
                    made[part][places[taken]] = values[taken]
        begin += info.rows
    made = {part: values.unflatten(0, tuple(lead)) for part, values in made.items()}
    made |= TYPES[source.info(rows.sources[0]).type.name].codebook
    if rows.order is not None:
        made["order"] = rows.order.expand(expected_parts(text, rows.sources[0])["order"][0]).contiguous()
    return made


def _inverse(index: torch.Tensor, count: int) -> torch.Tensor:
    """Where each of ``count`` stored rows goes; -1: nowhere."""
    place = torch.full((count,), -1, dtype=torch.int64, device="cpu")
    place[index] = torch.arange(index.numel(), dtype=torch.int64, device="cpu")
    return place


# ---------------------------------------------------------------------- floats


def float_of(source: GgufSource, name: str) -> torch.Tensor:
    """The values of a stored tensor: in its own dtype if it holds numbers, else dequantized to float32.

    Raises:
        CheckpointError: the package gguf, which knows the types that our format does not hold, is missing or too old.
    """
    info = source.info(name)
    if info.type.dtype is not None:
        return source[name]
    if info.type.name in TYPES:
        text = TYPES[info.type.name].line(torch.Size([info.rows, info.shape[-1]]))
        parts = parts_of(source, Rows((name,), torch.Size([info.rows, info.shape[-1]])), text)
        return rebuild(name, text, parts, torch.float32).dequantize().view(info.shape)
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise CheckpointError(
            f"{name} in {source.where(name)} is {info.type.name}, which only the package gguf dequantizes: pip install gguf"
        ) from error
    values = torch.empty((info.rows, info.shape[-1]), dtype=torch.float32, device="cpu")
    step = max(1, _STEP // max(1, info.row_bytes))
    try:
        kind = GGMLQuantizationType[info.type.name]
        for first in range(0, info.rows, step):
            last = min(info.rows, first + step)
            values[first:last] = torch.from_numpy(dequantize(source.rows(name, first, last).numpy(), kind))
    except (NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"{name} in {source.where(name)} is {info.type.name}, which this version of the package gguf cannot dequantize: "
            f"pip install -U gguf"
        ) from error
    return values.view(info.shape)


def floats_of(source: GgufSource, rows: Rows, shape: torch.Size) -> ForeignFloat:
    """A weight of rows that are stored as numbers, all of one dtype.

    Args:
        shape: the shape that the weight shows.
    """
    dtype = source.header(rows.sources[0]).dtype

    def build(_: Source) -> torch.Tensor:
        if rows.index is None and len(rows.sources) == 1:
            found = source[rows.sources[0]]
        else:
            stored = torch.cat([source.rows(name) for name in rows.sources])
            found = stored[rows.index].view(dtype) if rows.index is not None else stored.view(dtype)
        found = found.view(rows.shape)
        return found.transpose(-1, -2).contiguous() if rows.transposed else found

    return ForeignFloat(shape, dtype, rows.sources, build)


def dequantized(
    names: tuple[str, ...], shape: torch.Size, build: Callable[[], torch.Tensor], reason: str = ""
) -> ForeignFloat:
    """A float32 weight that is made of the values of stored tensors.

    Args:
        names: the tensors.
        shape: the shape that the weight shows.
        build: makes it.
        reason: why it does not stay quantized, for the log; empty if it is stored as numbers.
    """
    return ForeignFloat(shape, torch.float32, names, lambda _: build(), reason)


def reason_of(source: GgufSource, names: tuple[str, ...]) -> str:
    """Why a weight that is made of these tensors cannot stay quantized because of how they are stored; else empty."""
    kinds = {source.info(name).type.name for name in names}
    others = Counter(
        info.type.name for info in source.tensors.values() if info.type.dtype is None and info.type.name not in TYPES
    )
    if kinds & others.keys():
        held = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        return f"Requanto's format does not hold some types of GGUF, of which the file has {held}"
    if len(kinds) > 1:
        return f"it is one weight, of which the file has parts in {' and '.join(sorted(kinds))}"
    axes = {len(source.info(name).shape) for name in names if not stays_quantized(source.info(name))}
    return f"{axes.pop()} axes are neither a matrix nor a stack of matrices" if axes else ""


def described(source: GgufSource) -> str:
    """The file in a user's words: architecture and how many tensors there are of each type."""
    counts = Counter(info.type.name for info in source.tensors.values())
    kinds = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return f"GGUF, {source.architecture or 'unknown architecture'}: {kinds}"


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """What is in the file, under the file's own names.

    Raises:
        CheckpointError: ``source`` is no `GgufSource`.
    """
    if not isinstance(source, GgufSource):
        raise CheckpointError("quant_method 'gguf' is that of a .gguf file, and these are tensors of other files")
    found = ForeignCheckpoint(described(source))
    for name, info in source.tensors.items():
        shape = source.fields.get(f"{_OTHER_SHAPE}{name}")
        if shape is not None and torch.Size(shape) != info.shape:
            found.floats[name] = _reshaped(source, name, torch.Size(shape))
        elif stays_quantized(info):
            found.weights[name] = weight_of(source, Rows((name,), info.shape))
        elif info.type.dtype is None:
            found.floats[name] = dequantized(
                (name,), info.shape, lambda name=name: float_of(source, name), reason_of(source, (name,))
            )
    return found


def _reshaped(source: GgufSource, name: str, shape: torch.Size) -> ForeignFloat:
    """A tensor whose rows are not those of the model's weight, but runs of whole blocks."""
    info = source.info(name)
    if shape.numel() != info.shape.numel():
        raise CheckpointError(
            f"{_OTHER_SHAPE}{name} in {source.where(name)} is {tuple(shape)}, but the tensor has shape {tuple(info.shape)}"
        )
    reason = "" if info.type.dtype is not None else "it is stored in another shape, whose rows are not the weight's"
    dtype = info.type.dtype or torch.float32
    return ForeignFloat(shape, dtype, (name,), lambda _: float_of(source, name).view(shape), reason)
