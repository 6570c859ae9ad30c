"""Scale and shift by weighted least squares: rounding and refitting in turns, from a range somewhat within the extremes.

For given codes q the best scale and shift of ``min sum v (w - (s q - z))^2`` are those of a weighted straight line; for
given scale and shift the best codes are the nearest. Doing one after the other never makes the sum larger (Lloyd's algorithm
on a grid). Where it ends depends on where it starts: 0.95 of the range from minimum to maximum does best at 4 bits.
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch

#: Part of the range between minimum and maximum to start from, by bits.
START = {2: 0.7, 3: 0.8, 4: 0.95}
#: Refits: the first gains most, the third next to nothing.
REFITS = 2
#: Codes by which each weight of a group that was quantized before may lie beside one: rounding to bfloat16 moved it.
ON_GRID = 1 / 8
#: How many weights of a group are looked at first to tell that it was not quantized before.
LOOKED_AT = 4


def least_squares(
    groups: torch.Tensor,
    kind: qtype,
    affine: bool,
    extremes: tuple[torch.Tensor, torch.Tensor | None],
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) ``[rows, G]`` of float32 ``groups`` ``[rows, G, group]``.

    Args:
        groups: the weights.
        kind: an integer type.
        affine: with a shift, or around zero.
        extremes: scale and shift of the whole range, which a group keeps where there is nothing to fit (all weights equal).
        importance: v of the formula, ``[rows, G, group]``; None: 1 everywhere.
    """
    whole, shift = extremes
    usable = whole > torch.finfo(torch.float32).tiny  # below, its reciprocal overflows
    safe = torch.where(usable, whole, torch.ones_like(whole))
    unit = safe.reciprocal().unsqueeze(-1)
    if shift is None:
        units = torch.mul(groups, unit, out=scratch(groups, "units"))
        fitted = _line_through_zero(units, kind, importance)
        return torch.where(on_grid(units) | ~usable, whole, fitted * whole), None
    # In units of the minmax codes, 0 .. top: w = safe * unit - shift.
    units = torch.add(groups, shift.unsqueeze(-1), out=scratch(groups, "units")).mul_(unit)
    slope, offset = _line(units, 2**kind.bits - 1, START.get(kind.bits, 1.0), importance)
    kept = on_grid(units) | ~usable
    return torch.where(kept, whole, slope * whole), torch.where(kept, shift, shift - offset * whole)


def whole_range(groups: torch.Tensor, kind: qtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift ``[rows, G]`` that map the smallest weight of a group onto the first code, the largest onto the last
    one."""
    low, high = groups.amin(-1), groups.amax(-1)  # aminmax of a short axis is ten times slower on a CPU
    return (high - low) / (2**kind.bits - 1), -low


def on_grid(units: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """Which groups were quantized before: their weights lie on the codes already, and nothing may be lost again.

    A few weights of each group tell that it was not, so that all of them are looked at only where there is a reason to.

    Args:
        units: weights in units of codes, ``[rows, G, group]``.
        start: where the codes begin, ``[rows, G]``; None: at a whole number.
    """

    def near(values: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        values = values.clone() if start is None else values - start.unsqueeze(-1)
        return values.sub_(values.round()).abs_().amax(-1) < ON_GRID

    found = near(units[..., :: max(1, units.shape[-1] // LOOKED_AT)], start)
    if bool(found.any()):
        suspects = found.nonzero(as_tuple=True)
        found[suspects] = near(units[suspects], None if start is None else start[suspects])
    return found


def _line(
    units: torch.Tensor, top: int, start: float, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """slope, offset ``[rows, G]`` of ``units ~ slope * code + offset``."""
    if importance is None:
        total, first = float(units.shape[-1]), units.sum(-1)
    else:
        total = importance.sum(-1)
        first = torch.mul(importance, units, out=scratch(units, "product")).sum(-1)
    slope = torch.full_like(first, start)
    offset = torch.full_like(first, (1 - start) / 2 * top)
    codes, product, other = (scratch(units, slot) for slot in ("codes", "product", "other"))
    for _ in range(REFITS):
        torch.sub(units, offset.unsqueeze(-1), out=codes)
        codes.mul_(slope.reciprocal().unsqueeze(-1)).round_().clamp_(0, top)
        counted = codes if importance is None else torch.mul(codes, importance, out=product)
        sum_q = counted.sum(-1)
        sum_qu = torch.mul(counted, units, out=other).sum(-1)
        sum_qq = codes.mul_(counted).sum(-1)
        spread = total * sum_qq - sum_q * sum_q
        # No spread: all codes that count are equal.
        good = spread > 1e-6 * total * sum_qq
        slope = torch.where(good, (total * sum_qu - sum_q * first) / spread, slope)
        offset = torch.where(good, (first - slope * sum_q) / total, offset)
    return slope, offset


def _line_through_zero(units: torch.Tensor, kind: qtype, importance: torch.Tensor | None) -> torch.Tensor:
    """slope ``[rows, G]`` of ``units ~ slope * code`` for signed codes."""
    slope = torch.full_like(units[..., 0], START.get(kind.bits, 1.0))
    codes, product, other = (scratch(units, slot) for slot in ("codes", "product", "other"))
    for _ in range(REFITS):
        torch.mul(units, slope.reciprocal().unsqueeze(-1), out=codes)
        codes.round_().clamp_(kind.qmin, kind.qmax)
        counted = codes if importance is None else torch.mul(codes, importance, out=product)
        sum_qu = torch.mul(counted, units, out=other).sum(-1)
        sum_qq = codes.mul_(counted).sum(-1)
        slope = torch.where(sum_qq > 0, sum_qu / sum_qq, slope)
    return slope
