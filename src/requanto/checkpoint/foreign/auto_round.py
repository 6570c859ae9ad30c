"""AutoRound checkpoints: the layouts of GPTQ, AWQ, compressed-tensors and fp8, under a ``packing_format`` of their own.

    auto_round, auto_round:gptqmodel     GPTQ, zero points as they are
    auto_round:auto_gptq                 GPTQ, zero points minus one
    auto_round:auto_awq                  AWQ, version gemm
    auto_round:llm_compressor            compressed-tensors' NVFP4, MXFP4 and MXFP8
    auto_round:fp8_static, or none       float8 with a scale for each row or tensor; static input scales
    auto_round:mlx                       MLX

Symmetric weights have negative scales where the smallest weight of a group is the largest in size: so -2^(bits - 1) is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign import awq, gptq, mlx
from requanto.checkpoint.foreign.float8 import KINDS, float8_weight
from requanto.checkpoint.foreign.found import ForeignActivation, ForeignCheckpoint, ForeignFloat
from requanto.checkpoint.foreign.integers import modules, need_codes, read_schemes
from requanto.checkpoint.foreign.small_floats import NOT_QUANTIZED, mx_weight, nvfp4_weight
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: words of packing_format that name a layout of GPTQ's -> how zero points are stored
_GPTQ = {"auto_gptq": gptq.MINUS_ONE, "gptq": gptq.MINUS_ONE, "gptqmodel": gptq.PLAIN}
_AWQ = {"auto_awq", "awq"}
#: data types whose tensors are read; the others have the tensors' names and another meaning
_FLOATS = ("fp", "mx_fp", "mx_fp_rceil", "nv_fp", "nv_fp4_with_static_gs")
_ROTATIONS = ("rotation_config", "spinquant_config", "hadamard_config")


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """See `requanto.checkpoint.foreign.readers`."""
    for key in _ROTATIONS:
        if config.get(key):
            raise CheckpointError(
                f"quantization_config.{key} is {shown(config[key])}: AutoRound rotates inputs of this model while it runs, "
                f"which Requanto does not know. Start from the float model"
            )
    packing = str(config.get("packing_format") or "")
    if "mlx" in packing:
        return mlx.scan({**_named(config), **config}, source)
    data_type = str(config.get("data_type") or "int")
    if data_type in _FLOATS:
        return _scan_floats(config, source, data_type)
    if data_type != "int":
        raise CheckpointError(
            f"quantization_config.data_type is {shown(data_type)}, which Requanto does not read; read are int, "
            f"{', '.join(_FLOATS)}"
        )
    bits = config.get("act_bits")
    if bits is not None and not (type(bits) is int and bits >= 16):
        raise CheckpointError(
            f"quantization_config.act_bits is {shown(bits)} for data_type int: the layers have tensors of AutoRound's own "
            f"kernel, which Requanto does not read"
        )
    return _scan_integers(config, source, packing)


def _scan_integers(config: Mapping[str, Any], source: Source, packing: str) -> ForeignCheckpoint:
    schemes = read_schemes(config, config.get("extra_config"), "extra_config")
    group = "one scale a row" if schemes[0].group == -1 else f"group size {schemes[0].group}"
    found = ForeignCheckpoint(format=f"AutoRound, {schemes[0].bits} bits, {group}, {packing or 'no packing_format'}")
    words = packing.split(":")
    if _AWQ & set(words):
        awq.add_weights(found, source, schemes, signed=True)
        return found
    stored = next((_GPTQ[word] for word in words if word in _GPTQ), gptq.PLAIN if packing == "auto_round" else None)
    if stored is None:
        raise CheckpointError(
            f"quantization_config.packing_format is {shown(packing or None)}, from which Requanto cannot tell how zero "
            f"points are stored; read are auto_round, auto_round:auto_gptq, auto_round:gptqmodel and auto_round:auto_awq. "
            f"Save the model with a newer auto-round"
        )
    for module in modules(source):
        gptq.add_weight(found, source, module, schemes, stored, acts=False, signed=True)
    return found


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``extra_config`` says of layers, under their names, as MLX has it."""
    extra = config.get("extra_config")
    return dict(extra) if isinstance(extra, Mapping) else {}


