"""Files of ComfyUI: float8 with scales, and the layouts of comfy-kitchen.

What says that a layer is quantized, in ComfyUI's code (comfy/ops.py, comfy/utils.py ``convert_old_quants``):

| | |
|---|---|
| ``X.comfy_quant`` | JSON as bytes: ``format``, one of `comfyui_layers.FORMATS`, and options |
| ``_quantization_metadata`` in the header | ``{"format_version": "1.0", "layers": {"X": the same}}`` |
| ``scaled_fp8``, ``X.scale_weight``, ``X.scale_input`` | older files: float8 with one scale for each weight |

A float8 weight is ``scale * code``. A file whose float8 weights have no scale is one of casts: ComfyUI takes codes for
the weight itself. Nothing in such a file says so, and a file that lost its scales looks the same; so it is refused unless
the config has ``float8_cast``. In a file with a scale, or a mark, each float8 weight needs its own.

Names are left as they are, with prefixes such as ``model.diffusion_model.``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.comfyui_layers import FLOAT8, FORMATS, Layer, cast_weight, float8_weight
from requanto.checkpoint.foreign.found import ForeignActivation, ForeignCheckpoint, ForeignFloat
from requanto.checkpoint.foreign.pieces import joined
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: key of the header, and the highest version of its content
_METADATA, _VERSION = "_quantization_metadata", 1
#: A comfy_quant of more bytes is damaged.
_LONGEST = 1 << 16
_OLD_SCALE, _SCALES = "scale_weight", ("weight_scale", "scale_weight")
_INPUT_SCALES = ("input_scale", "scale_input")
_REFUSED = {
    "asym_w4a8_int8": "its codes have scales for groups and for rows, and codebooks",
    "int4_tensorwise": "ComfyUI itself does not load it",
}
_CAST = (
    'If the weights were cast to float8 without scales, say so: quantization_config={"quant_method": "comfyui", '
    '"float8_cast": true} in config.json, or from_single_file(..., quantization_config=QuantoConfig(weights="float8"))'
)


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers of a checkpoint of ComfyUI, and what it says of each layer.

    Args:
        config: what `recognize` returned; with ``float8_cast`` float8 weights without a scale are casts.
        source: its tensors.

    Raises:
        CheckpointError: a format that this reader does not know, a scale is missing, or tensors do not fit each other.
    """
    confs = _layers(source)
    markers = {name for name in source if name.rpartition(".")[2] == "scaled_fp8"}
    exact = any(source.header(name).shape.numel() == 2 for name in markers)
    found = ForeignCheckpoint("")
    found.dropped |= markers | {name for name in source if name.endswith(".comfy_quant")}
    for name in _float8(source):
        module, _, leaf = name.rpartition(".")
        scaled = leaf == "weight" and any(joined(module, scale) in source for scale in _SCALES)
        if module not in confs and scaled:
            confs[module] = {"format": None, "full_precision_matrix_mult": exact}
    for module, conf in sorted(confs.items()):
        _add(found, module, conf, source)
    _add_others(found, bool(confs or markers), bool(config.get("float8_cast")), source)
    kinds = sorted({str(conf["format"] or "float8") for conf in confs.values()}) or ["float8 without scales"]
    found.format = f"ComfyUI, {' and '.join(kinds)}"
    return found


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """A config for files with ComfyUI's marks, or with float8 weights that have scales."""
    if _METADATA in source.metadata:
        return {"quant_method": "comfyui"}
    marks = {"comfy_quant", "scaled_fp8", _OLD_SCALE}
    if any(name.rpartition(".")[2] in marks for name in source):
        return {"quant_method": "comfyui"}
    told = ("quantization_config", "compression_config", "hf_quant_config")
    if any(description.get(key) for key in told):
        return None
    scaled = (joined(name.rpartition(".")[0], "weight_scale") in source for name in _float8(source))
    return {"quant_method": "comfyui"} if any(scaled) else None


def is_cast(source: Source) -> bool:
    """Whether a file holds float8 weights and nothing that says how they are scaled."""
    return bool(_float8(source)) and recognize({}, source) is None


def _float8(source: Source) -> list[str]:
    """Names of float8 tensors with rows, which are no scales."""
    names = []
    for name in source:
        shape, dtype = source.header(name)
        if dtype in FLOAT8 and len(shape) >= 2 and name.rpartition(".")[2] not in _SCALES:
            names.append(name)
    return names


# ---------------------------------------------------------------------- what the file says of its layers


def _layers(source: Source) -> dict[str, dict[str, Any]]:
    """Module -> what the file says of it."""
    found = _from_metadata(source)
    for name in source:
        module, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            found[module] = _conf(name, _text(name, source))
    return found


def _text(name: str, source: Source) -> str:
    shape, dtype = source.header(name)
    if dtype != torch.uint8 or shape.numel() > _LONGEST:
        raise CheckpointError(f"{name} is {dtype} {tuple(shape)}, expected JSON as at most {_LONGEST} bytes")
    return bytes(source[name].flatten().tolist()).decode("utf-8", errors="replace")


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} holds {shown(text)}, expected a JSON object: it is damaged")
    return found


