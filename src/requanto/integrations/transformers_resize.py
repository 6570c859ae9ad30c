"""``resize_token_embeddings`` of quantized tables and output layers.

Transformers makes the new rows from the float values of the old ones. Here it does so in a float layer of its own; then the
new rows are quantized and put after the codes of the old rows, which do not change.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from requanto.tensor.aten import narrow
from requanto.tensor.joining import concatenate
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


def register() -> None:
    """Patches the two methods of PreTrainedModel; layers with float weights are not affected."""
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(PreTrainedModel._get_resized_embeddings, "_requanto"):
        return
    PreTrainedModel._get_resized_embeddings = _wrap_embeddings(PreTrainedModel._get_resized_embeddings)
    PreTrainedModel._get_resized_lm_head = _wrap_lm_head(PreTrainedModel._get_resized_lm_head)


def _wrap_embeddings(original: Callable) -> Callable:
    @functools.wraps(original)
    def _get_resized_embeddings(self: Any, old_embeddings: nn.Embedding, *args: Any, **kwargs: Any) -> nn.Embedding:
        weight = getattr(old_embeddings, "weight", None)
        if not isinstance(weight, QTensor) or not isinstance(old_embeddings, nn.Embedding):
            return original(self, old_embeddings, *args, **kwargs)
        stand_in = nn.Embedding(*weight.shape, padding_idx=old_embeddings.padding_idx, device="meta")
        stand_in.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        resized = original(self, stand_in, *args, **kwargs)
        _replace(weight, resized.weight, 0)
        old_embeddings.num_embeddings, old_embeddings.padding_idx = resized.num_embeddings, resized.padding_idx
        return old_embeddings

    _get_resized_embeddings._requanto = True  # type: ignore[attr-defined]
    return _get_resized_embeddings


def _wrap_lm_head(original: Callable) -> Callable:
    @functools.wraps(original)
    def _get_resized_lm_head(
        self: Any,
        old_lm_head: nn.Linear,
        new_num_tokens: int | None = None,
        transposed: bool = False,
        mean_resizing: bool = True,
    ) -> nn.Linear:
        weight = getattr(old_lm_head, "weight", None)
        if not isinstance(weight, QTensor) or not isinstance(old_lm_head, nn.Linear) or new_num_tokens is None:
            return original(self, old_lm_head, new_num_tokens, transposed, mean_resizing)
        stand_in = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        stand_in.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        stand_in.bias = old_lm_head.bias
        resized = original(self, stand_in, new_num_tokens, transposed, mean_resizing)
        _replace(weight, resized.weight, 1 if transposed else 0)
        if resized.bias is not None and resized.bias is not old_lm_head.bias:
            old_lm_head.bias = nn.Parameter(resized.bias.detach(), requires_grad=old_lm_head.bias.requires_grad)
        old_lm_head.out_features, old_lm_head.in_features = weight.shape
        return old_lm_head

    _get_resized_lm_head._requanto = True  # type: ignore[attr-defined]
    return _get_resized_lm_head


@torch.no_grad()
def _replace(weight: QTensor, values: torch.Tensor, dim: int) -> None:
    """Gives a weight as many rows as ``values`` has along ``dim``, for all that share it: the old codes, then new rows."""
    old, new = weight.shape[dim], values.shape[dim]
    if new == old:
        return
    if new < old:
        weight.data = narrow(weight, dim, 0, new).clone()
        return
    fresh = weight._quantize_like(values.detach().narrow(dim, old, new - old).contiguous(), same_codebook=True)
    fresh.activation = weight.activation
    weight.data = concatenate([weight.detach(), fresh], dim)
    logger.info("%d new rows were quantized to %s; the codes of the old ones stay", new - old, weight.qtype.name)
