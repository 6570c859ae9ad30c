"""Straight-through estimator: rounded values in forward, an unchanged gradient in backward.

Bengio et al. 2013, arXiv:1308.3432.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.dtypes.float8 import rounded_to_float8
from requanto.dtypes.qtypes import qtype
from requanto.scales.blocks import round_blocks


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounded(value.detach())

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


def straight_through(value: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """``rounded(value)``, with the gradient passed to ``value`` unchanged."""
    return _Through.apply(value, rounded)


def round_per_token(value: torch.Tensor, kind: qtype, dims: int = 1) -> torch.Tensor:
    """``value`` rounded to ``kind``, with one absmax scale for each slice over the last ``dims`` axes, or in blocks along
    the last axis (NVFP4, MX).

    Computed in float32, returned in value's dtype; straight-through gradient.
    """

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        if kind.blocks is not None:
            return round_blocks(x, kind)
        wide = x.float()
        scale = wide.abs().amax(list(range(-dims, 0)), keepdim=True) / kind.qmax
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = (wide / scale).clamp(kind.qmin, kind.qmax)
        codes = rounded_to_float8(codes, kind.dtype) if kind.is_floating_point else codes.round()
        return (codes * scale).to(x.dtype)

    return straight_through(value, rounded)
