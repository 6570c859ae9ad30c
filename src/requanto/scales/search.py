"""Searches: functions that choose the scale (and shift) of a group of weights, without data.

minmax    map smallest and largest weight to the first and last code: no error is more than half a step
mse       least squared error (float8: `requanto.scales.float8`)
weighted  least squared error weighted by magnitude: outliers matter more to a layer's output than the many small weights,
          whose errors cancel; the default for 2 to 4 bits
aligned   least squared error from roundings with a code at zero (`requanto.scales.aligned`)
hqq       half-quadratic: least |error|^0.7 (`requanto.scales.hqq`)
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_like
from requanto.scales.aligned import aligned as aligned_scale
from requanto.scales.float8 import float8_scale
from requanto.scales.hqq import hqq
from requanto.scales.least_squares import least_squares, whole_range

#: ``search(groups, kind, affine) -> (scale, shift or None)`` for float32 ``groups`` of shape ``[rows, G, group]``.
ScaleSearch = Callable[[torch.Tensor, qtype, bool], tuple[torch.Tensor, torch.Tensor | None]]


def minmax(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) that map the smallest and the largest weight of a group to the first and the last code.

    The values of 1-bit codes are the mean plus and minus the mean distance from it, which is optimal for two values around
    the mean (Rastegari et al. 2016, XNOR-Net). Minimum and maximum would be worse than a weight of zeros.
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
    # Signed codes have one more negative value (-8 .. 7): take the larger of the scales that each side needs.
    low, high = groups.amin(-1), groups.amax(-1)
    return torch.maximum(high.clamp(min=0) / kind.qmax, low.clamp(max=0) / kind.qmin), None


def mse(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) of the least squared error."""
    if kind.is_floating_point and kind.bits == 8:
        return float8_scale(groups, kind), None
    return least_squares(groups, kind, affine, minmax(groups, kind, affine), None)


def weighted(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale (and shift) of the least ``sum |w|^0.5 (w - dequantized)^2``."""
    importance = torch.abs(groups, out=scratch_like(groups, "importance")).sqrt_()
    return least_squares(groups, kind, affine, minmax(groups, kind, affine), importance)


def aligned(groups: torch.Tensor, kind: qtype, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift of least squared error from roundings with a code at zero.

    Symmetric codes always have a code at zero; for them this is `weighted`.
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

#: names of the methods that use samples (`requanto.methods`); `requanto.quantize` accepts them with ``calibration``
CALIBRATED = ("gptq", "awq", "smoothquant", "signround")


def check_method(name: str | None, kind: qtype | None = None, where: str = "method") -> str | None:
    """Checks that ``name`` is None or the name of a search that supports ``kind``, and returns it.

    Raises:
        ValueError: the method needs samples, is unknown, or does not support the type.
    """
    if name is None:
        return None
    if name in CALIBRATED:
        raise ValueError(
            f"{where}={name!r} needs samples: requanto.quantize(model, weights=..., calibration=samples, "
            f"method={name!r}). Without samples use one of {', '.join(SEARCHES)}"
        )
    if name not in SEARCHES:
        near = difflib.get_close_matches(str(name), (*SEARCHES, *CALIBRATED), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"unknown {where} {name!r}{hint} Known: {', '.join(SEARCHES)}; with samples: {', '.join(CALIBRATED)}"
        )
    if kind is not None and name not in valid_methods(kind):
        raise ValueError(f"{where}={name!r} does not fit {kind.name}, which takes {' or '.join(valid_methods(kind))}")
    return name


def valid_methods(kind: qtype) -> tuple[str, ...]:
    """Names of the searches that support a type."""
    if kind.blocks is not None:
        return ("minmax", "mse")
    if kind.is_codebook or kind.bits == 1:
        return ("minmax",)
    if kind.is_floating_point:
        return ("minmax", "mse")
    return tuple(SEARCHES)


def default_method(kind: qtype, zeros: bool = False) -> str:
    """Name of the default search of a type, the most accurate one as measured (docs/accuracy.md).

    Args:
        kind: the type.
        zeros: zero points are whole numbers. `aligned` then finds shifts that are nearly whole.
    """
    if zeros and kind.bits == 4:
        return "aligned"
    if (kind.is_floating_point and kind.bits == 8) or kind.blocks is not None:
        return "mse"
    return "weighted" if kind.bits <= 4 and "weighted" in valid_methods(kind) else "minmax"


def find_search(search: str | ScaleSearch | None, kind: qtype) -> ScaleSearch:
    """The search for a name, the type's default one for None, or the function itself.

    Raises:
        ValueError: see `check_method`.
    """
    if search is None:
        return SEARCHES[default_method(kind)]
    if callable(search):
        return search
    return SEARCHES[check_method(search, kind, "search") or default_method(kind)]
