"""The registry of implementations, and the plans that weights cache.

Implementations are listed in order of preference. The first whose ``supports`` accepts a problem runs it; the reference,
which accepts all problems, is the last. ``supports`` covers both correctness and speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.columns import column_for
from requanto.linear.quick import Before, note_quick
from requanto.runtime.buffers import scratch_memory
from requanto.runtime.devices import made_current
from requanto.runtime.settings import registry_state
from requanto.runtime.tracing import runs_eagerly
from requanto.scales.order import in_order
from requanto.scales.rotation import rotate
from requanto.tensor.layout import LOCK, layout_named
from requanto.tensor.qtensor import QTensor
from requanto.tensor.storage import WeightStorage

#: ``gemm(x, weight, bias) -> y`` for one shape and dtype of x; everything that does not depend on x's values is prepared.
Gemm = Callable[[torch.Tensor, QTensor, torch.Tensor | None], torch.Tensor]
#: ``make_plan(weight, rows, dtype)`` returns such a GEMM for a weight ``[N, K]``, or None. It may reference the weight's
#: tensors but not the weight: its storage owns the plans, and a reference cycle would keep it alive.
MakePlan = Callable[[QTensor, int, torch.dtype], Gemm | None]

#: Most plans that a weight caches, one per shape of x; before one more is added, all are dropped.
MAX_PLANS = 32
#: After so many calls of a layer with another shape than that of its quick plan, the last of these plans becomes the quick
#: one. Where two shapes take turns, making it in each call would take longer than it saves.
MISSES = 4


@dataclass(frozen=True)
class Problem:
    """The properties of a GEMM that an implementation is selected by.

    Attributes:
        device: device type, ``"cpu"``, ``"cuda"`` ...
        qtype: type of the weight's codes.
        activation: type that the activations are quantized to, or None; also None if they are rounded in blocks before the
            GEMM (NVFP4, MX).
        dtype: float dtype of x and of the result.
        rows: rows of x (product of all its axes but the last).
        out_features, in_features: N and K.
        group_size: group size of the weight's scales; None: one scale per row.
        affine: whether the weight has a shift.
        transposed: whether the weight is stored as ``[K, N]``, with scales along N.
        layout: order of the codes: ``"plain"``, or the name of a packed layout (`requanto.tensor.layout`).
        static: whether activations have a static scale instead of one per token.
        index: number of the device; None: the current one. `choose` makes it current.
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
    index: int | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to compute ``x @ w.T + bias``.

    Attributes:
        name: unique name, shown by `requanto.explain`.
        run: ``run(x2d, weight, bias, activation, input_scale) -> y2d`` with x of shape ``[rows, K]``.
        supports: whether it is correct and fast for a problem.
        reason: one line for `explain`: why it is used.
        details: what `explain` adds for a problem; None: nothing.
        run_grouped: ``run_grouped(x2d, weight, offsets) -> y2d`` for fused experts, with a weight ``[E, N, K]`` and the end
            row of each expert in ``offsets``; None if experts are not supported.
        make_plan: ``make_plan(weight, rows, dtype) -> gemm`` prepares a GEMM for one shape of x (`find_plan`), or returns
            None; None if there is nothing to prepare.
        takes_column: whether the GEMMs of ``make_plan`` multiply x by the weight's column scale themselves.
        plans_operators: whether ``make_plan`` takes transposed weights too, and its plans are used where a GEMM is an
            operator: in compiled graphs and for autograd.
    """

    name: str
    run: Callable[..., torch.Tensor]
    supports: Callable[[Problem], bool]
    reason: str
    run_grouped: Callable[..., torch.Tensor] | None = None
    make_plan: MakePlan | None = None
    takes_column: bool = False
    plans_operators: bool = False
    details: Callable[[Problem], str] | None = None


@dataclass(frozen=True)
class Choice:
    """The implementation selected for a problem."""

    problem: Problem
    implementation: Implementation


_REGISTRY: list[Implementation] = []


def register(implementation: Implementation, *, before: str | None = None) -> None:
    """Adds an implementation, at the end or before another.

    Raises:
        ValueError: the name is taken, or ``before`` is unknown.
    """
    names = [known.name for known in _REGISTRY]
    if implementation.name in names:
        raise ValueError(f"an implementation named {implementation.name!r} is registered already")
    if before is not None and before not in names:
        raise ValueError(f"no implementation named {before!r}; registered: {', '.join(names)}")
    _REGISTRY.insert(len(names) if before is None else names.index(before), implementation)
    registry_state.changed()


def implementations() -> tuple[Implementation, ...]:
    """All implementations, in order of preference."""
    return tuple(_REGISTRY)


def choose(problem: Problem, *, grouped: bool = False) -> Choice:
    """Selects the first implementation that supports the problem.

    Args:
        grouped: selects among implementations for fused experts; the problem then describes one expert with all rows.
    """
    with made_current(problem.device, problem.index):
        for implementation in _REGISTRY:
            if (implementation.run_grouped is not None or not grouped) and implementation.supports(problem):
                return Choice(problem, implementation)
    raise RuntimeError(f"no implementation supports {problem}; is requanto.linear.reference imported?")


def problem_of(
    weight: QTensor,
    dtype: torch.dtype,
    rows: int,
    activation: qtype | None = None,
    layout: str | None = None,
    *,
    static: bool = False,
) -> Problem:
    """Describes the GEMM of ``rows`` rows of ``dtype`` with a weight, in the weight's layout unless ``layout`` is given."""
    spec = weight._spec
    *_, out_features, in_features = spec.seen_shape
    return Problem(
        device=weight.device.type,
        qtype=spec.qtype,
        activation=None if activation is None or activation.blocks is not None else activation,
        dtype=dtype,
        rows=rows,
        out_features=out_features,
        in_features=in_features,
        group_size=spec.group_size,
        affine=spec.affine,
        transposed=spec.transposed,
        layout=(weight._storage.layout if layout is None else layout_named(layout)).order(spec),
        static=static,
        index=weight.device.index,
    )


