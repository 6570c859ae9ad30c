"""AWQ and SmoothQuant: scale input channels before rounding, if the inverse can be folded exactly into an earlier module.

AWQ (Lin et al. 2023, arXiv:2306.00978): weights of channels with large inputs are multiplied by ``s = E|x|^a``, which makes
their relative rounding error smaller. The exponent with the least output error is used.
SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): for 8-bit inputs, channels with large inputs are divided by
``s = max|x|^a / max|w|^(1 - a)`` and their weights multiplied by it.
"""

from __future__ import annotations

import dataclasses
import logging

import torch

from requanto.methods.gptq import DAMPING, Rounded, gptq, row_errors
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer
from requanto.methods.method import Method
from requanto.methods.moments import Moments

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Awq(Method):
    """Activation-aware scaling and clipping.

    Attributes:
        trials: number of exponents tried, from 0 (no scaling) to just below 1.
        steps: number of clipping ranges that the search for scales tries for every group.
        rounding: how the scaled weights are rounded: ``"nearest"`` or ``"gptq"``.
    """

    name = "awq"
    in_turn = False
    folds = True

    trials: int = 20
    steps: int = 24
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.trials < 2 or self.steps < 1:
            raise ValueError(f"trials must be 2 or more and steps positive, found {self.trials} and {self.steps}")
        if self.rounding not in ("nearest", "gptq"):
            raise ValueError(f"rounding must be 'nearest' or 'gptq', found {self.rounding!r}")

    @property
    def compensation(self) -> float | None:
        return DAMPING if self.rounding == "gptq" else None

    def scales(self, layers: list[Layer], moments: Moments) -> torch.Tensor | None:
        """Returns the scales of the layers' common input channels; None if scaling does not lower the error."""
        assert moments.hessian is not None  # full
        hessian, mean = moments.hessian / moments.rows, (moments.absolute / moments.rows).clamp(min=1e-8)
        best, found = None, None
        for trial in range(self.trials):
            scales = mean.pow(trial / self.trials)
            scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(min=1e-4)
            error = 0.0
            for layer in layers:
                weight, grid, group = layer.weight(), layer.grid(), layer.group_size or layer.columns
                rounded = nearest(weight * scales, moments.square / scales.square(), grid, group, steps=4)
                error += float(row_errors(rounded.values / scales - weight, hessian).sum())
            if best is None or error < best:
                best, found = error, (scales if trial else None)
        return found

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """Rounds to nearest, with the scales of least weighted error, or with GPTQ."""
        if self.rounding == "gptq":
            assert moments.hessian is not None
            return gptq(weight, moments.hessian / moments.rows, grid, group_size, steps=self.steps, name=name)
        return nearest(weight, moments.square, grid, group_size or weight.shape[1], self.steps)


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Method):
    """Scaling that reduces outliers in inputs that are quantized to 8 bits.

    Attributes:
        alpha: 0 .. 1; how much of the outliers is moved from inputs to weights.
        steps: number of clipping ranges that the search for weight scales tries.
    """

    name = "smoothquant"
    full = False
    in_turn = False
    folds = True

    alpha: float = 0.5
    steps: int = 24

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, found {self.alpha}")

    def check(self, layer: Layer) -> None:
        """Raises for layers whose inputs stay float.

        Raises:
            ValueError: the layer's activations are not quantized.
        """
        if layer.planned.options.activations is None:
            raise ValueError(
                f"smoothquant needs quantized inputs, but the inputs of {layer.name} stay float: give activations='int8', "
                f"or choose another method"
            )

    def scales(self, layers: list[Layer], moments: Moments) -> torch.Tensor | None:
        """Returns the scales of the layers' common input channels."""
        weights = torch.stack([layer.weight().abs().amax(0) for layer in layers]).amax(0)
        scales = moments.peak.clamp(min=1e-5).pow(self.alpha) / weights.clamp(min=1e-5).pow(1 - self.alpha)
        return torch.where((moments.peak > 0) & (weights > 0), scales, torch.ones_like(scales)).clamp(min=1e-5)

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """Rounds to nearest, with the scales of least weighted error."""
        return nearest(weight, moments.square, grid, group_size or weight.shape[1], self.steps)


def nearest(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, group: int, steps: int) -> Rounded:
    """Rounds to nearest, with the scale and shift of each group that minimize the error weighted by importance ``[K]``."""
    rows, columns = weight.shape
    groups = weight.reshape(-1, group)
    # A small importance for channels that are 0 in all samples: they may not be 0 in other inputs.
    importance = importance + 1e-6 * importance.mean().clamp(min=1e-30)
    wide = importance.view(1, -1, group).expand(rows, -1, -1).reshape(-1, group)
    scale, shift = grid.search(groups, wide, steps)
    table = scale.view(rows, -1), None if shift is None else shift.view(rows, -1)
    scale, shift, row_scale = grid.stored_tables(*table)
    wide_shift = None if shift is None else shift.reshape(-1, 1)
    values = grid.round(groups, scale.reshape(-1, 1), wide_shift).view(rows, columns)
    return Rounded(values, scale, shift, row_scale)
