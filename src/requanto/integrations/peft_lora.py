"""LoRA on quantized weights: its factors as a low-rank term, DoRA's factors of rows, and adapters on fused experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.lora import variants

from requanto.runtime.tracing import without_autocast
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor

_DORA = (variants.DoraLinearVariant, variants._DoraConvNdVariant)
#: layers whose update is the product of two factors of the layer
FACTORED = (lora.Linear, lora.Embedding, lora._ConvNd, lora.ParamWrapper)


def weight_of(layer: Any) -> QTensor | None:
    """Returns the quantized weight that a LoRA layer adapts, or None."""
    weight = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"), None)
    return weight if isinstance(weight, QTensor) else None


def has_factors(layer: Any, adapter: str) -> bool:
    """True if the adapter's update of the weight is a product of two factors, with DoRA's factors of rows or without."""
    if not isinstance(layer, FACTORED):
        return False
    variant = layer.lora_variant.get(adapter)
    return variant is None or (is_dora(variant) and not isinstance(layer, lora.Embedding))


def own_adapters(layer: Any) -> Any:
    """The adapters of a LoRA layer, by name."""
    return layer.lora_embedding_A if isinstance(layer, lora.Embedding) else layer.lora_A


def factors(layer: Any, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (up, down) of an adapter in the stored orientation of the weight, with gradients.

    ``up @ down`` is PEFT's ``layer.get_delta_weight(adapter)``.
    """
    weight, scaling = weight_of(layer), layer.scaling[adapter]
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


def is_dora(variant: Any) -> bool:
    """True for DoRA on a linear layer or a convolution."""
    return issubclass(variant if isinstance(variant, type) else type(variant), _DORA)


def dora_factor(layer: Any, adapter: str, base: QTensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Returns DoRA's magnitude / norm per row. As in the forward, ``base`` is the weight without other merged adapters."""
    value = base.dequantize(torch.float32)
    value = (value.mT if base.transposed else value).reshape(base.shape[-1 if base.transposed else 0], -1)
    with without_autocast(value.device):
        norm = (value + up.float() @ down.float()).norm(dim=1)
    return layer.lora_magnitude_vector[adapter].weight.flatten().to(norm.device, torch.float32) / norm


def bias_after(layer: Any, adapter: str) -> torch.Tensor | None:
    """The base layer's bias with the adapter's (``lora_bias=True``) added; None if the adapter has none."""
    if not getattr(layer, "lora_bias", {}).get(adapter, False):
        return None
    bias = getattr(layer.get_base_layer(), "bias", None)
    if bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
    return (bias.data + layer.lora_B[adapter].bias * layer.scaling[adapter]).to(bias.dtype)


@contextmanager
def activate(layer: Any, active_adapters: list[str]) -> Iterator[None]:
    """Inside the block, the base layer's parameter has the adapters as low-rank terms; gradients reach their factors.

    PEFT itself adds a dense delta to all experts at every forward. Here nothing is dequantized: the output is the GEMM with
    the codes plus the GEMMs with the two factors.
    """
    weight, adapters = weight_of(layer), [name for name in active_adapters if name in layer.lora_A]
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
