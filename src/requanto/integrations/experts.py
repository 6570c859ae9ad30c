"""Fused experts in Transformers: the experts implementation ``"requanto"``.

The computation is the library's own ``grouped_mm``: tokens sorted by expert and two grouped products, which meet quantized
weights in `requanto.linear.grouped_linear`. A name of our own adds two things. The weights are packed for their kernel at
the first call, as those of linear layers are. And ``generate`` leaves it alone: it replaces ``grouped_mm`` by ``batched_mm``
for decoding on GPUs, which copies the codes of every chosen expert and multiplies them one by one.
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
    """Makes the implementation known to the library: ``model.set_experts_implementation("requanto")``."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """``[tokens, hidden]`` from tokens ``[tokens, hidden]``, their experts and those' weights ``[tokens, top_k]``."""
    trains = torch.is_grad_enabled() and hidden_states.requires_grad
    if not trains and not is_tracing():
        for weight in module.parameters(recurse=False):
            if isinstance(weight, QTensor) and weight.dim() == 3:
                pack_on_first_use(weight, hidden_states.dtype, None)
    return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)


def use_for(model: Any) -> None:
    """Switches a model with quantized experts from ``grouped_mm``, the library's default; other choices stay."""
    if not any(p.dim() == 3 and (isinstance(p, QTensor) or local_quantized(p) is not None) for p in model.parameters()):
        return
    found = model.get_experts_implementation()
    if "grouped_mm" in found.values():
        model.set_experts_implementation(
            {key: NAME if value == "grouped_mm" else value for key, value in found.items()}
        )