def run_chosen(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[rows, K] -> [rows, N]`` by the implementation that is selected, without a plan."""
    weight = weight.snapshot()  # in the layout that it is selected for
    found = choose(problem_of(weight, x.dtype, x.shape[0], activation, static=input_scale is not None))
    return found.implementation.run(x, weight, bias, activation, input_scale)


# ---------------------------------------------------------------------- cached plans


class Plan(NamedTuple):
    """A cached GEMM for one shape of x, and further conditions for its use.

    Attributes:
        gemm: the GEMM.
        activation: ``weight.activation`` when it was made.
        cpu: whether x must be on the CPU.
    """

    gemm: Gemm
    activation: qtype | None
    cpu: bool


def find_plan(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> Gemm | None:
    """The cached plan for x's shape and dtype; None if there is none, or with gradients, autocast or tracing.

    A small layer's GEMM takes 50 us on a CPU, and selecting an implementation in Python takes as long again; a plan avoids
    that. Plans belong to the weight's storage, which drops them when its tensors change.
    """
    plan = weight._storage.plans.get((x.shape, x.dtype, registry_state.version))
    if plan is None:
        return None
    gemm, activation, cpu = plan
    if activation is not weight._spec.activation or not runs_eagerly() or x.is_cpu is not cpu:
        return None
    if torch.is_autocast_enabled("cpu" if cpu else x.device.type):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):  # `needs_gradient`
        return None
    return gemm


def quick_gemm(x: torch.Tensor, weight: QTensor) -> torch.Tensor | None:
    """``x @ weight.T`` on a CPU, of x with few elements in the shape of the last plan; None where `find_plan` has to look.

    Args:
        x: a plain tensor, not a nested one.
    """
    found = weight._storage.quick
    if found is None:
        return None
    shape, dtype, version, spec, like, function, address, scratch_bytes, raise_for, _ = found
    if not runs_eagerly():
        return None
    if x.shape != shape or x.dtype is not dtype or version != registry_state.version or spec is not weight._spec:
        return _other_plan(x, weight)
    if not x.is_cpu or not x.is_contiguous() or x.is_neg() or torch.is_autocast_enabled("cpu"):
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    out = torch.empty_like(like)
    scratch = scratch_memory(scratch_bytes, "gemm")  # held: a buffer larger than the workspace is not cached
    code = function(address, x.data_ptr(), out.data_ptr(), scratch.data_ptr())
    if code:
        raise_for(code)
    return out


def _other_plan(x: torch.Tensor, weight: QTensor) -> torch.Tensor | None:
    """`quick_gemm` for another shape than the last; if it happens again and again, for this one from now on."""
    before, storage = Before.of(weight), weight._storage
    gemm = None if before.spec.transposed or not x.is_cpu else find_plan(x, weight, None)
    if gemm is None:
        return None
    storage.misses += 1
    if storage.misses % MISSES == 0:
        note_quick(gemm, x, weight, before)
    return gemm(x, weight, None)


def remember_plan(x: torch.Tensor, weight: QTensor) -> None:
    """Caches a plan for x's shape and dtype, for GEMMs with the weight's stored matrix ``[N, K]``.

    Does nothing as long as the weight may still be packed, because packing is tried outside of plans.
    """
    before, storage = Before.of(weight), weight._storage
    spec, version = before.spec, before.version
    if not runs_eagerly() or x.dim() < 2 or not x.numel() or "up" in storage.parts:
        return
    if spec.activation is not None and spec.activation.blocks is not None:
        return
    key = (x.shape, x.dtype, before.registry)
    declined = storage.declined == (before.registry, x.dtype, spec.activation)
    if key in storage.plans or not (weight.is_packed or storage.stays_plain or declined):
        return
    matrix = weight.snapshot().as_matrix()
    found = choose(problem_of(matrix, x.dtype, x.numel() // x.shape[-1], spec.activation)).implementation
    # A rotation comes between the column scale and the codes' GEMM.
    makes = found.make_plan is not None and not (found.takes_column and "column" in storage.parts and spec.rotation)
    planned = found.make_plan(matrix, x.numel() // x.shape[-1], x.dtype) if makes else None  # type: ignore[misc]
    gemm = planned or _plan_without_preparation(found, matrix)
    if spec.rotation is not None:
        gemm = _with_rotation(gemm, spec.rotation)
    if "column" in storage.parts and not (planned is not None and found.takes_column):
        gemm = _with_columns(gemm, weight, x.dtype)
    if "order" in storage.parts:
        gemm = _with_order(gemm, storage.parts["order"])
    cache_plan(storage, key, Plan(gemm, spec.activation, x.is_cpu), version)
    note_quick(gemm, x, weight, before)


def cache_plan(storage: WeightStorage, key: tuple, plan: Plan, version: int) -> Plan:
    """Caches a plan in a weight's storage and returns it.

    Args:
        version: the storage's before the plan was made: another thread may have changed the weight meanwhile.
    """
    with LOCK:
        if storage.version == version:
            if len(storage.plans) >= MAX_PLANS:
                storage.plans.clear()
            storage.plans[key] = plan
    return plan


def operator_plan(x: torch.Tensor, weight: QTensor, activation: qtype | None) -> Gemm | None:
    """The cached plan of a GEMM of the codes with rows x ``[rows, K]``; made if there is none yet.

    Args:
        weight: of a storage that lasts.

    Returns:
        None if the implementation that the registry selects has no plans for operators.
    """
    storage = weight._storage
    key = (x.shape, x.dtype, registry_state.version, activation, weight._spec.transposed)
    found = storage.plans.get(key)
    if found is None:
        if not runs_eagerly():
            return None
        version, weight = storage.version, weight.snapshot()
        chosen = choose(problem_of(weight, x.dtype, x.shape[0], activation)).implementation
        # x was multiplied by the column scale before.
        usable = chosen.plans_operators and not (chosen.takes_column and "column" in storage.parts)
        make = chosen.make_plan if usable else None
        spec = weight._spec
        seen = weight if activation is spec.activation else weight.view_of_storage(activation=activation)
        gemm = None if make is None else make(seen, x.shape[0], x.dtype)
        found = cache_plan(storage, key, Plan(gemm, activation, x.is_cpu), version)  # type: ignore[arg-type]
    return found.gemm if x.is_cpu is found.cpu else None


def _with_columns(gemm: Gemm, weight: QTensor, dtype: torch.dtype) -> Gemm:
    """The plan of a weight with a column scale for x of ``dtype``, from that of its codes.

    A plan that has ``with_column(column)`` returns the one that multiplies x itself, or None.
    """
    part = weight._storage.parts["column"]
    own = getattr(gemm, "with_column", None)
    by_itself: Gemm | None = None if own is None else own(part)
    if by_itself is not None:
        return by_itself
    column = column_for(weight, dtype)  # in x's dtype

    def scaled(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        return gemm(x * column, weight, bias)

    def scaled_by_a_copy(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        return gemm(x * column_for(weight, x.dtype), weight, bias)  # the part may have changed in place

    return scaled if column is part else scaled_by_a_copy


def _with_rotation(gemm: Gemm, block: int) -> Gemm:
    """The plan of a weight whose rows are rotated, from that of its codes."""

    def rotated(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        return gemm(rotate(x, block), weight, bias)

    return rotated


def _with_order(gemm: Gemm, order: torch.Tensor) -> Gemm:
    """The plan of a weight whose columns are stored in another order, from that of its stored columns."""

    def reordered(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        return gemm(in_order(x, order), weight, bias)

    return reordered


def _plan_without_preparation(found: Implementation, matrix: QTensor) -> Gemm:
    """The plan of an implementation without `Implementation.make_plan`: it only skips the selection.

    Args:
        matrix: a snapshot, so that the weight's storage, which owns the plan, is not referenced.
    """

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            out = found.run(x.reshape(-1, x.shape[-1]), matrix, bias, matrix._spec.activation, None)
            return out.view(*x.shape[:-1], out.shape[1])

    return gemm
