"""Checkpoints of Nunchaku (SVDQuant): its own files of Flux and Qwen-Image, and Diffusers' "nunchaku_lite".

Nunchaku's files tell what they are in the metadata of their header: ``quantization_config`` with method "svdquant",
``model_class``, and ``config`` of the model. `nunchaku_names` has their names, `nunchaku_layers` the arithmetic. In
"nunchaku_lite" (Diffusers 0.42) modules have Diffusers' names, nothing is joined, and the config lists them.

No library reads these files on a CPU. This reader is tested on files made after the packers' source, not on published ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight
from requanto.checkpoint.foreign.integers import need_codes
from requanto.checkpoint.foreign.nunchaku_layers import NEEDS_CODES, UNUSED, Stored, in_turns, weight_parts, weight_spec
from requanto.checkpoint.foreign.nunchaku_names import Place, place_of
from requanto.checkpoint.foreign.pieces import joined, modules_of, names_in
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

_NOTE = "Nunchaku rounds the inputs of such layers to 4 bits; here they stay float"


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers of a checkpoint of Nunchaku.

    Args:
        config: what `recognize` returned, or a ``quantization_config`` of Diffusers.
        source: its tensors.

    Raises:
        CheckpointError: a model that this reader does not know; or config and tensors disagree.
    """
    lite = config.get("quant_method") == "nunchaku_lite"
    modules = sorted(module for module, parts in modules_of(source).items() if "qweight" in parts)
    if not modules:
        raise CheckpointError(
            "the config is one of Nunchaku, and no module has a qweight: the files do not belong to it"
        )
    need_codes(source, ("qweight",), *NEEDS_CODES)
    stored = {module: Stored(module, source) for module in modules}
    if lite:
        _check_lite(config, stored)
        places = {module: Place((module,)) for module in modules}
    else:
        _check(config, stored)
        places = {module: _place(module, config) for module in modules}
    ranks = sorted({layer.rank for layer in stored.values() if not layer.is_awq})
    kind = "nvfp4" if any(layer.is_nvfp4 for layer in stored.values()) else "int4"
    found = ForeignCheckpoint(f"Nunchaku, {kind}, rank {' and '.join(map(str, ranks))}")
    for module in modules:
        found.dropped |= {joined(module, part) for part in UNUSED if joined(module, part) in source}
    for name, (members, piece) in _weights(places).items():
        layers = [stored[module] for module in members]
        place = places[members[0]]
        _add(found, name, layers, piece, place, [places[module].shifted for module in members], source)
    if not lite:
        _rename_floats(source, set(modules), found)
    return found


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """A config for files of Nunchaku: what their header says, with the class of the model."""
    told = _json(source.metadata.get("quantization_config"))
    name = source.metadata.get("model_class") or description.get("_class_name") or ""
    if told.get("method") != "svdquant" and not str(name).startswith("Nunchaku"):
        parts = {part for part in (key.rpartition(".")[2] for key in source)}
        if not {"qweight", "wscales"} <= parts or not parts & {"proj_down", "lora_down"}:
            return None
    return {**told, "quant_method": "nunchaku", "model_class": str(name)}


def _json(text: str | None) -> dict[str, Any]:
    """A JSON object of the metadata; empty if there is none."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"the header's quantization_config is {shown(text)}, expected a JSON object")
    return found


def _place(module: str, config: Mapping[str, Any]) -> Place:
    place = place_of(module)
    if place is None:
        raise CheckpointError(
            f"{module} is a quantized layer of Nunchaku's {config.get('model_class') or 'model'}, whose place in Diffusers' "
            f"model is not known here; known are Flux and Qwen-Image, and every model in Diffusers' 'nunchaku_lite' form. "
            f"What reads it: nunchaku, with a GPU"
        )
    return place


def _weights(places: Mapping[str, Place]) -> dict[str, tuple[list[str], tuple[int, int]]]:
    """Name of each weight's module -> the stored modules that it consists of, and (which, of how many) of their rows."""
    found: dict[str, tuple[list[str], tuple[int, int]]] = {}
    for module, place in places.items():
        for which, name in enumerate(place.names):
            members, _ = found.setdefault(name, ([], (which, len(place.names))))
            members.append(module)
    for name, (members, _) in found.items():
        members.sort(key=lambda module: places[module].half or 0)
        halves = [places[module].half for module in members]
        if halves not in ([None], [0, 1]):
            raise CheckpointError(
                f"{name} is made of {' and '.join(members)}; expected one layer, or the two halves of its inputs: a "
                f"shard is missing, or tensors of two files are mixed"
            )
    return found


