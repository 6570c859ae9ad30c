"""Observers: a static activation scale from one batch of values.

An observer is any function ``observer(values, kind) -> scale``, where values are float of any shape, kind is the type to
quantize to, and scale is a scalar tensor of their dtype. `Calibration` averages the scales of all batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.dtypes.float8 import rounded_to_float8
from requanto.dtypes.qtypes import qint8, qtype

Observer = Callable[[torch.Tensor, qtype], torch.Tensor]

#: Most values that observers sort or search: enough for a percentile, and still fast.
SAMPLE = 1_000_000


def absmax_scale(base: torch.Tensor, qtype: qtype = qint8, axis: int | None = None) -> torch.Tensor:
    """The scale that maps the largest magnitude to the largest code.

    Args:
        base: float tensor.
        qtype: type of the codes.
        axis: axis with separate scales, -1 for the last; None: one scale.

    Returns:
        In base's dtype: a scalar, or a tensor with as many axes as base, of size 1 except for ``axis``.
    """
    magnitude = base.abs()
    info = torch.finfo(qtype.dtype) if qtype.dtype.is_floating_point else torch.iinfo(qtype.dtype)
    if axis is None:
        return magnitude.max() / info.max
    others = [dim for dim in range(base.dim()) if dim != axis % base.dim()]
    return magnitude.amax(others, keepdim=True) / info.max


class PercentileObserver:
    """Maps a percentile of the magnitudes to the largest code: a few outliers saturate, the others gain resolution.

    Args:
        percentile: 50 .. 100.
    """

    def __init__(self, percentile: float = 99.9) -> None:
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile must lie in 50 .. 100, found {percentile}")
        self.percentile = percentile

    def __call__(self, values: torch.Tensor, kind: qtype) -> torch.Tensor:
        magnitude = _sample(values).abs()
        rank = max(1, min(magnitude.numel(), round(self.percentile / 100 * magnitude.numel())))
        return (magnitude.kthvalue(rank).values / kind.qmax).to(values.dtype)


class MseObserver:
    """The scale of least mean squared error among ``steps`` candidates, from 0.2 to 1 times the absmax scale."""

    def __init__(self, steps: int = 40) -> None:
        if steps < 2:
            raise ValueError(f"steps must be 2 or more, found {steps}")
        self.steps = steps

    def __call__(self, values: torch.Tensor, kind: qtype) -> torch.Tensor:
        sample = _sample(values)
        top = sample.abs().max() / kind.qmax
        if not bool(top > 0):
            return top.to(values.dtype)
        best, found = None, top
        for share in torch.linspace(1, 0.2, self.steps, dtype=torch.float32, device="cpu").tolist():
            scale = top * share
            codes = (sample / scale).clamp(kind.qmin, kind.qmax)
            codes = rounded_to_float8(codes, kind.dtype) if kind.is_floating_point else codes.round()
            error = float((codes * scale - sample).square().mean())
            if best is None or error < best:
                best, found = error, scale
        return found.to(values.dtype)


def _sample(values: torch.Tensor) -> torch.Tensor:
    flat = values.detach().reshape(-1)
    step = -(-flat.numel() // SAMPLE)
    return flat[::step].float() if step > 1 else flat.float()


def find_observer(observer: str | Observer) -> Observer:
    """The observer for a name (``"absmax"``, ``"percentile"``, ``"mse"``), or the function itself.

    Raises:
        ValueError: the name is unknown.
        TypeError: the value is neither a name nor a function.
    """
    named: dict[str, Callable[[], Observer]] = {
        "absmax": lambda: absmax_scale,
        "percentile": PercentileObserver,
        "mse": MseObserver,
    }
    if isinstance(observer, str):
        if observer not in named:
            raise ValueError(f"unknown observer {observer!r}; known: {', '.join(named)}, or a function(values, qtype)")
        return named[observer]()
    if not callable(observer):
        raise TypeError(f"observer must be a name or a function(values, qtype) -> scale, found {observer!r}")
    return observer
