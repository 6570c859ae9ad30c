"""Reader of compressed-tensors (llm-compressor, vLLM; ``quant_method`` "compressed-tensors").

    pack-quantized          weight_packed int32, weight_shape, weight_scale, weight_zero_point, weight_g_idx (`ct_integers`)
    int-quantized           weight int8, weight_scale, weight_zero_point (`ct_integers`)
    float-quantized         weight e4m3, weight_scale (`float8`)
    naive-quantized         one of the last two
    nvfp4-pack-quantized    weight_packed uint8, weight_scale e4m3, weight_global_scale, a divisor (`small_floats`)
    mxfp4-, mxfp6-pack-quantized, mxfp8-quantized    weight_packed or weight, weight_scale e8m0 (`small_floats`)

Beside them a module may have input_scale, input_zero_point, input_global_scale and the like of its output. Values are those
of the library's own ``decompress``: rounded once, where it computes in the dtype of the scales.

Read in compressed-tensors 0.20 (compressors/*/base.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from requanto.checkpoint.foreign.ct_config import Args, Config, Group, read_config
from requanto.checkpoint.foreign.ct_integers import integer_weight
from requanto.checkpoint.foreign.float8 import float8_weight
from requanto.checkpoint.foreign.found import ForeignActivation, ForeignCheckpoint, ForeignFloat, ForeignWeight
from requanto.checkpoint.foreign.pieces import CACHE_NOTE, CACHE_SCALES, joined, modules_of, static_scale
from requanto.checkpoint.foreign.small_floats import mx_weight, nvfp4_weight
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError

_WEIGHT = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_g_idx", "weight_shape")
_INPUT = ("input_scale", "input_zero_point", "input_global_scale")
_OUTPUT = ("output_scale", "output_zero_point", "output_global_scale")
#: dtypes of stored codes
_CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_FORMAT_OF_FLOATS = {
    (4, 16): "nvfp4-pack-quantized",
    (4, 32): "mxfp4-pack-quantized",
    (6, 32): "mxfp6-pack-quantized",
}
#: format -> type, and the tensor with the codes
_MX = {
    "mxfp4-pack-quantized": ("qmxfp4", "weight_packed"),
    "mxfp6-pack-quantized": ("qmxfp6_e2m3", "weight_packed"),
    "mxfp8-quantized": ("qmxfp8_e4m3", "weight"),
}


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers; see `readers.scan`.

    Raises:
        CheckpointError: the config is not known, or config and tensors do not agree.
    """
    read = read_config(config)
    found, formats, cached = ForeignCheckpoint(""), set(), read.cache
    for module, parts in modules_of(source).items():
        cache = {part for part in parts if CACHE_SCALES.search(joined(module, part))}
        cached |= bool(cache)
        ours = parts & {*_WEIGHT, *_INPUT, *_OUTPUT}
        found.dropped |= {joined(module, part) for part in cache}
        if not _is_quantized(source, module, parts):
            _require_float(source, module, parts, read)
            found.dropped |= {joined(module, part) for part in ours}
            continue
        group, embedding = _group_of(module, read)
        format = _format_of(group, parts, read)
        activation, note, static = _inputs(source, module, parts, group, embedding)
        made = _weight(source, module, parts, group, format, read.version, activation, note)
        name = joined(module, "weight")
        if isinstance(made, ForeignFloat):
            found.floats[name] = made
        else:
            found.weights[name] = made
        if static is not None:
            found.activations[module] = static
        found.dropped |= {joined(module, part) for part in ours} - set(made.sources)
        formats.add(f"{format}, {group.weights.bits} bits")  # type: ignore[union-attr]
    cache_note = f"; {CACHE_NOTE}" if cached else ""
    found.format = f"compressed-tensors ({'; '.join(sorted(formats)) or 'no quantized weight'}){cache_note}"
    return found


def _is_quantized(source: Source, module: str, parts: set[str]) -> bool:
    if "weight_packed" in parts:
        return True
    return "weight" in parts and source.header(joined(module, "weight")).dtype in _CODES


def _require_float(source: Source, module: str, parts: set[str], read: Config) -> None:
    """Raises CheckpointError if a module that stores no codes should have some."""
    name, scales = joined(module, "weight"), sorted(parts & {*_WEIGHT})
    found = read.group_of(module)
    if scales:
        stored = (
            f"{name} is {source.header(name).dtype}" if "weight" in parts else f"{name} and {name}_packed are missing"
        )
        raise CheckpointError(
            f"the files hold {joined(module, scales[0])}, but {stored.replace('torch.', '')}: these are no codes. Either a "
            f"shard is missing, or the model was saved before its weights were compressed (quantization_status is "
            f"{read.status!r}); compress it with compressed-tensors, or quantize its float weights"
        )
    if (
        "weight" in parts
        and found is not None
        and found[0].weights is not None
        and module in found[0].targets
        and not read.ignored(module)
    ):
        raise CheckpointError(
            f"{name} is {str(source.header(name).dtype).removeprefix('torch.')} without scales, but quantization_config."
            f"config_groups[{found[0].name!r}] names it: config and files do not belong together"
        )


