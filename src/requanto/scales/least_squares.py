"""Scale and shift by weighted least squares, alternating rounding and fitting.

For given codes q, scale and shift of ``min sum v (w - (s q - z))^2`` are a weighted linear regression; for given scale and
shift, the best codes are the nearest. Alternating the two never increases the sum (Lloyd's algorithm on a grid). The result
depends on the start: a part of the range from minimum to maximum. The least squared error is found from a small part at 3
bits, but models lose less from the whole range, which clips no large weight (docs/accuracy.md).
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_like

#: Part of the range between minimum and maximum to start from, by bits; for weights that all count the same, and for others.
START = {2: 0.7, 3: 0.8, 4: 0.95}
START_WEIGHTED = {2: 0.7, 3: 1.0, 4: 0.95}
#: Fits: the first gains most, a third almost nothing.
REFITS = 2
#: Distance, in codes, of the weights of a group from the nearest code up to which it counts as quantized before; not 0,
#: since such weights may have been rounded to bfloat16.
ON_GRID = 1 / 8
#: Number of weights of each group that `on_grid` tests first.
PROBES = 4


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
        affine: with a shift, or symmetric around zero.
        extremes: scale and shift of the whole range, also the result for groups that are not fitted (all weights equal, or
            quantized before).
        importance: v of the formula, ``[rows, G, group]``; None: 1 everywhere.
    """
    whole, shift = extremes
    start = (START if importance is None else START_WEIGHTED).get(kind.bits, 1.0)
    usable = whole > torch.finfo(torch.float32).tiny  # below, its reciprocal overflows
    safe = torch.where(usable, whole, torch.ones_like(whole))
    unit = safe.reciprocal().unsqueeze(-1)
    if shift is None:
        units = torch.mul(groups, unit, out=scratch_like(groups, "units"))
        fitted = _line_through_zero(units, kind, start, importance)
        return torch.where(on_grid(units) | ~usable, whole, fitted * whole), None
    # In units of the minmax codes, 0 .. top: w = safe * unit - shift.
    units = torch.add(groups, shift.unsqueeze(-1), out=scratch_like(groups, "units")).mul_(unit)
    slope, offset = _line(units, 2**kind.bits - 1, start, importance)
    unchanged = on_grid(units) | ~usable
    return torch.where(unchanged, whole, slope * whole), torch.where(unchanged, shift, shift - offset * whole)


def whole_range(groups: torch.Tensor, kind: qtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift ``[rows, G]`` that map the smallest weight of a group to the first code, the largest to the last."""
    low, high = groups.amin(-1), groups.amax(-1)  # aminmax of a short axis is ten times slower on a CPU
    return (high - low) / (2**kind.bits - 1), -low


def on_grid(units: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """Mask ``[rows, G]`` of groups that were quantized before: all weights are on codes. They must not lose accuracy again.

    Tests a few weights of each group first, and all weights only of the groups that pass.

    Args:
        units: weights in units of codes, ``[rows, G, group]``.
        start: position of the first code, ``[rows, G]``; None: a whole number.
    """

    def near(values: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        values = values.clone() if start is None else values - start.unsqueeze(-1)
        return values.sub_(values.round()).abs_().amax(-1) < ON_GRID

    found = near(units[..., :: max(1, units.shape[-1] // PROBES)], start)
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
        first = torch.mul(importance, units, out=scratch_like(units, "product")).sum(-1)
    slope = torch.full_like(first, start)
    offset = torch.full_like(first, (1 - start) / 2 * top)
    codes, product, other = (scratch_like(units, slot) for slot in ("codes", "product", "other"))
    for _ in range(REFITS):
        torch.sub(units, offset.unsqueeze(-1), out=codes)
        codes.mul_(slope.reciprocal().unsqueeze(-1)).round_().clamp_(0, top)
        counted = codes if importance is None else torch.mul(codes, importance, out=product)
        sum_q = counted.sum(-1)
        sum_qu = torch.mul(counted, units, out=other).sum(-1)
        sum_qq = codes.mul_(counted).sum(-1)
        spread = total * sum_qq - sum_q * sum_q
        # Without spread all codes are equal, and there is no line to fit.
        good = spread > 1e-6 * total * sum_qq
        slope = torch.where(good, (total * sum_qu - sum_q * first) / spread, slope)
        offset = torch.where(good, (first - slope * sum_q) / total, offset)
    return slope, offset


def _line_through_zero(units: torch.Tensor, kind: qtype, start: float, importance: torch.Tensor | None) -> torch.Tensor:
    """slope ``[rows, G]`` of ``units ~ slope * code`` for signed codes."""
    slope = torch.full_like(units[..., 0], start)
    codes, product, other = (scratch_like(units, slot) for slot in ("codes", "product", "other"))
    for _ in range(REFITS):
        torch.mul(units, slope.reciprocal().unsqueeze(-1), out=codes)
        codes.round_().clamp_(kind.qmin, kind.qmax)
        counted = codes if importance is None else torch.mul(codes, importance, out=product)
        sum_qu = torch.mul(counted, units, out=other).sum(-1)
        sum_qq = codes.mul_(counted).sum(-1)
        slope = torch.where(sum_qq > 0, sum_qu / sum_qq, slope)
    return slope
