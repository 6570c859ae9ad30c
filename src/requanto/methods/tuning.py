"""Learned rounding: codes that may change by one, scales and shifts that may change a little.

    W = s c - z,  s = s0 (1 + a),  z = z0 + s0 b,  c = clamp(round(u + v)),  |v| <= 1/2

``u`` is the unrounded code of the float weight. ``v``, ``a`` and ``b`` start at 0 and are learned from the error of the
block's output (`SignRound`), with a straight-through gradient for the rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from requanto.methods.gptq import Rounded
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer
from requanto.methods.method import Gptq
from requanto.methods.moments import Moments
from requanto.methods.scaling import nearest

logger = logging.getLogger(__name__)


class Tuned:
    """One layer whose weight is computed from learned parameters.

    Args:
        layer: the layer.
        grid: its codes.
        start: the initial rounding.
        weight: float32 ``[N, K]``, rows in the layer's basis: their unrounded codes are used as ``u``, clamped so that they
            round to the codes of ``start``. None: codes are fixed, only scales and shifts are learned.
    """

    def __init__(self, layer: Layer, grid: Grid, start: Rounded, weight: torch.Tensor | None) -> None:
        self.layer, self.grid, self.start = layer, grid, start
        self.dtype = layer.parameter.dtype
        self.shape = (*start.scale.shape, -1)
        self.scale, self.shift = start.scale[..., None], None if start.shift is None else start.shift[..., None]
        values = start.values.view(self.shape)
        codes = grid.codes(values, self.scale, self.shift)
        self.place = codes
        self.offset = None
        if weight is not None:
            wide = weight.view(self.shape)
            place = wide / self.scale if self.shift is None else (wide + self.shift) / self.scale
            # Clamp to just inside the code's interval; codes near its edge change first.
            self.place = torch.minimum(torch.maximum(place, codes - 0.499), codes + 0.499)
            self.offset = torch.zeros_like(self.place, requires_grad=True)
        self.stretch = torch.zeros_like(self.scale, requires_grad=True)
        self.move = None if self.shift is None else torch.zeros_like(self.scale, requires_grad=True)

    def parameters(self) -> list[torch.Tensor]:
        """Returns the learned parameters."""
        return [p for p in (self.offset, self.stretch, self.move) if p is not None]

    def codes(self) -> torch.Tensor:
        """Returns the current codes, ``[N, G, g]``, with a gradient for the offset."""
        if self.offset is None:
            return self.place
        wanted = (self.place + self.offset).clamp(self.grid.low, self.grid.high)
        return wanted + (wanted.round() - wanted).detach()

    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the current scale and shift, ``[N, G, 1]``."""
        scale = self.scale * (1 + self.stretch)
        return scale, None if self.shift is None or self.move is None else self.shift + self.scale * self.move

    def begin(self) -> None:
        """Computes the weight; until :meth:`end` modules use a leaf copy of it, which accumulates gradients."""
        values = self.layer.basis.values(self.grid.values(self.codes(), *self.tables()).flatten(1))
        self._weight = (values.t() if self.layer.planned.transposed else values).to(self.dtype)
        self.leaf = self._weight.detach().requires_grad_()

    def end(self) -> None:
        """Backpropagates the gradient of the leaf to the learned parameters."""
        if self.leaf.grad is not None:
            self._weight.backward(self.leaf.grad)

    @torch.no_grad()
    def signed_step(self, size: float) -> None:
        """Does one step of signed gradient descent: codes by ``size``; the ends of a group's range by ``size`` times it."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                share = (self.grid.high - self.grid.low) / 2 if parameter is self.move else 1.0
                parameter.sub_(parameter.grad.sign(), alpha=size * share)
                parameter.grad = None
        if self.offset is not None:
            self.offset.clamp_(-0.5, 0.5)
        self.stretch.clamp_(-0.5, 0.5)

    def stored(self) -> torch.Tensor:
        """Returns the current weight, rounded as it would be stored."""
        values = self.layer.basis.values(self.rounded().values)
        return (values.t() if self.layer.planned.transposed else values).to(self.dtype)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """Returns the learned rounding, with scale and shift rounded as storing does."""
        scale, shift = self.tables()
        scale, shift, row_scale = self.grid.stored_tables(scale[..., 0], None if shift is None else shift[..., 0])
        wide = scale[..., None], None if shift is None else shift[..., None]
        return Rounded(self.grid.values(self.codes().round(), *wide).flatten(1), scale, shift, row_scale)


@contextlib.contextmanager
def learned_weights(tuned: list[Tuned]) -> Iterator[None]:
    """Inside the block, layers compute with the weights that are being learned, and gradients reach them."""
    hooks, hidden = [], []
    try:
        for item in tuned:
            for module in item.layer.modules:
                hidden.append((module, module._parameters.pop("weight")))
                hooks.append(module.register_forward_pre_hook(lambda m, args, item=item: _set(m, item.leaf)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, parameter in hidden:
            module.__dict__.pop("weight", None)
            module._parameters["weight"] = parameter


def _set(module: nn.Module, weight: torch.Tensor) -> None:
    module.__dict__["weight"] = weight


@dataclasses.dataclass(frozen=True)
class SignRound(Gptq):
    """AutoRound: codes, scales and shifts learned by signed gradient descent on the error of the block's output.

    Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent" (arXiv:2309.05516). Unlike there, the codes can
    start from those of GPTQ.

    Attributes:
        iterations: number of steps.
        batch: samples per step.
        rate: step size in codes; decreases linearly to 0.
        start: the codes to start from: ``"gptq"`` or ``"nearest"``; in both, scales are those of a search with errors
            weighted by the inputs.
        ignored: share of the tokens, those with the largest errors, that do not count in a step: a few outliers would
            otherwise be all that is learned. (The loss filter of SignRound v2, Cheng et al. 2025, arXiv:2512.04746.)
        (and those of `Gptq`)
    """

    name = "signround"
    tunes = True

    iterations: int = 200
    batch: int = 8
    rate: float = 0.005
    start: str = "gptq"
    ignored: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or self.batch < 1:
            raise ValueError(f"iterations and batch must be positive, found {self.iterations} and {self.batch}")
        if not 0 <= self.ignored < 1:
            raise ValueError(f"ignored must be at least 0 and below 1, found {self.ignored}")
        if self.start not in ("gptq", "nearest"):
            raise ValueError(f"start must be 'gptq' or 'nearest', found {self.start!r}")

    @property
    def in_turn(self) -> bool:  # type: ignore[override]
        return self.sequential and self.start == "gptq"

    @property
    def paired(self) -> bool:  # type: ignore[override]
        return True  # the float block's output is the target

    @property
    def compensation(self) -> float | None:  # type: ignore[override]
        return self.damping if self.start == "gptq" else None

    def check(self, layer: Layer) -> None:
        """Raises for float types and codebooks, whose codes are not evenly spaced.

        Raises:
            ValueError: the layer's type is a float type or a codebook.
        """
        kind = layer.planned.options.qtype
        if kind.is_floating_point or kind.is_codebook:
            raise ValueError(
                f"signround needs a type with integer codes, but {layer.name} is to be {kind.name}: use method='gptq' for "
                f"it, or another type"
            )

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """Returns the initial rounding."""
        if self.start == "gptq":
            return super().round(weight, moments, grid, group_size, name)
        return nearest(weight, moments.square, grid, group_size or weight.shape[1], self.steps)

    def tune(
        self,
        work: list[tuple[Layer, Grid, Rounded, torch.Tensor]],
        run: Callable[[int], list[Any]],
        targets: list[dict[int, torch.Tensor]],
    ) -> list[Rounded] | None:
        """Tunes the layers of a block together; returns None if that did not lower the error.

        Args:
            work: (layer, grid, start, float weight) of each layer.
            run: runs the block on a sample; returns the leaves of its output.
            targets: for each sample, the float block's output by leaf.
        """
        tuned = [Tuned(*item) for item in work]
        generator = torch.Generator().manual_seed(0)
        evaluated = range(min(len(targets), 16))
        with torch.enable_grad(), learned_weights(tuned):
            before = _loss(tuned, run, targets, evaluated, self.ignored)
            for iteration in range(self.iterations):
                picked = torch.randperm(len(targets), generator=generator, device="cpu")[: self.batch].tolist()
                for item in tuned:
                    item.begin()
                for number in picked:
                    distance(run(number), targets[number], self.ignored).backward()
                for item in tuned:
                    item.end()
                    item.signed_step(self.rate * (1 - iteration / self.iterations))
            after = _loss(tuned, run, targets, evaluated, self.ignored)
        logger.info("signround: block output error %.4g before, %.4g after", before, after)
        return [item.rounded() for item in tuned] if after < before else None


def distance(found: list[Any], wanted: dict[int, torch.Tensor], ignored: float = 0.0) -> torch.Tensor:
    """Returns the sum over leaves of the squared error, relative to the squared norm of the target.

    Args:
        found: leaves of an output.
        wanted: targets by index of the leaf.
        ignored: share of the rows (tokens) of each leaf that do not count, those with the largest errors.
    """
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for index, target in wanted.items():
        target = target.to(found[index].device).float()
        error, size = (found[index].float() - target).square(), target.square()
        if ignored and target.dim() > 1:
            rows, sizes = error.flatten(0, -2).sum(-1), size.flatten(0, -2).sum(-1)
            left = rows.detach().topk(len(rows) - int(ignored * len(rows)), largest=False).indices
            error, size = rows[left], sizes[left]
        total = total + error.sum() / size.sum().clamp(min=1e-12)
    return total


@torch.no_grad()
def _loss(
    tuned: list[Tuned],
    run: Callable[[int], list[Any]],
    targets: list[dict[int, torch.Tensor]],
    numbers: range,
    ignored: float,
) -> float:
    for item in tuned:
        item.leaf = item.stored()
    return sum(float(distance(run(number), targets[number], ignored)) for number in numbers) / len(numbers)
