"""Scale and shift of least squared error, searched from roundings that have a code at zero.

Most weights are near zero. A grid from minimum to maximum puts zero anywhere between two codes, so most weights of a group
have about the same error: small errors that do not cancel. A search for the least squared error ends near its start, so all
starts here have a code at zero, like integer zero points (Jacob et al. 2018, arXiv:1712.05877); the fit may then move it.
The squared errors are similar to those of other searches, but models are more accurate (docs/accuracy.md).

A group is rounded within its whole range and within parts of it, a straight line ``w ~ scale * code - shift`` is fitted to
each rounding, and the line with the least squared error is used. That error follows from the sums of the fit, so no second
pass over the weights is needed.
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_like
from requanto.scales.least_squares import on_grid, whole_range

#: Parts of the range from minimum to maximum that are tried, by bits.
SHARES = {2: (0.9, 0.8, 0.7), 3: (1.0, 0.95, 0.9), 4: (1.0, 0.95, 0.9)}
#: Further fits of the best line: they help at 4 bits, where few weights change their code; not with fewer bits.
REFITS = {4: 1}


def aligned(groups: torch.Tensor, kind: qtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift ``[rows, G]`` of float32 ``groups`` ``[rows, G, group]``, for affine codes of an integer type.

    Groups that were quantized before (`on_grid`), and those of equal weights, get the grid from minimum to maximum.
    """
    top = 2**kind.bits - 1
    whole, shift = whole_range(groups, kind)
    usable = whole > torch.finfo(torch.float32).tiny  # below, its reciprocal overflows
    safe = torch.where(usable, whole, torch.ones_like(whole))
    unit = safe.reciprocal()
    units = torch.mul(groups, unit.unsqueeze(-1), out=scratch_like(groups, "units"))
    bottom, mean = -shift * unit, units.mean(-1)
    unchanged = on_grid(units, bottom) | ~usable

    shares = SHARES.get(kind.bits, (1.0,))
    lines, codes = _Lines(units, mean, len(shares)), scratch_like(units, "codes")
    zeros = [((bottom + top * (1 - share) / 2) / -share).round_().unsqueeze_(-1) for share in shares]
    for place, (share, zero) in enumerate(zip(shares, zeros, strict=True)):
        torch.add(zero, units, alpha=1 / share, out=codes).round_()
        if share < 1:  # with share 1 no weight is more than half a code out of range
            codes.clamp_(0, top)
        lines.add_rounding(codes, place)
    slope, offset, found = lines.best()
    for _ in range(REFITS.get(kind.bits, 0)):
        torch.sub(units, offset.unsqueeze(-1), out=codes)
        codes.mul_(slope.reciprocal().unsqueeze_(-1)).round_().clamp_(0, top)
        lines = _Lines(units, mean, 1)
        lines.add_rounding(codes, 0)
        again = lines.best()
        slope, offset = torch.where(again[2], again[0], slope), torch.where(again[2], again[1], offset)
    fitted = unchanged.logical_not_().logical_and_(found)
    return torch.where(fitted, slope.mul_(safe), whole), torch.where(fitted, offset.mul_(safe).neg_(), shift)


class _Lines:
    """Fits straight lines ``units ~ slope * code + offset`` to the codes of several roundings.

    Values per group are computed for all roundings in one operator, since small operators are dominated by overhead.
    """

    def __init__(self, units: torch.Tensor, mean: torch.Tensor, roundings: int) -> None:
        self.units, self.mean = units, mean
        self.product = scratch_like(units, "product")
        self.sums = units.new_empty(3, roundings, *units.shape[:-1])

    def add_rounding(self, codes: torch.Tensor, place: int) -> None:
        """Stores the sums of rounding number ``place``; overwrites ``codes``."""
        q, qu, qq = self.sums[:, place].unbind()
        torch.sum(codes, -1, out=q)
        torch.sum(torch.mul(codes, self.units, out=self.product), -1, out=qu)
        torch.sum(codes.square_(), -1, out=qq)

    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """slope and offset of the line with the least squared error, and whether there is a line.

        There is none if all codes are equal or the slope would be negative.
        """
        q, qu, qq = self.sums.div_(self.units.shape[-1]).unbind()
        covariance = qu.addcmul_(q, self.mean, value=-1).clamp_(min=0)
        least = (1e-6 * qq).add_(1e-12)  # codes are 0, 1, 2 ...: a variance below this is rounding error
        slope = covariance / torch.maximum(qq.addcmul_(q, q, value=-1), least, out=least)
        most, place = covariance.mul_(slope).max(0, keepdim=True)
        slope, q = slope.gather(0, place).squeeze_(0), q.gather(0, place).squeeze_(0)
        return slope, torch.addcmul(self.mean, slope, q, value=-1), most.squeeze_(0) > 0
