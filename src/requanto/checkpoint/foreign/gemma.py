"""Reader of Gemma's QAT checkpoints (``quant_method`` "gemma").

    linear layers  weight uint8 [N, ceil(K b / 8)] of 2 or 4 bits, low bits first, or int8 [N, K]; weight_scale [N, 1];
                   input_activation_scale, output_activation_scale: int8 with a static scale, 0: they stay float
    embeddings     embedding_quantized, the same codes; embedding_scale [N, 1], or one for each of a few blocks of a row

    value = scale * (code - 2^(b - 1)); of 8 bits scale * code

Read in transformers 5.24 (integrations/gemma_quant.py). Its layers round the scale to the model's dtype first; we multiply
in float32 and round once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignWeight, Parts
from requanto.checkpoint.foreign.pieces import (
    CACHE_NOTE,
    CACHE_SCALES,
    compiled,
    joined,
    line,
    modules_of,
    static_scale,
    unfit,
)
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

_INPUT, _OUTPUT = "input_activation_scale", "output_activation_scale"
_BITS = (2, 4, 8)


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers; see `readers.scan`.

    Raises:
        CheckpointError: codes without a scale, a scale without codes, or shapes that do not fit the bits of the config.
    """
    bits_of = _bits(config)
    found, seen = ForeignCheckpoint(""), set()
    for module, parts in modules_of(source).items():
        found.dropped |= {joined(module, part) for part in parts if CACHE_SCALES.search(joined(module, part))}
        embedding = "embedding_quantized" in parts
        codes, scale = ("embedding_quantized", "embedding_scale") if embedding else ("weight", "weight_scale")
        has_codes = codes in parts and source.header(joined(module, codes)).dtype in (torch.uint8, torch.int8)
        if not has_codes:
            _require_nothing_left(source, module, parts)
            continue
        if embedding and not config.get("quantize_embeddings", False):
            raise CheckpointError(
                f"the files hold {joined(module, codes)}, and quantization_config.quantize_embeddings is not true: config "
                f"and files do not belong together"
            )
        bits = bits_of(module)
        seen.add(bits)
        weight = _weight(source, module, codes, scale, bits, embedding)
        if not embedding:
            note = _activations(source, module, parts, found)
            weight = ForeignWeight(weight.text, weight.sources, weight.build, note)
        found.weights[joined(module, "weight")] = weight
    cached = f"; {CACHE_NOTE}" if any(CACHE_SCALES.search(name) for name in found.dropped) else ""
    found.format = f"Gemma QAT ({', '.join(map(str, sorted(seen))) or 'no'} bits){cached}"
    return found


def _bits(config: Mapping[str, Any]) -> Any:
    """A function from the name of a module to its bits: of the first pattern that is found in it, else ``num_bits``."""
    overrides = config.get("module_quant_configs") or {}
    default = config.get("num_bits", 4)
    if not isinstance(overrides, Mapping) or not all(isinstance(value, Mapping) for value in overrides.values()):
        raise CheckpointError(
            f"quantization_config.module_quant_configs is {shown(overrides)}, expected an object: pattern -> num_bits"
        )
    for where, value in {
        "num_bits": default,
        **{key: one.get("num_bits", default) for key, one in overrides.items()},
    }.items():
        if value not in _BITS:
            raise CheckpointError(
                f"quantization_config: {where} has {shown(value)} bits, and Gemma's codes have 2, 4 or 8"
            )
    patterns = [(compiled(key, key), one.get("num_bits", default)) for key, one in overrides.items()]

    def bits_of(module: str) -> int:
        return next((bits for pattern, bits in patterns if pattern.search(module)), default)

    return bits_of


def _weight(source: Source, module: str, codes: str, scale: str, bits: int, embedding: bool) -> ForeignWeight:
    name, stored = joined(module, "weight"), source.header(joined(module, codes))
    if len(stored.shape) != 2 or stored.dtype != (torch.int8 if bits == 8 else torch.uint8):
        wanted = "int8 [rows, K]" if bits == 8 else f"uint8 [rows, K * {bits} / 8] for {bits} bits"
        raise unfit(joined(module, codes), stored, wanted)
    rows, length = stored.shape[0], stored.shape[1] * 8 // bits
    found = source.need(joined(module, scale), name)
    blocks = found.shape[1] if embedding and len(found.shape) == 2 and found.shape[1] else 1
    if length % blocks:
        raise unfit(joined(module, scale), found, f"scales for a number of blocks that divides {length} columns")
    source.need_shape(joined(module, scale), name, (rows, blocks), torch.float32, torch.bfloat16, torch.float16)
    text = line(name, f"qint{bits}", (rows, length), group=length // blocks if blocks > 1 else None)
    names = (joined(module, codes), joined(module, scale))
    return ForeignWeight(text, names, functools.partial(_parts, names=names))


def _parts(source: Source, names: tuple[str, str]) -> Parts:
    return {"qdata": source[names[0]], "scale": source[names[1]]}


def _activations(source: Source, module: str, parts: set[str], found: ForeignCheckpoint) -> str:
    """Records the static scale of a module's inputs; returns what differs from the library."""
    note = ""
    for part in sorted(parts & {_INPUT, _OUTPUT}):
        name = joined(module, part)
        scale = static_scale(source, name, joined(module, "weight"), "qint8")
        if not bool(source[name].any()):  # not calibrated: inputs or outputs stay float
            found.dropped.add(name)
        elif part == _INPUT:
            found.activations[module] = scale
        else:
            found.dropped.add(name)
            note = "outputs stay float; Gemma's layers round them to int8 with a static scale"
    return note


def _require_nothing_left(source: Source, module: str, parts: set[str]) -> None:
    """Raises CheckpointError if a module has scales but no codes."""
    left = sorted(parts & {"weight_scale", "embedding_scale", _INPUT, _OUTPUT})
    if left:
        stored = source.header(joined(module, "weight")).dtype if "weight" in parts else "missing"
        raise CheckpointError(
            f"the files hold {joined(module, left[0])}, but {joined(module, 'weight')} is "
            f"{str(stored).removeprefix('torch.')}, expected codes: a shard is missing, or files of two checkpoints are "
            f"mixed"
        )
