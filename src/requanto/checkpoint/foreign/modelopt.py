"""Reader of NVIDIA ModelOpt's checkpoints (``quant_method`` "modelopt", or hf_quant_config.json) and of BFL's files.

    NVFP4, W4A16_NVFP4, W4A8_NVFP4_FP8    weight uint8 [N, K / 2], weight_scale e4m3 [N, K / 16], weight_scale_2, a factor
    NVFP4_AWQ, NVFP4_SVD                  the same with pre_quant_scale [K], by which inputs are multiplied: our column
                                          scale; svdquant_lora_a, _b: a low-rank term
    FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO    weight e4m3, weight_scale: one, one a row, one a block
    W4A8_MXFP4_FP8, MXFP4, MXFP8          weight, weight_scale e8m0
    W8A8_SQ_PER_CHANNEL, W8A16            weight int8, weight_scale [N]
    W4A16_AWQ                             weight uint8 [N / 2, K]: rows 2r in low nibbles, 2r + 1 in high ones, signed
    MIXED_PRECISION                       each layer of ``quantized_layers`` has one of these

A BFL file has no config; its layers are NVFP4, or float8 with one scale a row, as its tensors say.

Read in modelopt 0.47 (torch/export/quant_utils.py, convert_hf_config.py) and diffusers 0.42 (quantizers/bfl).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignActivation, ForeignCheckpoint, ForeignFloat
from requanto.checkpoint.foreign.modelopt_config import ANY, BFL, Config, read_config
from requanto.checkpoint.foreign.modelopt_weights import Layer, smoothed, weight_of
from requanto.checkpoint.foreign.pieces import CACHE_NOTE, CACHE_SCALES, joined, modules_of, static_scale
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError

_PARTS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b")
_CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn)
#: algorithm -> how inputs run: a type for each token, a static type, or why they stay float
_TOKENS = {"FP8_PER_CHANNEL_PER_TOKEN": "qfloat8_e4m3fn"}
_STATIC = {"FP8": "qfloat8_e4m3fn", "W8A8_SQ_PER_CHANNEL": "qint8"}
_STAY = "inputs stay float; ModelOpt's kernels quantize them ({})"
_NOTES = {
    **{name: _STAY.format("nvfp4") for name in ("NVFP4", "NVFP4_AWQ", "NVFP4_SVD", BFL)},
    **{name: _STAY.format("float8") for name in ("W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "FP8_PB_WO", "FP8_PB_REAL")},
    **{"MXFP4": _STAY.format("mxfp4"), "MXFP8": _STAY.format("mxfp8")},
}


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers; see `readers.scan`.

    Raises:
        CheckpointError: an algorithm is not known, or config and tensors do not agree.
    """
    read = read_config(config)
    found, seen, cached = ForeignCheckpoint(""), set(), read.cache
    for module, parts in modules_of(source).items():
        cache = {part for part in parts if CACHE_SCALES.search(joined(module, part))}
        cached |= bool(cache)
        found.dropped |= {joined(module, part) for part in cache}
        name = joined(module, "weight")
        if "weight" not in parts or source.header(name).dtype not in _CODES:
            _require_no_rest(source, module, parts)
            continue
        layer = Layer(module, read.algorithm_of(module), parts, read.group_of(module))
        seen.add(layer.algorithm)
        static, activation, note = _inputs(source, layer)
        made = weight_of(source, layer, activation, note)
        if isinstance(made, ForeignFloat):
            if "pre_quant_scale" in parts:
                raise CheckpointError(f"{name} has a pre_quant_scale and cannot stay quantized: {made.reason}")
            found.floats[name] = made
        else:
            found.weights[name] = smoothed(source, layer, made)
        if static is not None:
            found.activations[module] = static
    ours = {joined(module, part) for module, parts in modules_of(source).items() for part in parts & {*_PARTS}}
    found.dropped |= ours - found.consumed
    cache_note = f"; {CACHE_NOTE}" if cached else ""
    found.format = f"{_title(read)} ({', '.join(sorted(seen - {ANY})) or 'no quantized weight'}){cache_note}"
    return found


def _title(read: Config) -> str:
    return "Black Forest Labs" if read.algorithm == BFL else "ModelOpt"


def _require_no_rest(source: Source, module: str, parts: set[str]) -> None:
    """Raises CheckpointError if a module has scales but no codes."""
    left = sorted(parts & {*_PARTS} - {"input_scale"})
    if left:
        weight = joined(module, "weight")
        stored = f"is {str(source.header(weight).dtype).removeprefix('torch.')}" if "weight" in parts else "is missing"
        raise CheckpointError(
            f"the files hold {joined(module, left[0])}, but {weight} {stored}, expected codes: a shard is missing, or files "
            f"of two checkpoints are mixed"
        )


def _inputs(source: Source, layer: Layer) -> tuple[ForeignActivation | None, str, str]:
    """A static scale of a module's inputs, a type for each token, and what differs from ModelOpt."""
    algorithm = layer.algorithm
    if algorithm in _TOKENS:
        return None, _TOKENS[algorithm], ""
    if algorithm not in _STATIC or "embed" in layer.module.rpartition(".")[2]:
        return None, "", _NOTES.get(algorithm, "")
    if "pre_quant_scale" in layer.parts:  # the scale is that of multiplied inputs
        return None, "", _STAY.format(_STATIC[algorithm].removeprefix("q"))
    name = joined(layer.module, "input_scale")
    return static_scale(source, name, joined(layer.module, "weight"), _STATIC[algorithm]), "", ""


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """The config of hf_quant_config.json, or that of a BFL file; see `readers.recognize`."""
    stored = description.get("hf_quant_config")
    if isinstance(stored, Mapping):
        producer = stored.get("producer")
        if "quantization" in stored or (isinstance(producer, Mapping) and producer.get("name") == "modelopt"):
            return {**stored, "quant_method": "modelopt"}
    # ComfyUI's files have the same names, and say so.
    if "_quantization_metadata" in source.metadata or any(
        name.endswith((".comfy_quant", "scaled_fp8")) for name in source
    ):
        return None
    scaled = [name.removesuffix("_scale") for name in source if name.endswith(".weight_scale")]
    if not scaled or not all(_is_bfl(source, weight) for weight in scaled):
        return None
    return {"quant_method": "modelopt", "quant_algo": BFL}


def _is_bfl(source: Source, weight: str) -> bool:
    """Whether a weight with a scale has one of the two forms of BFL."""
    if weight not in source or len(source.header(weight).shape) != 2:
        return False
    stored, scale = source.header(weight), source.header(f"{weight}_scale")
    if stored.dtype == torch.uint8:
        return scale.dtype == torch.float8_e4m3fn and f"{weight}_scale_2" in source
    return stored.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == stored.shape[:1]
