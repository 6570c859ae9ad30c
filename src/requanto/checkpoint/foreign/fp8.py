"""Reader of float8 checkpoints of Transformers: ``quant_method`` "fp8" (DeepSeek, Qwen ...), "mxfp8" and "fbgemm_fp8".

    fp8         weight e4m3, weight_scale_inv float32 [N / 128, K / 128], which is multiplied, in spite of its name. Other
                names of the scale: weight_scale, scale, qscale_weight; it may be one number, or powers of two (e8m0)
    mxfp8       the same with blocks of 1 x 32 and e8m0
    fbgemm_fp8  weight e4m3, weight_scale [N, 1]; experts of Llama 4 are stored [E, K, N]

Experts may be stored one by one or together (``gate_up_proj``, ``gate_up_proj_scale_inv``); with ``expert_dtype: fp4`` they
are MXFP4, two codes in an int8. Values are those of Transformers' Fp8Dequantize, computed in float32 and rounded once.

Read in transformers 5.24 (integrations/finegrained_fp8.py, fbgemm_fp8.py, utils/quantization_config.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.float8 import KINDS, float8_weight
from requanto.checkpoint.foreign.found import ForeignActivation, ForeignCheckpoint, ForeignFloat, ForeignWeight
from requanto.checkpoint.foreign.pieces import CACHE_NOTE, CACHE_SCALES, names_in, static_scale
from requanto.checkpoint.foreign.small_floats import mx_weight
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: the scale of ``M.weight`` and of a parameter of another name
_WEIGHT_SCALES = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
_OTHER_SCALES = ("_scale_inv", "_scale")
_INPUT_SCALES = (".activation_scale", ".input_scale", ".qscale_act")
#: ends of names that belong to a quantized weight in any case; ``scale`` alone may be a norm's
_ENDS = (
    ".weight_scale_inv",
    ".weight_scale",
    ".qscale_weight",
    "_proj_scale_inv",
    "_proj_activation_scale",
    *_INPUT_SCALES,
)
_BLOCKS: dict[str, tuple[int, int] | None] = {"fp8": (128, 128), "mxfp8": (1, 32), "fbgemm_fp8": None}
_GROUPS = "inputs stay float; they were meant to be quantized to float8 in groups of {}"


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers; see `readers.scan`.

    Raises:
        CheckpointError: a weight has no scale, a scale no weight, or config and tensors do not agree.
    """
    method = str(config["quant_method"])
    block, static = _block_of(config, method), _is_static(config)
    float_names = set(names_in(config, "modules_to_not_convert") or names_in(config, "ignored_layers"))
    found = ForeignCheckpoint("")
    for name in source:
        if CACHE_SCALES.search(name):
            found.dropped.add(name)
            continue
        if not _is_quantized(source, name, config):
            continue
        module = name.removesuffix(".weight")
        if module in float_names:
            raise CheckpointError(
                f"{name} is {_dtype(source, name)}, and quantization_config.modules_to_not_convert leaves {module} float: "
                f"config and files do not belong together"
            )
        scale = _scale_of(source, name)
        also = [module + end for end in _INPUT_SCALES if module + end in source]
        activation, note, stored = _inputs(source, name, scale, config, block, static, also)
        if stored is not None:
            found.activations[module] = stored
            also = []
        made = _weight(source, name, scale, block, config, also, activation, note)
        if isinstance(made, ForeignFloat):
            found.floats[name] = made
        else:
            found.weights[name] = made
    found.dropped |= {name for name in source if name.endswith(("input_scale_ub", "_proj_activation_scale"))}
    _require_no_rest(source, found)
    sizes = "one scale a row" if block is None else f"blocks of {block[0]}x{block[1]}"
    cached = f"; {CACHE_NOTE}" if any(CACHE_SCALES.search(name) for name in found.dropped) else ""
    found.format = f"{method} ({sizes}, {'static' if static else 'dynamic'} activations){cached}"
    return found


def _block_of(config: Mapping[str, Any], method: str) -> tuple[int, int] | None:
    block = config.get("weight_block_size", _BLOCKS[method])
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            f"quantization_config.weight_block_size is {shown(block)}, expected two sizes, as [128, 128]"
        )
    return block[0], block[1]


