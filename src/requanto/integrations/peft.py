"""Patches of PEFT for quantized weights: exact merging, DoRA, adapters on fused experts, preparation for training.

PEFT merges with ``weight.data += delta``; a weight of few bits would lose most of the delta to rounding. For a QTensor, the
adapter's two factors are stored as a low-rank term next to the codes (`lowrank`), and unmerging restores the previous
weight bit for bit. The rest of PEFT is unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import dora, variants
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import integrations as peft_integrations
from peft.utils import other as peft_other
from torch import nn

from requanto.integrations.patching import replace_everywhere
from requanto.runtime.tracing import without_autocast
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor

_DORA = (variants.DoraLinearVariant, variants._DoraConvNdVariant)


def register() -> None:
    """Patches PEFT's layers; layers whose weight is not a QTensor are not affected."""
    if hasattr(lora.Linear.merge, "_requanto"):
        return
    for layer in (lora.Linear, lora.Embedding, lora._ConvNd, lora.ParamWrapper):
        layer.merge = _where_quantized(layer.merge, merge)
        layer.unmerge = _where_quantized(layer.unmerge, unmerge)
    lora.ParamWrapper._activate_lora = _where_quantized(lora.ParamWrapper._activate_lora, activate)
    for norm in (dora.DoraLinearLayer, dora._DoraConvNdLayer):
        norm.get_weight_norm = _with_float_weight(norm.get_weight_norm)
    replace_everywhere(peft_integrations.dequantize_module_weight, _wrap_dequantize_module_weight)
    replace_everywhere(peft_other.prepare_model_for_kbit_training, _wrap_prepare_for_kbit_training)


def _where_quantized(original: Callable, ours: Callable) -> Callable:
    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (original if _weight(self) is None else ours)(self, *args, **kwargs)

    run._requanto = True  # type: ignore[attr-defined]
    return run


def _weight(layer: Any) -> QTensor | None:
    """Returns the quantized weight that a LoRA layer adapts, or None."""
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    if isinstance(getattr(weight, "_local_tensor", None), QTensor):
        raise NotImplementedError(
            "the quantized weight is sharded over several ranks (a DTensor): save the adapter, then load model and "
            "adapter in one process and merge there"
        )
    return weight if isinstance(weight, QTensor) else None


# ---------------------------------------------------------------------- merging


@dataclass
class _Merged:
    """What is needed to undo one merge."""

    before: lowrank.State
    after: lowrank.State
    factors: tuple[torch.Tensor, torch.Tensor]
    bias: torch.Tensor | None


def factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (up, down) of an adapter in the stored orientation of the weight, with gradients.

    ``up @ down`` is PEFT's ``layer.get_delta_weight(adapter)``.
    """
    weight, scaling = _weight(layer), layer.scaling[adapter]
    assert weight is not None
    if isinstance(layer, lora.Embedding):
        left, right = layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T
    else:
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        if isinstance(layer, lora._ConvNd):
            if layer.get_base_layer().groups > 1:
                raise NotImplementedError("PEFT cannot merge into a convolution with groups > 1")
            left, right = up.flatten(1), down.flatten(1)
        elif isinstance(layer, lora.ParamWrapper) and layer.num_experts > 1:
            down = down.reshape(layer.num_experts, -1, down.shape[-1])  # [E, r, in]
            up = up.reshape(up.shape[0], -1, layer.num_experts).permute(2, 0, 1)  # [E, out, r]
            left, right = (up, down) if layer._did_swap_in_out_features else (down.mT, up.mT)
        else:
            left, right = (down.T, up.T) if layer.fan_in_fan_out else (up, down)
    return lowrank.stored_orientation(weight, left * scaling, right)


@torch.no_grad()
def merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merges adapters into a quantized weight without rounding (same signature as PEFT's; always checks for NaN)."""
    own = layer.lora_embedding_A if isinstance(layer, lora.Embedding) else layer.lora_A
    for adapter in check_adapters_to_merge(layer, adapter_names):
        if adapter in own:
            _merge_one(layer, adapter)
            layer.merged_adapters.append(adapter)


def _merge_one(layer: Any, adapter: str) -> None:
    weight = _weight(layer)
    assert weight is not None
    variant = layer.lora_variant.get(adapter)
    if variant is not None and (not _is_dora(variant) or isinstance(layer, lora.Embedding)):
        raise NotImplementedError(
            f"adapter {adapter!r} ({_name(variant)}) cannot be merged exactly into a {weight.qtype.name} weight, because "
            f"its update is not a low-rank term. Leave the adapter unmerged, or merge it into the float model and quantize "
            f"afterwards."
        )
    up, down = factors(layer, adapter)
    row_factor = None if variant is None else _dora_factor(layer, adapter, weight, up, down)
    bias = _bias(layer, adapter)
    new_bias = None if bias is None else bias + layer.lora_B[adapter].bias * layer.scaling[adapter]
    for tensor in (up, down, row_factor, new_bias):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")

    before = lowrank.State.of(weight)
    lowrank.append(weight, up.to(weight.dtype), down.to(weight.dtype))
    if row_factor is not None:
        lowrank.scale_rows(weight, row_factor)
    if bias is not None and new_bias is not None:
        layer.get_base_layer().bias.data = new_bias.to(bias.dtype)
    merged = _Merged(before, lowrank.State.of(weight), (up.clone(), down.clone()), bias)
    layer.__dict__.setdefault("_requanto_merged", {})[adapter] = merged


