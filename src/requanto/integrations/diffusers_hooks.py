"""Support for quantized weights in Diffusers' group offloading to disk, layerwise casting and LoRA shape expansion."""

from __future__ import annotations

import functools
import json
import logging
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from requanto.checkpoint.format import flatten, rebuild, table_of
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

_KEY = "requanto"


def register_group_offloading() -> None:
    """Replaces ``safetensors`` in Diffusers' group offloading by `save_file` and `load_file`, which handle QTensors."""
    from diffusers.hooks import group_offloading

    group_offloading.safetensors = SimpleNamespace(torch=SimpleNamespace(save_file=save_file, load_file=load_file))


def save_file(tensors: dict[str, torch.Tensor], filename: str) -> None:
    """Does `safetensors.torch.save_file` for a dict that may hold QTensors."""
    quantized = {name: t for name, t in tensors.items() if isinstance(t, QTensor)}
    metadata = None
    if quantized:
        rows = {name: [text, str(tensors[name].dtype)] for name, text in table_of(quantized.items()).items()}
        metadata = {_KEY: json.dumps(rows)}
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in flatten(tensors).items()}, filename, metadata=metadata
    )


def load_file(filename: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Loads a file that :func:`save_file` wrote."""
    loaded = safetensors.torch.load_file(filename, device=device)
    with safe_open(filename, framework="pt") as opened:
        rows = json.loads((opened.metadata() or {}).get(_KEY, "{}"))
    for name, (text, dtype) in rows.items():
        parts = {part: loaded.pop(f"{name}_{part}") for part in _stored(loaded, name)}
        # This process wrote the file, so the values are not checked again: that would read all scales.
        loaded[name] = rebuild(name, text, parts, getattr(torch, dtype.removeprefix("torch.")), check_values=False)
    return loaded


def _stored(loaded: dict[str, torch.Tensor], name: str) -> list[str]:
    return [part for part in QTensor.tensor_data_names if f"{name}_{part}" in loaded]


def register_layerwise_casting() -> None:
    """Excludes layers with quantized weights from layerwise casting: their weights are small already."""
    from diffusers.hooks import layerwise_casting

    original = layerwise_casting.apply_layerwise_casting_hook
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def apply_layerwise_casting_hook(module: Any, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(parameter, QTensor) for parameter in module.parameters()):
            logger.debug("layerwise casting skips a quantized %s", type(module).__name__)
            return
        original(module, *args, **kwargs)

    apply_layerwise_casting_hook._requanto = True
    layerwise_casting.apply_layerwise_casting_hook = apply_layerwise_casting_hook


def register_lora_expansion() -> None:
    """Dequantizes a layer's weight if a LoRA has another input width: Diffusers then rebuilds the layer in float."""
    from diffusers.loaders import lora_pipeline

    original = lora_pipeline._maybe_dequantize_weight_for_expanded_lora
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def dequantized(model: Any, module: Any) -> torch.Tensor:
        return module.weight.dequantize() if isinstance(module.weight, QTensor) else original(model, module)

    dequantized._requanto = True
    lora_pipeline._maybe_dequantize_weight_for_expanded_lora = dequantized
