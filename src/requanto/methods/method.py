"""Base of the quantization methods, and GPTQ: options, required statistics of a layer's inputs, rounding."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from requanto.methods.gptq import DAMPING, Rounded, damped, gptq
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer
from requanto.methods.moments import Moments
from requanto.runtime.tracing import without_autocast


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of the methods: a frozen dataclass whose fields are its options.

    Attributes:
        name: the name by which users select it.
        full: needs the second moments of all pairs of input channels, not only of each channel.
        in_turn: quantizes the layers of a block in the order in which they run, so that later layers see earlier errors.
        paired: needs the float model's inputs in addition to the quantized model's.
        folds: scales input channels (:meth:`scales`) where the inverse can be folded into an earlier module.
        tunes: tunes the layers of a block together (:meth:`tune`).
    """

    name: ClassVar[str] = ""
    full: ClassVar[bool] = True
    in_turn: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    tunes: ClassVar[bool] = False

    @property
    def compensation(self) -> float | None:
        """Damping of the second moment with which later columns compensate errors; None: they do not."""
        return None

    def check(self, layer: Layer) -> None:
        """Raises for a layer that the method cannot quantize.

        Raises:
            ValueError: the method does not support the layer's type; the message names an alternative.
        """

    def target(self, weight: torch.Tensor, moments: Moments, name: str) -> torch.Tensor:
        """Returns the float32 weight ``[N, K]`` that rounding should come near to; the float weight if nothing is better."""
        return weight

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """Rounds float32 rows ``[N, K]``, in a basis of their own (`requanto.methods.basis`)."""
        raise NotImplementedError

    def tune(
        self,
        work: list[tuple[Layer, Grid, Rounded, torch.Tensor]],
        run: Callable[[int], list[Any]],
        targets: list[dict[int, torch.Tensor]],
    ) -> list[Rounded] | None:
        """Returns improved values for the layers of a block; None: keep the current ones. See `requanto.methods.tuning`."""
        raise NotImplementedError

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Method:
        """Returns the method with these options.

        Raises:
            TypeError: an unknown option; the message names the closest one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options or {}:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"{cls.name} has no option {key!r}{hint} Known: {', '.join(known) or 'none'}")
        return cls(**(options or {}))


@dataclasses.dataclass(frozen=True)
class Gptq(Method):
    """GPTQ, `requanto.methods.gptq`.

    Attributes:
        damping, order, steps, rounds: see :func:`requanto.methods.gptq.gptq`. Little damping and many rounds overfit to the
            samples: they pay only where samples are what the model will see (docs/accuracy.md).
        sequential: layers of a block see the errors of the layers before them in the block.
        correct: also compensates errors of earlier blocks: before rounding, the weight is replaced by the one whose output
            on the quantized model's inputs is closest to the float layer's output (least squares). Needs the float model's
            hidden states, and runs each block twice as often.
    """

    name = "gptq"

    damping: float = DAMPING
    order: str = "columns"
    steps: int = 24
    rounds: int = 1
    sequential: bool = True
    correct: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, found {self.damping}")
        if self.order not in ("columns", "groups", "none"):
            raise ValueError(f"order must be 'columns', 'groups' or 'none', found {self.order!r}")

    @property
    def in_turn(self) -> bool:  # type: ignore[override]
        return self.sequential

    @property
    def paired(self) -> bool:  # type: ignore[override]
        return self.correct

    @property
    def compensation(self) -> float | None:
        return self.damping

    def target(self, weight: torch.Tensor, moments: Moments, name: str) -> torch.Tensor:
        """Returns the weight that compensates errors of earlier blocks (:func:`corrected`)."""
        if moments.hessian is None or moments.cross is None:
            return weight
        return corrected(weight, moments.hessian / moments.rows, moments.cross / moments.rows, self.damping, name)

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """Rounds with :func:`requanto.methods.gptq.gptq`."""
        if moments.hessian is None:
            raise ValueError(f"{name}: gptq needs the full second moment of its inputs")
        return gptq(
            weight,
            moments.hessian / moments.rows,
            grid,
            group_size,
            damping=self.damping,
            order=self.order,
            steps=self.steps,
            rounds=self.rounds,
            name=name,
        )


def corrected(
    weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor, damping: float, name: str
) -> torch.Tensor:
    """Returns the weight ``V`` for which ``V x`` is closest to ``W y``; x, y: the quantized and the float model's input.

    ``V = W + W E[(y - x) x^T] (H + d I)^-1``: least squares with a ridge term towards ``W``. For every ``Q``,
    ``E|Q x - W y|^2 = tr((Q - V) H (Q - V)^T)`` plus a constant, so GPTQ on ``V`` minimizes the objective of asymmetric
    calibration (Li et al. 2025, "GPTAQ", arXiv:2504.02692). There the columns that are not rounded yet take over what the
    input of the rounded one differs by, step by step; here all columns do, at once, before the first is rounded.
    """
    with without_autocast(weight.device):
        factor = torch.linalg.cholesky(damped(hessian, damping, name).double())
        moved = torch.cholesky_solve((weight @ cross).t().double(), factor).t()
    return weight + moved.to(weight.dtype)
