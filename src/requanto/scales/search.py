"""Searches: how the scale (and shift) of a group of weights is chosen, without data.

minmax    the outermost weights take the outermost codes: no weight is further off than half a step
mse       least squared error (float8: `requanto.scales.float8`)
aligned   least squared error, from roundings with a code at zero (`requanto.scales.aligned`): the default of 2 to 4 bits
weighted  least squared error, each weight counted with its own magnitude: outliers matter more to what a layer computes
          than the many small weights between them, whose errors cancel
hqq       half-quadratic: least |error|^0.7 (`requanto.scales.hqq`)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch
from requanto.scales.aligned import aligned as aligned_scale
from requanto.scales.float8 import float8_scale
from requanto.scales.hqq import hqq
from requanto.scales.least_squares import least_squares, whole_range

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
        return whole_range(groups, kind)
    if kind.is_codebook:
        return groups.abs().amax(-1) / kind.span, None
    if kind.bits == 8:
        return groups.abs().amax(-1) / kind.qmax, None
    # Signed codes reach one further down than up (-8 .. 7): each side needs its own scale, the larger one serves both.
    low, high = groups.amin(-1), groups.amax(-1)
    return torch.maximum(high.clamp(min=0) / kind.qmax, low.clamp(max=0) / kind.qmin), None


def mse(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) of the least squared error."""
    if kind.is_floating_point and kind.bits == 8:
        return float8_scale(groups, kind), None
    return least_squares(groups, kind, affine, minmax(groups, kind, affine), None)


def weighted(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) of the least ``sum |w|^0.5 (w - dequantized)^2``."""
    importance = torch.abs(groups, out=scratch(groups, "importance")).sqrt_()
    return least_squares(groups, kind, affine, minmax(groups, kind, affine), importance)


def aligned(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift of the least squared error that starts with a code at zero lead to.

    Without a shift there is always one, and outliers are counted for more (`weighted`).
    """
    return aligned_scale(groups, kind) if affine else weighted(groups, kind, affine)


#: the searches by name
SEARCHES: dict[str, ScaleSearch] = {
    "minmax": minmax,
    "mse": mse,
    "weighted": weighted,
    "aligned": aligned,
    "hqq": hqq,
}

#: names of the methods that look at samples (`requanto.methods`); `requanto.quantize` takes them with ``calibration``
CALIBRATED = ("gptq", "awq", "smoothquant", "signround")


def check_method(name: str | None, kind: qtype | None = None, where: str = "method") -> str | None:
    """``name``, if it is None or the name of a search that can quantize to ``kind``.

    Raises:
        ValueError: it needs samples, is unknown, or does not fit the type; the message says what does.
    """
    if name is None:
        return None
    if name in CALIBRATED:
        raise ValueError(
            f"{where}={name!r} looks at samples: requanto.quantize(model, weights=..., calibration=samples, "
            f"method={name!r}). Without samples it is one of {', '.join(SEARCHES)}"
        )
    if name not in SEARCHES:
        near = difflib.get_close_matches(str(name), (*SEARCHES, *CALIBRATED), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown {where} {name!r}{hint} Known: {', '.join(SEARCHES)}; with samples: {', '.join(CALIBRATED)}"
        )
    if kind is not None and name not in fitting(kind):
        raise ValueError(f"{where}={name!r} does not fit {kind.name}, which takes {' or '.join(fitting(kind))}")
    return name


def fitting(kind: qtype) -> tuple[str, ...]:
    """Names of the searches that a type may be quantized with."""
    if kind.is_codebook or kind.bits == 1:
        return ("minmax",)
    if kind.is_floating_point:
        return ("minmax", "mse")
    return tuple(SEARCHES)


def default_method(kind: qtype) -> str:
    """Name of the search that is used where none is asked for: measured, see docs/accuracy.md."""
    if kind.is_floating_point and kind.bits == 8:
        return "mse"
    return "aligned" if kind.bits <= 4 and "aligned" in fitting(kind) else "minmax"


def find_search(search: str | ScaleSearch | None, kind: qtype) -> ScaleSearch:
    """The search of that name, the default one of a type for None, or the function itself.

    Raises:
        ValueError: see `check_method`.
    """
    if search is None:
        return SEARCHES[default_method(kind)]
    if callable(search):
        return search
    return SEARCHES[check_method(search, kind, "search") or default_method(kind)]
