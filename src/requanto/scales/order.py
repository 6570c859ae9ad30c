"""Columns that are stored in another order than the weight's: GPTQ with ``desc_act`` groups them by their importance.

    W[:, order] = stored        W x = stored x[order]

So the GEMM only needs x in another order, and the result of the transposed one moved back.
"""

from __future__ import annotations

import torch


def in_order(values: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """``values[..., order]``.

    Args:
        values: ``[..., N, K]``, or ``[..., K]`` with an order of one axis.
        order: int32 ``[..., K]``: for each matrix its own.
    """
    if order.dim() == 1:
        return values.index_select(-1, order)
    return values.gather(-1, order.long().unsqueeze(-2).expand(values.shape))


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutations that undo ``order``, int32 ``[..., K]``."""
    places = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
    return torch.zeros_like(order).scatter(-1, order.long(), places.expand(order.shape))
