"""Fused experts in Transformers: the experts implementation ``"requanto"``.

It runs the library's own ``grouped_mm`` implementation: tokens sorted by expert and two grouped GEMMs, which for quantized
weights call `requanto.linear.grouped_linear`. A separate name adds two things. The weights are prepacked at the first call,
as those of linear layers are. And ``generate`` does not replace it: for decoding on GPUs, ``generate`` replaces
``grouped_mm`` by ``batched_mm``, which copies the codes of every selected expert and multiplies them one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from requanto.integrations.shards import local_quantized
from requanto.linear.prepack import pack_on_first_use
from requanto.runtime.tracing import is_tracing
from requanto.tensor.qtensor import QTensor

NAME = "requanto"


def register() -> None:
    """Registers the implementation for ``model.set_experts_implementation("requanto")``."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Returns the experts' output ``[tokens, hidden]``.

    Args:
        module: the experts' module.
        hidden_states: ``[tokens, hidden]``.
        top_k_index, top_k_weights: selected experts and their routing weights, ``[tokens, top_k]``.
    """
    trains = torch.is_grad_enabled() and hidden_states.requires_grad
    if not trains and not is_tracing():
        for weight in module.parameters(recurse=False):
            if isinstance(weight, QTensor) and weight.dim() == 3:
                pack_on_first_use(weight, hidden_states.dtype, None)
    return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)


def use_requanto_experts(model: Any) -> None:
    """Switches a model with quantized experts from ``grouped_mm`` (the default) to ``requanto``; other settings stay."""
    if not any(p.dim() == 3 and (isinstance(p, QTensor) or local_quantized(p) is not None) for p in model.parameters()):
        return
    found = model.get_experts_implementation()
    if "grouped_mm" in found.values():
        model.set_experts_implementation(
            {key: NAME if value == "grouped_mm" else value for key, value in found.items()}
        )