def _name(variant: Any) -> str:
    return (variant if isinstance(variant, type) else type(variant)).__name__.removesuffix("Variant")


def _is_dora(variant: Any) -> bool:
    return issubclass(variant if isinstance(variant, type) else type(variant), _DORA)


def _dora_factor(layer: Any, adapter: str, weight: QTensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Returns DoRA's magnitude / norm per row. As in the forward, the norm is without other merged adapters."""
    earlier = [layer._requanto_merged[name] for name in layer.merged_adapters]
    base = earlier[0].before.weight(weight) if earlier else weight
    value = base.dequantize(torch.float32)
    value = (value.mT if weight.transposed else value).reshape(weight.shape[-1 if weight.transposed else 0], -1)
    with without_autocast(value.device):
        norm = (value + up.float() @ down.float()).norm(dim=1)
    return layer.lora_magnitude_vector[adapter].weight.flatten().to(norm.device, torch.float32) / norm


def _bias(layer: Any, adapter: str) -> torch.Tensor | None:
    if not getattr(layer, "lora_bias", {}).get(adapter, False):
        return None
    bias = getattr(layer.get_base_layer(), "bias", None)
    if bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
    return bias.data


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """Undoes all merges of a layer in reverse order."""
    weight = _weight(layer)
    assert weight is not None
    while layer.merged_adapters:
        adapter = layer.merged_adapters.pop()
        merged = layer.__dict__.get("_requanto_merged", {}).pop(adapter, None)
        if merged is None:
            raise RuntimeError(
                f"adapter {adapter!r} was merged before the weight was quantized, so it cannot be unmerged"
            )
        if merged.after.matches(weight):
            merged.before.restore(weight)
        elif merged.before.rows is not merged.after.rows:
            raise RuntimeError(
                f"adapter {adapter!r} (DoRA) cannot be unmerged: after the merge, another layer that shares the weight "
                f"changed it. Unmerge in the reverse order of merging, or load the model again."
            )
        else:  # another layer that shares the weight merged later: subtract only this term
            up, down = merged.factors
            lowrank.append(weight, -up.to(weight.device), down)
            lowrank.compress(weight)
        if merged.bias is not None:
            bias = layer.get_base_layer().bias
            bias.data = merged.bias.to(bias.device)


# ---------------------------------------------------------------------- adapters on parameters (fused experts)


@contextmanager
def activate(layer: Any, active_adapters: list[str]) -> Iterator[None]:
    """Inside the block, the base layer's parameter has the adapters as low-rank terms; gradients reach their factors.

    PEFT itself adds a dense delta to all experts at every forward. Here nothing is dequantized: the output is the GEMM with
    the codes plus the GEMMs with the two factors.
    """
    weight, adapters = _weight(layer), [name for name in active_adapters if name in layer.lora_A]
    assert weight is not None
    if not adapters:
        yield
        return
    found = [factors(layer, name) for name in adapters]
    ups, downs = [up for up, _ in found], [down for _, down in found]
    if weight.up is not None and weight.down is not None:
        ups.insert(0, weight.up.to(ups[0].dtype))
        downs.insert(0, weight.down.to(downs[0].dtype))
    adapted = weight.with_inner({**weight.inner_tensors(), "up": torch.cat(ups, -1), "down": torch.cat(downs, -2)})
    base, name = layer.get_base_layer(), layer.parameter_name
    parameter = base._parameters.pop(name)
    base.__dict__[name] = adapted
    try:
        yield
    finally:
        del base.__dict__[name]
        base._parameters[name] = parameter


# ---------------------------------------------------------------------- helpers of PEFT that handle QTensors


def _with_float_weight(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_weight_norm(self: Any, weight: torch.Tensor, lora_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weight, QTensor):
            weight = weight.dequantize(lora_weight.dtype)
        return original(self, weight, lora_weight, *args, **kwargs)

    return get_weight_norm


def _wrap_dequantize_module_weight(original: Callable) -> Callable:
    @functools.wraps(original)
    def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
        weight = getattr(module, "weight", None)
        return weight.dequantize() if isinstance(weight, QTensor) else original(module)

    return dequantize_module_weight


def _wrap_prepare_for_kbit_training(original: Callable) -> Callable:
    """Prepares models with QTensors here: PEFT's function skips gradient checkpointing for quantizers it does not know."""

    @functools.wraps(original)
    def prepare_model_for_kbit_training(
        model: Any,
        use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        auto_clear_cache: bool = True,
    ) -> Any:
        if not any(isinstance(parameter, QTensor) for parameter in model.parameters()):
            return original(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache)
        for parameter in model.parameters():
            parameter.requires_grad = False
            if not isinstance(parameter, QTensor) and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
        if use_gradient_checkpointing:
            arguments = gradient_checkpointing_kwargs or {}
            if arguments.get("use_reentrant", True):
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        return model

    return prepare_model_for_kbit_training
