"""The one table that says what runs.

Each implementation names itself, says when it is right (``supports``) and when it is fast (``prefers``), in order of
preference: the first that answers yes to both runs, and the reference, which is always right, closes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.settings import choices
from requanto.runtime.tracing import has_numbers, wants_gradient
from requanto.tensor.layout import LOCK
from requanto.tensor.qtensor import QTensor

#: ``gemm(x, weight, bias) -> y`` with x of any leading axes: all that does not depend on x's numbers is done.
Gemm = Callable[[torch.Tensor, QTensor, torch.Tensor | None], torch.Tensor]
#: ``bind(weight, rows, dtype)`` makes one for a weight ``[N, K]``, or None. It must hold the weight's tensors, never the
#: weight: plans belong to its storage, which they would keep alive.
Bind = Callable[[QTensor, int, torch.dtype], Gemm | None]

#: Plans that a weight keeps, one for each shape of x it met lately; one more, and all are dropped.
PLANS = 32


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
        bind: ``bind(weight, rows, dtype) -> gemm`` makes what does not depend on x's numbers ready
            (`find_plan`), or None; None: it has no such form.
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
    spec = weight._spec
    *_, out_features, in_features = spec.seen_shape
    return Problem(
        device=weight.device.type,
        qtype=spec.qtype,
        activation=activation,
        dtype=dtype,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        group_size=spec.group_size,
        affine=spec.affine,
        transposed=spec.transposed,
        layout=layout or weight._storage.layout.name,
        static=static,
    )


# ---------------------------------------------------------------------- cached plans


class Plan(NamedTuple):
    """A GEMM made ready for one shape of x, and what else it holds for."""

    gemm: Gemm
    activation: qtype | None
    cpu: bool


def find_plan(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> Gemm | None:
    """The GEMM that was made ready for an x like this one, if it holds for this call: no gradient, no autocast, no tracing.

    A small layer's GEMM takes 50 us on a CPU, and what Python does before it as long again: this is the way around it. Plans
    live in the weight's storage, which drops them when its tensors change.
    """
    plan = weight._storage.plans.get((x.shape, x.dtype, choices.version))
    if plan is None or plan.activation is not weight._spec.activation or not has_numbers():
        return None
    if x.is_cpu is not plan.cpu or torch.is_autocast_enabled("cpu" if plan.cpu else x.device.type):
        return None
    return None if wants_gradient(x, bias) else plan.gemm


def remember_plan(x: torch.Tensor, weight: QTensor) -> None:
    """Makes the GEMM ready that the next x like this one will want, with a weight ``[N, K]`` or its stored matrix.

    Only of weights whose layout is settled: one that may yet be packed is asked at each GEMM.
    """
    spec, storage = weight._spec, weight._storage
    if not has_numbers() or x.dim() < 2 or not x.numel() or spec.rotation is not None or "up" in storage.parts:
        return
    version, key = storage.version, (x.shape, x.dtype, choices.version)
    declined = storage.declined == (choices.version, x.dtype, spec.activation)
    if key in storage.plans or not (weight.is_packed or storage.stays_plain or declined):
        return
    matrix = weight.as_matrix()
    found = choose(problem_of(matrix, x.dtype, x.numel() // x.shape[-1], spec.activation)).implementation
    gemm = found.bind(matrix, x.numel() // x.shape[-1], x.dtype) if found.bind is not None else None
    plan = Plan(gemm or _unbound(found, spec.activation), spec.activation, x.is_cpu)
    with LOCK:  # another thread may have changed the weight meanwhile
        if storage.version == version:
            if len(storage.plans) >= PLANS:
                storage.plans.clear()
            storage.plans[key] = plan


def _unbound(found: Implementation, activation: qtype | None) -> Gemm:
    """The plan of an implementation that has nothing to make ready: the choice alone."""

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            out = found.run(x.reshape(-1, x.shape[-1]), weight.as_matrix(), bias, activation, None)
            return out.view(*x.shape[:-1], out.shape[1])

    return gemm
