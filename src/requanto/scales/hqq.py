"""HQQ, half-quadratic quantization, in float32: the shift (without one: the scale) of least |error|^0.7.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". In addition to the codes there is a
variable e for the accepted errors. The method alternates:

    e     = shrink(w - dequantized),   shrink(x) = sign(x) max(0, |x| - |x|^-0.3 / beta)
    shift = mean over the group of scale * code - (w - e)

The scale is that of the whole range: outliers are not clipped. The initial shift is a whole number of steps, so that 0 and
the many weights near it are exact. That start improves accuracy more than all rounds after it (docs/accuracy.md). Errors
below 0.17 shrink to 0; in usual models these are all errors, and the shift then makes the errors of a group sum to 0.
`optimizers.HqqOptimizer` is optimum-quanto's version, bit for bit.
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_like
from requanto.scales.least_squares import on_grid

POWER = 0.7
BETA = 10.0
#: growth of beta per round
KAPPA = 1.01
#: rounds for the shift; the published 20 gain little over 5
ROUNDS = 5
#: rounds for the scale of types without a shift
ROUNDS_SYMMETRIC = 20


def hqq(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift ``[rows, G]`` of float32 ``groups`` ``[rows, G, group]``; see `on_grid` for quantized groups."""
    if not affine:
        return _symmetric(groups, kind), None
    top = 2.0**kind.bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / top
    usable = scale > torch.finfo(torch.float32).tiny  # below, its reciprocal overflows
    safe = torch.where(usable, scale, torch.ones_like(scale))
    unit = safe.reciprocal()
    # In units of the minmax codes, 0 .. top: w = safe * (code - offset) + low.
    units = torch.sub(groups, low, out=scratch_like(groups, "units")).mul_(unit)
    zero = -low * unit
    offset = zero.round() - zero
    codes = scratch_like(groups, "codes")
    # Errors are at most two steps. Small ones all shrink to 0.
    small = bool(2 * safe.amax() <= BETA ** (1 / (POWER - 2))) if safe.numel() else True
    beta = BETA
    for _ in range(ROUNDS):
        torch.add(units, offset, out=codes).round_().clamp_(0, top)
        offsets = codes.sub_(units)
        if not small:
            offsets = offsets + _shrunk((offset - offsets) * safe, beta) * unit
            beta *= KAPPA
        offset = offsets.mean(-1, keepdim=True)
    unchanged = on_grid(units).unsqueeze(-1) | ~usable
    return scale.squeeze(-1), torch.where(unchanged, -low, safe * offset - low).squeeze(-1)


def _shrunk(error: torch.Tensor, beta: float) -> torch.Tensor:
    """The accepted errors e of the formula."""
    size = error.abs()
    return (size - size.clamp(min=1e-12).pow(POWER - 1) / beta).clamp_(min=0).copysign_(error)


def _symmetric(groups: torch.Tensor, kind: qtype) -> torch.Tensor:
    """Scale ``[rows, G]`` of symmetric codes; the best one over all rounds."""
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
        target = groups - _shrunk(error, beta)
        fitted = (codes * target).sum(-1, keepdim=True) / (codes * codes).sum(-1, keepdim=True)
        safe = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, safe)
        beta *= KAPPA
    return torch.where(scale > 0, best, scale).squeeze(-1)
