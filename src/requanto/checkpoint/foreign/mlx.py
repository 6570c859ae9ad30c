"""MLX checkpoints (mlx-lm, mlx-vlm): ``quantization: {group_size, bits, mode}`` in config.json, and no quant_method.

    M.weight   uint32 [..., N, K * bits / 32]: our bytes
    M.scales   [..., N, K / group_size]; of the modes mxfp4, mxfp8 and nvfp4 uint8: e8m0, e8m0 and e4m3
    M.biases   of mode affine, as the scales: w = scales * code + biases, so our shift is -biases
    M.global_scale   of mode nvfp4, if it has one: float32, one for each expert; scales are multiplied by it / 2688

Scales of mode affine are negative where the smallest weight of a group is the largest in size.

Names are those of the model's modules in mlx-lm, which are mostly the ones of Transformers. Changed back are: experts that
are stacked in ``switch_mlp``, kernels of one-dimensional convolutions (channels last), and the norms of Qwen3-Next and
Qwen3.5, to which mlx-lm adds 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.integers import SCALES, need_codes
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: mode -> our type, bits, group size
_BLOCKS = {"mxfp4": ("qmxfp4", 4, 32), "mxfp8": ("qmxfp8_e4m3", 8, 32), "nvfp4": ("qnvfp4", 4, 16)}
_BITS = (1, 2, 3, 4, 5, 6, 8)
#: a tensor's largest number -> its scale of NVFP4: divided by the largest e4m3 and e2m1 numbers, 448 * 6
_NVFP4_RANGE = 2688.0
#: names of an expert's layers where its parent is called so; elsewhere they stay
_EXPERT_NAMES = {"block_sparse_moe": {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}}
#: models whose norms mlx-lm stores as 1 + weight
_NORMS_PLUS_ONE = ("qwen3_next", "qwen3_5")
_NORMS = (
    *(".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight"),
    *(".q_norm.weight", ".k_norm.weight"),
)


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """See `requanto.checkpoint.foreign.readers`."""
    text = description.get("text_config")
    for holder in (description, text if isinstance(text, Mapping) else {}):
        for key in ("quantization", "quantization_config"):
            config = holder.get(key)
            if not isinstance(config, Mapping) or "quant_method" in config or not {"group_size", "bits"} <= set(config):
                continue
            if any(True for _ in _modules(source)):
                return {"quant_method": "mlx", "model_type": description.get("model_type"), **config}
    return None


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """See `requanto.checkpoint.foreign.readers`."""
    mode, bits, group = _setting(config, config, "quantization")
    words = f"{bits} bits, group size {group}" if mode == "affine" else mode
    found = ForeignCheckpoint(format=f"MLX, {words}")
    for module in sorted(_modules(source)):
        own = config.get(module)
        if own is False:
            raise CheckpointError(f"quantization[{shown(module)}] is false, and {module}.weight is quantized")
        setting = _setting(own, config, f"quantization[{shown(module)}]") if isinstance(own, Mapping) else None
        _add(found, source, module, *(setting or (mode, bits, group)))
    consumed = found.consumed
    for name in source:
        if name.endswith(".weight") and name not in consumed and source.header(name).dtype == torch.uint32:
            source.need(f"{name.removesuffix('.weight')}.scales", name)
    need_codes(source, ("weight",), "scales", "biases")
    if not found.weights:
        raise CheckpointError(
            "the config says that weights are quantized by MLX, and no file holds scales beside uint32 codes: it is another "
            "checkpoint's config"
        )
    _add_floats(found, source, str(config.get("model_type") or ""))
    return found


def _modules(source: Source) -> Iterator[str]:
    for name in source:
        module = name.removesuffix(".scales")
        if module != name and f"{module}.weight" in source and source.header(f"{module}.weight").dtype == torch.uint32:
            yield module


def _setting(config: Mapping[str, Any], default: Mapping[str, Any], where: str) -> tuple[str, int, int]:
    """Mode, bits and group size.

    Raises:
        CheckpointError: MLX has no such mode.
    """
    mode = config.get("mode", default.get("mode") if "bits" not in config else None) or "affine"
    bits, group = config.get("bits", default.get("bits")), config.get("group_size", default.get("group_size"))
    if mode == "affine":
        fits = type(bits) is int and bits in _BITS and type(group) is int and 1 <= group < 2**20
    else:
        fits = isinstance(mode, str) and _BLOCKS.get(mode, ())[1:] == (bits, group)
    if not fits:
        raise CheckpointError(
            f"{where} in the config has mode {shown(mode)}, bits {shown(bits)} and group_size {shown(group)}; MLX has "
            f"affine with 1 to 6 or 8 bits, mxfp4 (4 bits, 32), mxfp8 (8, 32) and nvfp4 (4, 16)"
        )
    return mode, bits, group


def _add(found: ForeignCheckpoint, source: Source, module: str, mode: str, bits: int, group: int) -> None:
    name = f"{module}.weight"
    names = {part: f"{module}.{part}" for part in ("weight", "scales")}
    shape = source.need(name, name).shape
    if len(shape) not in (2, 3) or shape[-1] * 32 % bits:
        raise CheckpointError(f"{name} is uint32 {tuple(shape)}, expected words of codes of {bits} bits")
    k = shape[-1] * 32 // bits
    lead = shape[:-1]
    if k % group:
        raise CheckpointError(f"{name} has {shape[-1]} words, and rows of {k} codes are no groups of {group}")
    grouped = (*lead, k // group)
    source.need_shape(names["scales"], name, grouped, *(SCALES if mode == "affine" else (torch.uint8,)))
    if mode == "affine":
        names["biases"] = f"{module}.biases"
        source.need_shape(names["biases"], name, grouped, source.header(names["scales"]).dtype)
        kind = f"{'quint' if bits in (1, 8) else 'qint'}{bits}"
    else:
        kind = _BLOCKS[mode][0]
        if f"{module}.global_scale" in source and mode == "nvfp4":
            names["global_scale"] = f"{module}.global_scale"
            source.need_shape(names["global_scale"], name, lead[:-1], torch.float32)
    words = [f"group={group}"] if group < k else []
    words += ["affine"] if mode == "affine" else []
    experts = _experts(module, lead[0]) if len(lead) == 2 else None
    words += ["axis=1"] if len(lead) == 2 and experts is None else []
    words += ["signed"] if mode == "affine" else []

    def build(source: Source, expert: int | None = None) -> Parts:
        stored = {part: source[whole] for part, whole in names.items()}
        if expert is not None:
            stored = {part: value[expert] for part, value in stored.items()}
        codes = stored["weight"].contiguous().view(torch.uint8)
        parts = {"qdata": codes.view(torch.float8_e4m3fn) if mode == "mxfp8" else codes, "scale": stored["scales"]}
        if mode == "affine":
            parts["shift"] = -stored["biases"]
        if mode == "nvfp4":
            scale = stored.get("global_scale", torch.full((), _NVFP4_RANGE, dtype=torch.float32, device=codes.device))
            parts["row_scale"] = (
                (scale / _NVFP4_RANGE).view(*scale.shape, 1, 1).expand(*codes.shape[:-1], 1).contiguous()
            )
        return parts

    line = [kind, "x".join(map(str, (*lead, k))), *words]
    if experts is None:
        found.weights[name] = ForeignWeight(" ".join(line), tuple(names.values()), build)
        return
    line[1] = f"{lead[1]}x{k}"
    for index, expert in enumerate(experts):
        found.weights[expert] = ForeignWeight(
            " ".join(line), tuple(names.values()), lambda source, index=index: build(source, index)
        )


def _experts(module: str, count: int) -> list[str] | None:
    """Names of the weights of experts that mlx-lm stacks; None: the model has such weights itself."""
    parent, _, layer = module.rpartition(".")
    above = parent.removesuffix(".switch_mlp")
    if above == parent:
        return None
    layer = _EXPERT_NAMES.get(above.rpartition(".")[2], {}).get(layer, layer)
    return [f"{above}.experts.{expert}.{layer}.weight" for expert in range(count)]


def _add_floats(found: ForeignCheckpoint, source: Source, model_type: str) -> None:
    """Tensors whose values mlx-lm changed, beside the quantized ones."""
    swapped, consumed = False, found.consumed
    for name in source:
        head = source.header(name)
        if name in consumed or not head.dtype.is_floating_point or len(head.shape) != 3:
            continue
        channels, width, inputs = head.shape  # one filter a channel: torch wants [channels, 1, width]
        if name.endswith((".conv1d.weight", ".conv.conv.weight", ".conv.weight")) and inputs == 1 < width:
            swapped = True
            found.floats[name] = ForeignFloat(
                torch.Size([channels, 1, width]),
                head.dtype,
                (name,),
                lambda source, name=name: source[name].transpose(1, 2).contiguous(),
            )
    if not swapped or not model_type.startswith(_NORMS_PLUS_ONE):
        return
    for name in source:
        head = source.header(name)
        if name.endswith(_NORMS) and len(head.shape) == 1 and head.dtype.is_floating_point:
            found.floats[name] = ForeignFloat(
                head.shape,
                head.dtype,
                (name,),
                lambda source, name=name: (source[name].float() - 1).to(source.header(name).dtype),
            )