def _group_of(module: str, read: Config) -> tuple[Group, bool]:
    """The group of a quantized module, and whether it is an embedding."""
    if read.ignored(module):
        raise CheckpointError(
            f"the files hold a quantized weight of {module}, which quantization_config.ignore leaves float: config and "
            f"files do not belong together"
        )
    found = read.group_of(module)
    if found is None or found[0].weights is None:
        raise CheckpointError(
            f"the files hold a quantized weight of {module}, which no group of quantization_config.config_groups describes "
            f"(their targets: {', '.join(target for group in read.groups for target in group.targets) or 'none'})"
        )
    group, by_class = found
    return group, by_class and "Embedding" in group.targets and "embed" in module.rpartition(".")[2].lower()


def _format_of(group: Group, parts: set[str], read: Config) -> str:
    """The format of a weight: what its group says, else the config, else as the library infers it."""
    args = group.weights
    assert args is not None
    said = group.format or read.format
    if said == "naive-quantized":
        said = None
    if said is not None:
        return said
    if args.kind == "int":
        return "pack-quantized" if "weight_packed" in parts else "int-quantized"
    if args.bits == 8:
        return "float-quantized"
    if (args.bits, args.group) not in _FORMAT_OF_FLOATS:
        raise CheckpointError(
            f"quantization_config.config_groups[{group.name!r}] has weights of {args.bits} bits, type 'float', in groups of "
            f"{args.group}; this Requanto knows nvfp4 (4 bits, 16), mxfp4 (4 bits, 32), mxfp6 (6 bits, 32) and fp8"
        )
    return _FORMAT_OF_FLOATS[args.bits, args.group]  # type: ignore[index]


def _weight(
    source: Source, module: str, parts: set[str], group: Group, format: str, version: str, activation: str, note: str
) -> ForeignWeight | ForeignFloat:
    args, name, scale = group.weights, joined(module, "weight"), joined(module, "weight_scale")
    assert args is not None
    codes = "weight_packed" if format.endswith("pack-quantized") else "weight"
    if codes not in parts:
        raise CheckpointError(
            f"{module} is {format} according to the config, but the files hold "
            f"{', '.join(sorted(parts & {'weight', *_WEIGHT}))} and no {codes}: config and files do not belong together"
        )
    if format in ("pack-quantized", "int-quantized"):
        return integer_weight(source, module, parts, args, version, activation, note)
    if args.kind != "float" or not args.symmetric or "weight_zero_point" in parts:
        raise CheckpointError(
            f"{module} is {format} according to the config, but its weights are described as {args.kind}, "
            f"symmetric={args.symmetric}, {'with' if 'weight_zero_point' in parts else 'without'} zero points; expected "
            f"float and symmetric, without"
        )
    if format == "nvfp4-pack-quantized":
        packed, factor = joined(module, "weight_packed"), joined(module, "weight_global_scale")
        return nvfp4_weight(source, name, packed, scale, factor, divided=True, note=note)
    if format == "float-quantized" and args.group == 32 and source.need(scale, name).dtype == torch.uint8:
        format = "mxfp8-quantized"
    if format in _MX:
        kind, codes = _MX[format]
        return mx_weight(source, name, kind, joined(module, codes), scale, note=note)
    block = (1, args.group) if args.group is not None else args.block
    return float8_weight(source, name, scale, block, activation=activation, note=note)


def _inputs(
    source: Source, module: str, parts: set[str], group: Group, embedding: bool
) -> tuple[str, str, ForeignActivation | None]:
    """How inputs run: a type for each token, what differs from the library, and a static scale."""
    args, notes = group.inputs, []
    if group.outputs is not None:
        notes.append("outputs stay float; compressed-tensors quantizes them")
    if args is None or embedding:
        return "", "; ".join(notes), None
    kind = {"int": "qint8", "float": "qfloat8_e4m3fn"}[args.kind] if args.bits == 8 and args.symmetric else None
    static, activation = None, ""
    if kind is not None and args.dynamic and args.strategy == "token":
        activation = kind
    elif kind is not None and not args.dynamic and args.strategy == "tensor":
        static = _static(source, module, parts, kind)
    else:
        notes.append(f"inputs stay float; compressed-tensors quantizes them ({_told(args)})")
    return activation, "; ".join(notes), static


def _told(args: Args) -> str:
    how = "dynamic" if args.dynamic else "static"
    zeros = "" if args.symmetric else ", asymmetric"
    return f"{args.kind}{args.bits}, {how}, one scale for each {args.strategy.replace('_', ' ')}{zeros}"


def _static(source: Source, module: str, parts: set[str], kind: str) -> ForeignActivation:
    zero = joined(module, "input_zero_point")
    also = (zero,) if "input_zero_point" in parts else ()
    found = static_scale(source, joined(module, "input_scale"), joined(module, "weight"), kind, also)
    if not also:
        return found
    return replace(found, build=functools.partial(_without_zero, build=found.build, zero=zero))


def _without_zero(source: Source, build: Callable[[Source], torch.Tensor], zero: str) -> torch.Tensor:
    if bool(source[zero].to(torch.float32).any()):
        raise CheckpointError(f"{zero} is not 0, but the config says symmetric=True: they do not belong together")
    return build(source)


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """The config of the oldest versions, which called it ``compression_config``; see `readers.recognize`."""
    stored = description.get("compression_config")
    return {**stored, "quant_method": "compressed-tensors"} if isinstance(stored, Mapping) else None
