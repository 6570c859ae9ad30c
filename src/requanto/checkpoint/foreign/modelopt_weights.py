"""Weights of ModelOpt's algorithms (see `modelopt`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from requanto.checkpoint.foreign.float8 import float8_weight
from requanto.checkpoint.foreign.found import ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.packing import packed_rows
from requanto.checkpoint.foreign.pieces import FLOATS, joined, line, per_row, unfit
from requanto.checkpoint.foreign.small_floats import mx_weight, nvfp4_weight
from requanto.checkpoint.foreign.source import Header, Source
from requanto.checkpoint.format import CheckpointError, read_spec

#: the low-rank term B A, under its two names
_LOW_RANK = (
    ("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b"),
    ("svdquant_lora_a", "svdquant_lora_b"),
)


@dataclass(frozen=True)
class Layer:
    """A quantized layer.

    Attributes:
        module: its name.
        algorithm: ModelOpt's name.
        parts: last parts of the names of its tensors.
        group: group size of the config, if it has one.
    """

    module: str
    algorithm: str
    parts: set[str]
    group: int | None

    def __call__(self, part: str) -> str:
        """The name of one of its tensors."""
        return joined(self.module, part)


def weight_of(source: Source, layer: Layer, activation: str, note: str) -> ForeignWeight | ForeignFloat:
    """Describes a layer's weight, without its pre_quant_scale and low-rank term.

    Raises:
        CheckpointError: the tensors are not those of the algorithm.
    """
    name, algorithm = layer("weight"), layer.algorithm
    stored = source.header(name)
    if algorithm == "BFL":
        algorithm = "NVFP4" if stored.dtype == torch.uint8 else "FP8_PER_CHANNEL_PER_TOKEN"
        note = note if algorithm == "NVFP4" else ""
        activation = "" if algorithm == "NVFP4" else "qfloat8_e4m3fn"
    wanted = {
        **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "MXFP8"), torch.float8_e4m3fn),
        **dict.fromkeys(("W8A8_SQ_PER_CHANNEL", "W8A16"), torch.int8),
    }.get(algorithm, torch.uint8)
    if stored.dtype != wanted:
        raise unfit(name, stored, f"{str(wanted).removeprefix('torch.')} for {algorithm}")
    if "NVFP4" in algorithm:
        factor = layer("weight_scale_2")
        return nvfp4_weight(source, name, name, layer("weight_scale"), factor, group=layer.group or 16, note=note)
    if algorithm == "MXFP8":
        return mx_weight(source, name, "qmxfp8_e4m3", name, layer("weight_scale"), note=note)
    if "MXFP4" in algorithm:
        return mx_weight(source, name, "qmxfp4", name, layer("weight_scale"), note=note)
    if algorithm == "W4A16_AWQ":
        return _int4(source, layer, stored, note)
    if wanted == torch.int8:
        return _int8(source, layer, stored, activation, note)
    return _float8(source, layer, stored, activation, note)


def _float8(source: Source, layer: Layer, stored: Header, activation: str, note: str) -> ForeignWeight | ForeignFloat:
    name, scale = layer("weight"), layer("weight_scale")
    if not layer.algorithm.startswith("FP8_PB"):
        return float8_weight(source, name, scale, activation=activation, note=note)
    size = layer.group or 128
    return float8_weight(source, name, scale, (size, size), note=note)


def _int8(source: Source, layer: Layer, stored: Header, activation: str, note: str) -> ForeignWeight:
    name, scale = layer("weight"), layer("weight_scale")
    if len(stored.shape) != 2:
        raise unfit(name, stored, "a matrix")
    found = source.need(scale, name)
    if found.dtype not in FLOATS or found.shape not in ((), (1,), (stored.shape[0],), (stored.shape[0], 1)):
        raise unfit(scale, found, f"one scale for each of {stored.shape[0]} rows")
    text = line(name, "qint8", stored.shape, f"activation={activation}" if activation else "")
    build = functools.partial(_int8_parts, name=name, scale=scale, rows=stored.shape[0])
    return ForeignWeight(text, (name, scale), build, note)


def _int8_parts(source: Source, name: str, scale: str, rows: int) -> Parts:
    return {"qdata": source[name], "scale": per_row(source[scale], (rows,))}


def _int4(source: Source, layer: Layer, stored: Header, note: str) -> ForeignWeight:
    name, scale = layer("weight"), layer("weight_scale")
    group = layer.group or 128
    if len(stored.shape) != 2 or stored.shape[1] % group:
        raise unfit(name, stored, f"uint8 [rows / 2, K] for a K that is a multiple of {group}")
    rows, length = stored.shape[0] * 2, stored.shape[1]
    source.need_shape(scale, name, (rows, length // group), *FLOATS)
    text = line(name, "qint4", (rows, length), group=group if group < length else None)
    return ForeignWeight(text, (name, scale), functools.partial(_int4_parts, name=name, scale=scale), note)


def _int4_parts(source: Source, name: str, scale: str) -> Parts:
    stored = source[name]
    # A byte has codes of two rows, in two's complement: code + 8 is the code with its highest bit turned.
    codes = torch.stack((stored & 0xF, stored >> 4), 1).flatten(0, 1) ^ 8
    return {"qdata": packed_rows(codes, 4), "scale": source[scale]}


def smoothed(source: Source, layer: Layer, weight: ForeignWeight) -> ForeignWeight:
    """The weight with what its inputs are multiplied by, and its low-rank term.

    y = W (p x) + B A (p x), for the pre_quant_scale p: our column scale, and a low-rank term of B and A p.

    Raises:
        CheckpointError: one of the tensors is missing or has another shape.
    """
    name, scale = layer("weight"), layer("pre_quant_scale")
    low_rank = next((pair for pair in _LOW_RANK if any(layer(part) in source for part in pair)), None)
    if "pre_quant_scale" not in layer.parts and low_rank is None:
        return weight
    spec, _ = read_spec(weight.text, name)
    rows, length = spec.matrix_shape
    words, also = "", []
    if "pre_quant_scale" in layer.parts:
        source.need_shape(scale, name, (length,), *FLOATS)
        words, also = " columns", [scale]
    if low_rank is not None:
        first, second = (layer(part) for part in low_rank)
        rank = source.need(first, name).shape[0]
        source.need_shape(first, name, (rank, length), *FLOATS)
        source.need_shape(second, name, (rows, rank), *FLOATS)
        words, also = f" rank={rank}{words}", [*also, first, second]
    if spec.axis:
        raise CheckpointError(f"{name} is one of several experts with {scale}, which this Requanto does not read")
    build = functools.partial(_smoothed, build=weight.build, layer=layer, low_rank=low_rank)
    return replace(weight, text=weight.text + words, sources=(*weight.sources, *also), build=build)


def _smoothed(
    source: Source, build: Callable[[Source], Parts], layer: Layer, low_rank: tuple[str, str] | None
) -> Parts:
    parts = dict(build(source))
    column = source[layer("pre_quant_scale")] if "pre_quant_scale" in layer.parts else None
    if column is not None:
        parts["column"] = column
    if low_rank is not None:
        down = source[layer(low_rank[0])].to(torch.float32)
        parts["down"] = down if column is None else down * column.to(torch.float32)
        parts["up"] = source[layer(low_rank[1])]
    return parts
