"""HQQ, half-quadratic quantization, in float32: the shift (without one: the scale) of the least |error|^0.7.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Beside the codes there is a second
variable for the errors that are accepted, e; each is solved for in turn:

    e     = shrink(w - dequantized),   shrink(x) = sign(x) max(0, |x| - |x|^-0.3 / beta)
    shift = mean of the shifts that the weights less e ask for

The scale stays that of the whole range. `requanto.optimizers.HqqOptimizer` is optimum-quanto's, bit for bit.
"""

from __future__ import annotations

import torch

from requanto.qtypes import qtype

POWER = 0.7
BETA = 10.0
#: growth of beta a round
KAPPA = 1.01
ROUNDS = 20


def hqq(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift ``[rows, G]`` of float32 ``groups`` ``[rows, G, group]``; stops a group where it gets no better."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if affine:
        bottom, top = 0.0, 2.0**kind.bits - 1
        scale, zero = (high - low) / top, None
    else:
        bottom, top = kind.qmin, kind.qmax
        scale = torch.maximum(high.clamp(min=0) / top, low.clamp(max=0) / bottom)
        zero = torch.zeros_like(scale)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = -low / safe if zero is None else zero
    best_scale, best_zero, least = safe, zero, torch.full_like(safe, torch.inf)
    beta = BETA
    for _ in range(ROUNDS):
        codes = (groups / safe + zero).round_().clamp_(bottom, top)
        error = groups - (codes - zero) * safe
        size = error.abs()
        pull = size.clamp(min=1e-12).pow(POWER - 1)
        mean = (size * pull).mean(-1, keepdim=True)
        better = mean < least
        least = torch.where(better, mean, least)
        best_scale, best_zero = torch.where(better, safe, best_scale), torch.where(better, zero, best_zero)
        if not bool(better.any()):
            break
        shrunk = size.sub_(pull.div_(beta)).clamp_(min=0).copysign_(error)
        kept = groups - shrunk
        if affine:
            zero = (codes - kept / safe).mean(-1, keepdim=True)
        else:
            fitted = (codes * kept).sum(-1, keepdim=True) / (codes * codes).sum(-1, keepdim=True)
            safe = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, safe)
        beta *= KAPPA
    best_scale = torch.where(scale > 0, best_scale, scale).squeeze(-1)
    if not affine:
        return best_scale, None
    return best_scale, torch.where(scale > 0, best_zero * safe, -low).squeeze(-1)