def _scan_floats(config: Mapping[str, Any], source: Source, data_type: str) -> ForeignCheckpoint:
    others = {
        data_type,
        *(one.get("data_type", data_type) for one in _named(config).values() if isinstance(one, Mapping)),
    }
    if not others <= {*_FLOATS, "float"}:
        raise CheckpointError(
            f"quantization_config.extra_config has data types {shown(sorted(map(str, others)))}, expected some of "
            f"{', '.join(_FLOATS)}"
        )
    found = ForeignCheckpoint(format=f"AutoRound, {data_type}, {config.get('bits')} bits")
    block = config.get("group_size")
    block = tuple(block) if isinstance(block, (list, tuple)) and len(block) == 2 else None
    act_bits = config.get("act_bits")
    inputs = f"{config.get('act_data_type') or data_type} of {act_bits} bits" if act_bits in (4, 8) else ""
    need_codes(source, ("weight_packed", "weight"), "weight_scale", "weight_scale_inv", "weight_global_scale")
    for module in _float_modules(source):
        _add_float(found, source, module, block, inputs)
    if not found.weights and not found.floats:
        raise CheckpointError(
            "the config says that weights are quantized by AutoRound, and no file holds a weight_packed or a float8 weight: "
            "it is another checkpoint's config"
        )
    return found


def _float_modules(source: Source) -> Iterable[str]:
    packed = {name.removesuffix(".weight_packed") for name in source if name.endswith(".weight_packed")}
    bytes_ = {
        name.removesuffix(".weight")
        for name in source
        if name.endswith(".weight") and source.header(name).dtype in KINDS
    }
    return sorted(packed | bytes_)


def _add_float(found: ForeignCheckpoint, source: Source, module: str, block: Any, inputs: str) -> None:
    name, scale = f"{module}.weight", f"{module}.weight_scale"
    packed, factor, static = (f"{module}.{part}" for part in ("weight_packed", "weight_global_scale", "input_scale"))
    note = NOT_QUANTIZED.format(inputs) if inputs else ""
    if packed in source and factor in source:
        unused = f"{module}.input_global_scale"
        also = (unused,) if unused in source else ()
        found.weights[name] = nvfp4_weight(source, name, packed, scale, factor, divided=True, also=also, note=note)
        return
    if packed in source:
        if source.need(scale, name).dtype != torch.uint8:
            source.need(factor, name)
        found.weights[name] = mx_weight(source, name, "qmxfp4", packed, scale, note=note)
        return
    if scale in source and source.header(scale).dtype == torch.uint8:
        found.weights[name] = mx_weight(source, name, "qmxfp8_e4m3", name, scale, note=note)
        return
    if f"{module}.weight_zp" in source:
        raise CheckpointError(f"{module}.weight_zp is a zero point of float8 codes, which Requanto does not read")
    if static in source:
        source.need_shape(static, name, source.header(static).shape, torch.bfloat16, torch.float16, torch.float32)
        if source.header(static).shape.numel() != 1:
            raise CheckpointError(f"{static} has shape {tuple(source.header(static).shape)}, expected one number")
        found.activations[module] = ForeignActivation(
            "qfloat8_e4m3fn", (static,), lambda source: source[static].float().reshape(())
        )
        note = ""
    inverse = f"{module}.weight_scale_inv"
    if scale not in source and inverse in source:
        weight = float8_weight(source, name, inverse, block, note=note)
    else:
        weight = float8_weight(source, name, scale, note=note)
    (found.floats if isinstance(weight, ForeignFloat) else found.weights)[name] = weight  # type: ignore[assignment, index]