def _is_static(config: Mapping[str, Any]) -> bool:
    scheme = str(config.get("activation_scheme", "dynamic")).lower()
    if scheme not in ("dynamic", "static"):
        raise CheckpointError(
            f"quantization_config.activation_scheme is {shown(scheme)}, expected 'dynamic' or 'static'"
        )
    for key, known in {
        "scale_fmt": ("float", "ue8m0"),
        "fmt": ("e4m3", "float8_e4m3fn"),
        "expert_dtype": ("fp8", "fp4"),
    }.items():
        if config.get(key) not in (None, *known):
            raise CheckpointError(
                f"quantization_config.{key} is {shown(config[key])}, and this Requanto knows {' and '.join(known)}. "
                f"Install a newer one: pip install -U requanto"
            )
    return scheme == "static"


def _dtype(source: Source, name: str) -> str:
    return str(source.header(name).dtype).removeprefix("torch.")


def _is_quantized(source: Source, name: str, config: Mapping[str, Any]) -> bool:
    dtype = source.header(name).dtype
    if dtype in KINDS:
        return True
    return config.get("expert_dtype") == "fp4" and dtype in (torch.int8, torch.float4_e2m1fn_x2)


def _scale_of(source: Source, name: str) -> str:
    """The name of a weight's scale."""
    module = name.removesuffix(".weight")
    names = [module + end for end in _WEIGHT_SCALES] if module != name else [name + end for end in _OTHER_SCALES]
    scale = next((one for one in names if one in source), None)
    if scale is None:
        raise CheckpointError(
            f"{name} is {_dtype(source, name)}, and the files hold no scale for it (expected {names[0]} or one of "
            f"{', '.join(one.removeprefix(module) for one in names[1:])}): its numbers alone are not the weight. A shard is "
            f"missing, or the file was made by casting a model, which Requanto does not take for a quantized one"
        )
    return scale


def _weight(
    source: Source,
    name: str,
    scale: str,
    block: tuple[int, int] | None,
    config: Mapping[str, Any],
    also: list[str],
    activation: str,
    note: str,
) -> ForeignWeight | ForeignFloat:
    if source.header(name).dtype not in KINDS:
        return mx_weight(source, name, "qmxfp4", name, scale, also=also, note=_GROUPS.format(32))
    transposed = config["quant_method"] == "fbgemm_fp8" and len(source.header(name).shape) == 3
    return float8_weight(source, name, scale, block, also=also, activation=activation, transposed=transposed, note=note)


def _inputs(
    source: Source,
    name: str,
    scale: str,
    config: Mapping[str, Any],
    block: tuple[int, int] | None,
    static: bool,
    scales: list[str],
) -> tuple[str, str, ForeignActivation | None]:
    """How inputs run: a type for each token, what differs from the library, and a static scale.

    Embedding tables have no quantized inputs: in a checkpoint of blocks they are what has one ``weight_scale``.
    """
    module, one = name.removesuffix(".weight"), source.header(scale).shape.numel() == 1
    table = one and config.get("weight_block_size") is not None and not scale.endswith("_inv")
    if table or "embed" in module.rpartition(".")[2]:
        return "", "", None
    if config["quant_method"] == "fbgemm_fp8":
        limit = config.get("activation_scale_ub", 1200.0)
        return "qfloat8_e4m3fn", f"inputs beyond activation_scale_ub ({limit}) are not cut off", None
    if not name.endswith(".weight"):  # of experts that are stored together
        return "", "inputs of experts stay float; they were meant to be quantized to float8", None
    if static:
        stored = scales[0] if scales else module + _INPUT_SCALES[0]
        return "", "", static_scale(source, stored, name, "qfloat8_e4m3fn", scales[1:])
    if one or block is None:
        return "qfloat8_e4m3fn", "", None
    return "", _GROUPS.format(block[1]), None


def _require_no_rest(source: Source, found: ForeignCheckpoint) -> None:
    """Raises CheckpointError if there is a scale without float8 codes."""
    consumed = found.consumed
    for name in source:
        if name in consumed or not name.endswith(_ENDS):
            continue
        weight = name.rpartition(".")[0] + ".weight"
        stored = f"{weight} is {_dtype(source, weight)}" if weight in source else f"{weight} is missing"
        raise CheckpointError(
            f"the files hold the scale {name}, but {stored}, not float8: a shard is missing, or files of two checkpoints "
            f"are mixed"
        )
