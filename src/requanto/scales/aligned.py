"""Scale and shift of least squared error, from roundings that have a code at zero.

Weights crowd around zero. A grid from minimum to maximum puts zero anywhere between two codes, so that most weights of a
group are off to one side, all by about the same: small errors that do not cancel. A search for the least squared error ends
near where it starts, so all starts here have a code at zero, as integer zero points have it (Jacob et al. 2018,
arXiv:1712.05877); the fit may then move it. The squared errors are like those of other searches; what they do to a model's
answer is not: docs/accuracy.md.

A group is rounded within its whole range and within parts of it, a straight line ``w ~ scale * code - shift`` is fitted to
each rounding, and the one that explains most is kept. No weight is looked at a second time for that: how much a line
explains follows from the sums it is made of.
"""

from __future__ import annotations

import torch

from requanto.qtypes import qtype
from requanto.workspace import scratch

#: Parts of the range from minimum to maximum that are tried, by bits.
SHARES = {2: (0.9, 0.8, 0.7), 3: (1.0, 0.95, 0.9), 4: (1.0, 0.95, 0.9)}
#: Codes by which each weight of a group that was quantized before may lie beside one: rounding to bfloat16 moved it.
ON_GRID = 1 / 8
#: How many weights of a group are looked at first to tell that it was not quantized before.
LOOKED_AT = 4


def aligned(groups: torch.Tensor, kind: qtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift ``[rows, G]`` of float32 ``groups`` ``[rows, G, group]``, for the affine codes of an integer type.

    Groups that were quantized before, and those of equal weights, keep the grid from their minimum to their maximum.
    """
    top, count = 2**kind.bits - 1, groups.shape[-1]
    low, high = groups.amin(-1), groups.amax(-1)
    whole = (high - low).div_(top)
    usable = whole > torch.finfo(torch.float32).tiny  # below, its reciprocal overflows
    safe = torch.where(usable, whole, torch.ones_like(whole))
    unit = safe.reciprocal()
    units = torch.mul(groups, unit.unsqueeze(-1), out=scratch(groups, "units"))
    bottom, mean = low * unit, units.mean(-1)
    kept = _on_grid(units, bottom) | ~usable

    codes, product = scratch(units, "codes"), scratch(units, "product")
    slope = offset = explained = torch.zeros_like(mean)
    for share in SHARES.get(kind.bits, (1.0,)):
        zero = ((bottom + top * (1 - share) / 2) / -share).round_()
        torch.add(zero.unsqueeze(-1), units, alpha=1 / share, out=codes).round_().clamp_(0, top)
        mean_q = codes.sum(-1).div_(count)
        mean_qu = torch.mul(codes, units, out=product).sum(-1).div_(count)
        mean_qq = codes.square_().sum(-1).div_(count)
        covariance = mean_qu - mean_q * mean
        spread = mean_qq - mean_q * mean_q
        steep = covariance / spread
        gain = steep * covariance
        # No spread: all codes are equal, and a line has no slope. (NaN is not greater either.)
        better = (gain > explained) & (spread > 1e-6 * mean_qq)
        explained = torch.where(better, gain, explained)
        slope = torch.where(better, steep, slope)
        offset = torch.where(better, mean - steep * mean_q, offset)
    fitted = (explained > 0) & ~kept
    return torch.where(fitted, slope * safe, whole), torch.where(fitted, offset.mul_(safe).neg_(), -low)


def _on_grid(units: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    """Which groups were quantized before: their weights lie on the codes already, and nothing may be lost again.

    A few weights of each group tell that it was not, so that all of them are looked at only where there is a reason to.
    """

    def near(values: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        values = values - start.unsqueeze(-1)
        return values.sub_(values.round()).abs_().amax(-1) < ON_GRID

    found = near(units[..., :: max(1, units.shape[-1] // LOOKED_AT)], bottom)
    if bool(found.any()):
        suspects = found.nonzero(as_tuple=True)
        found[suspects] = near(units[suspects], bottom[suspects])
    return found