def _conf(name: str, told: Any) -> dict[str, Any]:
    """What is said of a layer, its options in one dict.

    Args:
        name: where it stands, for messages.
        told: an object, JSON of one, or only the format.
    """
    if isinstance(told, str):
        told = {"format": told} if told in FORMATS or told in _REFUSED else _json(name, told)
    if not isinstance(told, dict):
        raise CheckpointError(f"{name} is {shown(told)}, expected an object with a format")
    params = told.get("params")
    conf = {**(params if isinstance(params, dict) else {}), **told}
    kind = conf.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        why = f": {_REFUSED[kind]}" if isinstance(kind, str) and kind in _REFUSED else ""
        raise CheckpointError(
            f"{name} says that the layer has the format {shown(kind)}, which Requanto does not read{why}. It reads "
            f"{', '.join(sorted(FORMATS))}"
        )
    return conf


def _from_metadata(source: Source) -> dict[str, dict[str, Any]]:
    if _METADATA not in source.metadata:
        return {}
    told = _json(f"{_METADATA} in the header", source.metadata[_METADATA])
    version = str(told.get("format_version", "1.0"))
    if not version.partition(".")[0].isdigit() or int(version.partition(".")[0]) > _VERSION:
        raise CheckpointError(
            f"{_METADATA} has format_version {shown(told.get('format_version'))}; Requanto reads 1.0: install a newer one"
        )
    layers = told.get("layers")
    if not isinstance(layers, dict):
        raise CheckpointError(f"layers in {_METADATA} is {shown(layers)}, expected an object")
    places = _by_ending(name.removesuffix(".weight") for name in source if name.endswith(".weight"))
    found = {}
    for module, conf in layers.items():
        there = [module] if joined(module, "weight") in source else places.get(module, [])
        if len(there) != 1:
            raise CheckpointError(
                f"{_METADATA} in the header describes {shown(module)}, of which {len(there) or 'no'} weights are in the "
                f"file: it is incomplete, or was changed"
            )
        found[there[0]] = _conf(f"{_METADATA} for {module}", conf)
    return found


def _by_ending(modules: Iterable[str]) -> dict[str, list[str]]:
    """Ending of a name -> the modules that have it: the header leaves out prefixes such as ``model.diffusion_model``."""
    found: dict[str, list[str]] = {}
    for module in modules:
        rest = module
        while "." in rest:
            rest = rest.partition(".")[2]
            found.setdefault(rest, []).append(module)
    return found


# ---------------------------------------------------------------------- what becomes of them


def _add(found: ForeignCheckpoint, module: str, conf: dict[str, Any], source: Source) -> None:
    """Enters a quantized layer."""
    layer = Layer(module, conf, source)
    make = float8_weight if conf["format"] is None else FORMATS[conf["format"]]
    for name, one in make(layer).items():
        if isinstance(one, ForeignFloat):
            found.floats[name] = one
        else:
            found.weights[name] = one
    scale = next((joined(module, one) for one in _INPUT_SCALES if joined(module, one) in source), None)
    if scale is None:
        return
    found.dropped.add(scale)
    if make is float8_weight and not conf.get("full_precision_matrix_mult"):
        if source.header(scale).shape.numel() != 1:
            raise CheckpointError(f"{scale} has shape {tuple(source.header(scale).shape)}, expected one number")
        # 1 stands for a scale that nobody measured
        if float(source[scale]) != 1:
            build = functools.partial(_number, scale)
            found.activations[module] = ForeignActivation("qfloat8_e4m3fn", (scale,), build)


def _number(name: str, source: Source) -> torch.Tensor:
    return source[name].float().reshape(())


def _add_others(found: ForeignCheckpoint, scaled: bool, cast: bool, source: Source) -> None:
    """Enters float8 tensors that no mark describes, and refuses codes that nothing describes."""
    done = found.consumed
    for name in source:
        shape, dtype = source.header(name)
        if name in done or dtype not in (*FLOAT8, torch.int8):
            continue
        module, _, leaf = name.rpartition(".")
        if dtype == torch.int8 or leaf in _SCALES:
            raise CheckpointError(
                f"{name} holds {str(dtype).removeprefix('torch.')} codes, and no comfy_quant describes {module}: the "
                f"file is incomplete, or another program wrote it"
            )
        if len(shape) < 2:
            found.floats[name] = ForeignFloat(shape, torch.bfloat16, (name,), functools.partial(_as_bfloat16, name))
        elif cast:
            found.weights[name] = cast_weight(name, source)
        elif scaled:
            raise CheckpointError(
                f"{name} is float8 and has no scale ({joined(module, 'weight_scale')} or {joined(module, _OLD_SCALE)}), and "
                f"other weights of the file have one: the file is incomplete. {_CAST}"
            )
        else:
            raise CheckpointError(
                f"{name} is float8, and the file has no scales: it holds casts, or it lost them. {_CAST}"
            )


def _as_bfloat16(name: str, source: Source) -> torch.Tensor:
    return source[name].to(torch.bfloat16)
