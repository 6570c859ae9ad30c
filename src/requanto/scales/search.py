"""Searches: how the scale (and shift) of a group of weights is chosen, without data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.qtypes import qtype
from requanto.scales.float8 import float8_scale

#: ``search(groups, kind, affine) -> (scale, shift or None)`` for float32 ``groups`` of shape ``[rows, G, group]``.
ScaleSearch = Callable[[torch.Tensor, qtype, bool], tuple[torch.Tensor, torch.Tensor | None]]


def minmax(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) that map the smallest and the largest weight of a group onto the outermost codes.

    The two codes of a single bit stand for the mean plus and minus the mean distance from it, which is optimal for the
    signs around it (Rastegari et al. 2016, XNOR-Net): the extremes would be worse than no weights at all.
    """
    if affine and kind.bits == 1:
        mean = groups.mean(-1)
        distance = (groups - mean.unsqueeze(-1)).abs().mean(-1)
        return 2 * distance, distance - mean
    if affine:
        low, high = groups.amin(-1), groups.amax(-1)  # aminmax of a short axis is ten times slower on a CPU
        return (high - low) / (2**kind.bits - 1), -low
    if kind.is_codebook:
        return groups.abs().amax(-1) / kind.span, None
    if kind.bits == 8:
        return groups.abs().amax(-1) / kind.qmax, None
    # Signed codes reach one further down than up (-8 .. 7): each side needs its own scale, the larger one serves both.
    low, high = groups.amin(-1), groups.amax(-1)
    return torch.maximum(high.clamp(min=0) / kind.qmax, low.clamp(max=0) / kind.qmin), None


def mse(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale of the least squared error among candidates."""
    return float8_scale(groups, kind), None


def default_search(kind: qtype) -> ScaleSearch:
    """What is used where no search is named: the least squared error for float8, minmax for integers."""
    return mse if kind.is_floating_point and kind.bits == 8 else minmax
