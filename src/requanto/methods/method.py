"""What a method decides: its options, what it needs to know of a layer's inputs, and how a weight is rounded."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from requanto.methods.gptq import Rounded, damped, gptq
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer
from requanto.methods.moments import Moments
from requanto.runtime.tracing import without_autocast


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of the methods: a frozen dataclass whose fields are its options.

    Attributes:
        name: what users call it.
        full: it needs second moments of all pairs of input channels, not of each alone.
        in_turn: layers of a block are quantized in the order in which they run, each on the errors of those before.
        paired: it needs the float model's inputs beside the quantized one's.
        folds: it scales input channels (:meth:`scales`) where the inverse can be folded away.
        tunes: it improves the layers of a block together (:meth:`tune`).
    """

    name: ClassVar[str] = ""
    full: ClassVar[bool] = True
    in_turn: ClassVar[bool] = True
    paired: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    tunes: ClassVar[bool] = False

    def check(self, layer: Layer) -> None:
        """Refuses a layer that the method cannot quantize.

        Raises:
            ValueError: it says which type would do.
        """

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """Rounds a float32 weight ``[N, K]``."""
        raise NotImplementedError

    def tune(
        self,
        work: list[tuple[Layer, Grid, Rounded, torch.Tensor]],
        run: Callable[[int], list[Any]],
        targets: list[dict[int, torch.Tensor]],
    ) -> list[Rounded] | None:
        """Better values for the layers of a block; None: as they are. See `requanto.methods.tuning`."""
        raise NotImplementedError

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Method:
        """The method with these options.

        Raises:
            TypeError: an unknown option; the message names the nearest.
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
        damping, order, steps, rounds: see :func:`requanto.methods.gptq.gptq`. Samples of one kind of text say little about
            another: with damping 0.01, all-MiniLM-L6-v2 in 3 bits came out further from float than with 0.1.
        sequential: layers of a block see the errors of the layers before them in the block.
        correct: make up for errors of earlier blocks as well: the weight to round is first replaced by the one that, on the
            quantized model's inputs, comes nearest to the float layer's output (least squares). Needs the hidden states of
            the float model too, and runs each block twice as often.
    """

    name = "gptq"

    damping: float = 0.1
    order: str = "columns"
    steps: int = 24
    rounds: int = 3
    sequential: bool = True
    correct: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in 0 .. 1 (0 excluded), found {self.damping}")
        if self.order not in ("columns", "groups", "none"):
            raise ValueError(f"order must be 'columns', 'groups' or 'none', found {self.order!r}")

    @property
    def in_turn(self) -> bool:  # type: ignore[override]
        return self.sequential

    @property
    def paired(self) -> bool:  # type: ignore[override]
        return self.correct

    def round(self, weight: torch.Tensor, moments: Moments, grid: Grid, group_size: int | None, name: str) -> Rounded:
        """See :func:`requanto.methods.gptq.gptq`."""
        if moments.hessian is None:
            raise ValueError(f"{name}: gptq needs the full second moment of its inputs")
        hessian = moments.hessian / moments.rows
        if moments.cross is not None:
            weight = corrected(weight, hessian, moments.cross / moments.rows, self.damping, name)
        return gptq(
            weight,
            hessian,
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
    """The weight ``V`` for which ``V x`` comes nearest to ``W y``, ``y`` the float model's input in place of ``x``.

    ``V = W + W E[(y - x) x^T] (H + d I)^-1``: least squares with a ridge that holds it near ``W``. (Rounding it with GPTQ
    is what Li et al. 2025, "GPTAQ", arXiv:2504.02692, derive with another expansion.)
    """
    with without_autocast(weight.device):
        factor = torch.linalg.cholesky(damped(hessian, damping, name).double())
        moved = torch.cholesky_solve((weight @ cross).t().double(), factor).t()
    return weight + moved.to(weight.dtype)