def _add(
    found: ForeignCheckpoint,
    name: str,
    layers: list[Stored],
    piece: tuple[int, int],
    place: Place,
    shifted: list[bool],
    source: Source,
) -> None:
    """Enters the weight and the bias of a module."""
    which, count = piece
    all_rows = layers[0].rows
    if all_rows % count or all_rows // count % place.order:
        raise CheckpointError(f"{layers[0].module} has {all_rows} rows, expected a multiple of {count * place.order}")
    size = all_rows // count
    rows = slice(which * size, (which + 1) * size)
    spec = weight_spec(layers, size)
    order = place.order if layers[0].is_awq else 1
    if order != place.order:
        raise CheckpointError(f"{layers[0].module} has 4-bit inputs; Nunchaku's modulations have 16-bit ones")
    sources = tuple(name for layer in layers for name in layer.sources("bias"))
    build = functools.partial(weight_parts, layers, rows, order, spec)
    text = spec.text(sum(layer.rank for layer in layers))
    found.weights[joined(name, "weight")] = ForeignWeight(text, sources, build, "" if layers[0].is_awq else _NOTE)
    biases = [(layer, layer.bias) for layer in layers if layer.bias is not None]
    if biases and not (layers[0].is_awq and order == 1):
        dtype = source.header(biases[-1][1]).dtype
        found.floats[joined(name, "bias")] = ForeignFloat(
            torch.Size([size]),
            dtype,
            tuple(key for layer, _ in biases for key in layer.sources()),
            functools.partial(_bias, layers, shifted, rows, order),
        )


def _bias(layers: list[Stored], shifted: list[bool], rows: slice, order: int, source: Source) -> torch.Tensor:
    """The bias of some rows of layers whose results are added."""
    pairs = zip(layers, shifted, strict=True)
    found = [layer.bias_values(source, behind) for layer, behind in pairs if layer.bias is not None]
    bias = found[0] if len(found) == 1 else torch.stack(found).float().sum(0).to(found[0].dtype)
    if order > 1:
        # Of shift, scale and gate, 1 was added to each scale; Diffusers adds it itself.
        bias = in_turns(bias, order).clone()
        scales = bias.view(order, -1)
        for one in {1, order - 2}:
            scales[one] -= 1
        return bias
    return bias[rows].contiguous()


def _rename_floats(source: Source, quantized: set[str], found: ForeignCheckpoint) -> None:
    """Enters the float tensors of modules that have another name in Diffusers' model."""
    for key in source:
        module, _, leaf = key.rpartition(".")
        place = None if module in quantized else place_of(module)
        if place is None or place.names == (module,):
            continue
        if place.half is not None:
            raise CheckpointError(f"{key} is float, and the other half of its layer may be quantized: this is not read")
        shape, dtype = source.header(key)
        size = shape[0] // len(place.names)
        for which, name in enumerate(place.names):
            build = functools.partial(_rows, key, slice(which * size, (which + 1) * size))
            found.floats[joined(name, leaf)] = ForeignFloat(torch.Size([size, *shape[1:]]), dtype, (key,), build)


def _rows(key: str, rows: slice, source: Source) -> torch.Tensor:
    return source[key][rows]


# ---------------------------------------------------------------------- what the config says


def _check(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Compares Nunchaku's own config with the tensors."""
    weight = config.get("weight")
    kind = weight.get("dtype") if isinstance(weight, Mapping) else None
    if kind is None:
        return
    known = {"int4": False, "fp4_e2m1_all": True, "fp4_e2m1": True, "sfp4_e2m1_all": True, "nvfp4": True}
    if kind not in known:
        raise CheckpointError(
            f"the header's quantization_config says that weights are {shown(kind)}, expected int4 or fp4_e2m1_all"
        )
    _agree(stored.values(), known[kind], str(kind), None)


def _check_lite(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Compares Diffusers' config with the tensors."""
    if config.get("patches"):
        raise CheckpointError(
            f"quantization_config.patches is {shown(config['patches'])}: the model's modules were changed before it was "
            f"quantized, and Diffusers 0.42 has no such key"
        )
    wanted: dict[str, bool] = {}
    for section, awq in (("svdq_w4a4", False), ("awq_w4a16", True)):
        told = config.get(section)
        if told is None:
            continue
        if not isinstance(told, Mapping) or told.get("precision") not in ("int4", "nvfp4"):
            raise CheckpointError(
                f"quantization_config.{section} is {shown(told)}, expected precision int4 or nvfp4, and targets"
            )
        names = names_in(told, "targets")
        wanted |= dict.fromkeys(names, awq)
        there = [stored[name] for name in names if name in stored]
        _agree(
            there,
            told["precision"] == "nvfp4",
            f"{section}.precision={told['precision']}",
            None if awq else told.get("rank"),
        )
    surplus, missing = sorted(stored.keys() - wanted.keys()), sorted(wanted.keys() - stored.keys())
    if surplus or missing:
        name = (surplus or missing)[0]
        raise CheckpointError(
            f"{name} is {'quantized in the files' if surplus else 'listed in quantization_config'}, but not "
            f"{'listed in quantization_config' if surplus else 'quantized in the files'}: they do not belong together"
        )
    for name, awq in wanted.items():
        if stored[name].is_awq != awq:
            raise CheckpointError(
                f"{name}.qweight is that of {'svdq_w4a4' if awq else 'awq_w4a16'}, quantization_config lists the other"
            )


def _agree(layers: Iterable[Stored], nvfp4: bool, told: str, rank: Any) -> None:
    for layer in layers:
        if not layer.is_awq and layer.is_nvfp4 != nvfp4:
            raise CheckpointError(
                f"{layer.module} has {'nvfp4' if layer.is_nvfp4 else 'int4'} codes, the config says {told}: they do not "
                f"belong together"
            )
        if not layer.is_awq and rank is not None and layer.rank != rank:
            raise CheckpointError(
                f"{layer.module} has a low-rank term of rank {layer.rank}, the config says {shown(rank)}"
            )
