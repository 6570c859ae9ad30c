"""The one table that says what runs.

Each implementation names itself, says when it is right (``supports``) and when it is fast (``prefers``), in order of
preference: the first that answers yes to both runs, and the reference, which is always right, closes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.settings import choices
from requanto.tensor.qtensor import QTensor

#: ``product(x, weight, bias) -> y`` with x of any leading axes: a product made ready for one shape and dtype of x.
Product = Callable[[torch.Tensor, QTensor, torch.Tensor | None], torch.Tensor]
#: ``bind(weight, rows, dtype)`` makes one (`requanto.linear.plan_cache`), or None.
Bind = Callable[[QTensor, int, torch.dtype], Product | None]


@dataclass(frozen=True)
class Problem:
    """What a product looks like from outside.

    Attributes:
        device: device type, ``"cpu"``, ``"cuda"`` ...
        qtype: type of the weight's codes.
        activation: type the activations are quantized to on the fly, or None.
        dtype: float dtype of x, and of the result.
        rows: rows of x (product of all its axes but the last).
        out_features, in_features: N and K.
        group_size: of the weight; None: per row.
        affine: the weight has a shift.
        transposed: the weight is stored ``[K, N]``, scales along N.
        layout: ``"plain"``, as stored, or the name of a packed form (`requanto.tensor.layout`).
        static: the activations' scale is given, not each row's own.
    """

    device: str
    qtype: qtype
    activation: qtype | None
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int
    group_size: int | None
    affine: bool
    transposed: bool = False
    layout: str = "plain"
    static: bool = False


@dataclass(frozen=True)
class Implementation:
    """One way to compute ``x @ w.T + bias``.

    Attributes:
        name: unique, shown by `requanto.explain`.
        run: ``run(x2d, weight, bias, activation, input_scale) -> y2d`` with x of shape [rows, K].
        supports: the problems it is right for.
        reason: why it is there, one line for the reader of `explain`.
        bind: ``bind(weight, rows, dtype) -> product`` makes what does not depend on x's numbers ready
            (`requanto.linear.plan_cache`), or None; None: it has no such form.
        run_grouped: ``run_grouped(x2d, weight, offsets) -> y2d`` for fused experts, weight ``[E, N, K]`` and offsets the end
            row of each expert; None: it has no such form.
    """

    name: str
    run: Callable[..., torch.Tensor]
    supports: Callable[[Problem], bool]
    reason: str
    run_grouped: Callable[..., torch.Tensor] | None = None
    bind: Bind | None = None


@dataclass(frozen=True)
class Choice:
    """The implementation that a problem gets."""

    problem: Problem
    implementation: Implementation


_TABLE: list[Implementation] = []


def register(implementation: Implementation, *, before: str | None = None) -> None:
    """Adds an implementation, at the end or before another.

    Raises:
        ValueError: the name is taken, or ``before`` is unknown.
    """
    names = [known.name for known in _TABLE]
    if implementation.name in names:
        raise ValueError(f"an implementation named {implementation.name!r} is registered already")
    if before is not None and before not in names:
        raise ValueError(f"no implementation named {before!r}; registered: {', '.join(names)}")
    _TABLE.insert(len(names) if before is None else names.index(before), implementation)
    choices.changed()


def implementations() -> tuple[Implementation, ...]:
    """The table, in order of preference."""
    return tuple(_TABLE)


def choose(problem: Problem, *, grouped: bool = False) -> Choice:
    """The first implementation that is right for the problem.

    Args:
        grouped: only those with a form for fused experts; the problem is that of one expert with all rows.
    """
    for implementation in _TABLE:
        if (implementation.run_grouped is not None or not grouped) and implementation.supports(problem):
            return Choice(problem, implementation)
    raise RuntimeError(f"no implementation for {problem}; the reference one should have been registered")


def problem_of(
    weight: QTensor,
    dtype: torch.dtype,
    rows: int,
    activation: qtype | None = None,
    layout: str | None = None,
    *,
    static: bool = False,
) -> Problem:
    """The problem that ``rows`` rows of ``dtype`` times ``weight`` is; in another layout than its own, if given."""
    if layout is None:
        packed = weight.packed
        # A packed form on a CPU is that of the stored matrix. Whoever multiplies with its transpose reads the stored codes,
        # also in compiled code, which knows a weight by that form alone.
        other = packed is not None and weight.transposed and not packed.travels
        layout = "plain" if packed is None or other else packed.layout
    return Problem(
        device=weight.device.type,
        qtype=weight.qtype,
        activation=activation,
        dtype=dtype,
        rows=rows,
        out_features=weight.shape[-2],
        in_features=weight.shape[-1],
        group_size=weight.group_size,
        affine=weight.affine,
        transposed=weight.transposed,
        layout=layout,
        static=static,
    )
