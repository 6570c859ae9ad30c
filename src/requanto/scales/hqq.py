"""HQQ, half-quadratic quantization, in float32: the shift (without one: the scale) of the least |error|^0.7.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Beside the codes there is a second
variable for the errors that are accepted, e; each is solved for in turn:

    e     = shrink(w - dequantized),   shrink(x) = sign(x) max(0, |x| - |x|^-0.3 / beta)
    shift = mean of the shifts that the weights less e ask for

The scale stays that of the whole range: outliers are not cut. The shift starts from a whole number of steps, so that 0 is
one of the values; the weights near it, most of a group, lie on a value then. That start is worth more than all rounds
after it (docs/accuracy.md). Errors below 0.17 shrink to nothing, which is all errors of a usual model: what is left is a
shift with which the errors of a group add up to 0. `optimizers.HqqOptimizer` is optimum-quanto's, bit for bit.
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch
from requanto.scales.least_squares import on_grid

POWER = 0.7
BETA = 10.0
#: growth of beta a round
KAPPA = 1.01
#: of the shift: the published 20 gain little over 5
ROUNDS = 5
#: of the scale, where there is no shift
ROUNDS_SYMMETRIC = 20


def hqq(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift ``[rows, G]`` of float32 ``groups`` ``[rows, G, group]``; groups on a grid already keep theirs."""
    if not affine:
        return _symmetric(groups, kind), None
    top = 2.0**kind.bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / top
    usable = scale > torch.finfo(torch.float32).tiny  # below, its reciprocal overflows
    safe = torch.where(usable, scale, torch.ones_like(scale))
    unit = safe.reciprocal()
    # In units of the minmax codes, 0 .. top: w = safe * (code - offset) + low.
    units = torch.sub(groups, low, out=scratch(groups, "units")).mul_(unit)
    zero = -low * unit
    offset = zero.round() - zero
    codes = scratch(groups, "codes")
    # No error is larger than two steps.
    small = bool(2 * safe.amax() <= BETA ** (1 / (POWER - 2))) if safe.numel() else True
    beta = BETA
    for _ in range(ROUNDS):
        torch.add(units, offset, out=codes).round_().clamp_(0, top)
        asked = codes.sub_(units)
        if not small:
            asked = asked + _shrunk((offset - asked) * safe, beta) * unit
            beta *= KAPPA
        offset = asked.mean(-1, keepdim=True)
    kept = on_grid(units).unsqueeze(-1) | ~usable
    return scale.squeeze(-1), torch.where(kept, -low, safe * offset - low).squeeze(-1)


def _shrunk(error: torch.Tensor, beta: float) -> torch.Tensor:
    """The errors that are accepted."""
    size = error.abs()
    return (size - size.clamp(min=1e-12).pow(POWER - 1) / beta).clamp_(min=0).copysign_(error)


def _symmetric(groups: torch.Tensor, kind: qtype) -> torch.Tensor:
    """The scale alone is fitted; a group stops where it gets no better."""
    high, low = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    scale = torch.maximum(high / kind.qmax, low / kind.qmin)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    best, least = safe, torch.full_like(safe, torch.inf)
    beta = BETA
    for _ in range(ROUNDS_SYMMETRIC):
        codes = (groups / safe).round_().clamp_(kind.qmin, kind.qmax)
        error = groups - codes * safe
        mean = error.abs().clamp(min=1e-12).pow(POWER).mean(-1, keepdim=True)
        better = mean < least
        least, best = torch.where(better, mean, least), torch.where(better, safe, best)
        if not bool(better.any()):
            break
        kept = groups - _shrunk(error, beta)
        fitted = (codes * kept).sum(-1, keepdim=True) / (codes * codes).sum(-1, keepdim=True)
        safe = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, safe)
        beta *= KAPPA
    return torch.where(scale > 0, best, scale).squeeze(-1)
