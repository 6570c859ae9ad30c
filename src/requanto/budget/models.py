"""Budgets of models: size of the parts that are not quantized, and choosing the types of a model's plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from requanto.budget.choose import Choice, choose
from requanto.budget.compensation import after_gptq
from requanto.budget.measure import Importance
from requanto.budget.sensitivity import importances
from requanto.budget.tables import Pieces
from requanto.config.config import AUTO, QuantoConfig
from requanto.config.limit import Limit
from requanto.config.plan import PlannedWeight
from requanto.dtypes.qtypes import qtype
from requanto.methods import find_method
from requanto.methods.method import Method
from requanto.methods.samples import Samples


def model_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Returns the bytes of all parameters and buffers of a model (also on meta) except the named parameters.

    Tied weights count once, also if the library has not tied them yet.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources = {id(p) for name, p in parameters.items() if name not in tied}
    left = {id(model.get_parameter(name)) for name in names}
    left |= {id(p) for name, p in parameters.items() if name in tied} - sources
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in left}
    return sum(t.nelement() * t.element_size() for t in others.values())


#: attribute of a model quantized in memory: the record of its choice
_RECORD = "_requanto_budget"


def budget_of(model: nn.Module) -> dict[str, Any] | None:
    """Returns the record (`Choice.record`) of a model quantized in place with a budget; None for any other model."""
    return model.__dict__.get(_RECORD)


def attach_record(model: nn.Module, chosen: Choice) -> None:
    """Stores the record of a choice on its model."""
    model.__dict__[_RECORD] = chosen.record()


def resolve(
    model: nn.Module,
    config: QuantoConfig,
    planned: Mapping[str, PlannedWeight],
    pieces: Pieces | None = None,
    *,
    importance: Mapping[str, Importance] | None = None,
    progress: bool = True,
) -> Choice | None:
    """Chooses the types of a plan and records them in the config; returns None if no weight has ``options.auto``.

    Args:
        model: the model of the plan, on any device, also meta.
        config: its ``bits`` or ``max_memory`` is the budget; afterwards it holds a type for every layer.
        planned: the model's plan.
        pieces: the weights' values; None: those of the model's parameters.
        importance, progress: see `choose`.
    """
    if not any(choice.options.auto for choice in planned.values()):
        return None
    shapes = {name: model.get_parameter(name) for name in planned}
    chosen = choose(
        planned,
        shapes,
        (lambda name: [shapes[name]]) if pieces is None else pieces,
        Limit.of(config.bits, config.max_memory),
        model_bytes(model, planned),
        candidates=config.candidates,
        importance=importance,
        progress=progress,
    )
    config.resolve_budget(chosen.modules(), chosen.record())
    return chosen


def auto_limit(
    weights: str | qtype | None, bits: float | None, max_memory: int | str | None, candidates: Sequence[str] | None
) -> Limit | None:
    """Returns the budget if ``weights`` is ``"auto"``; None if it is a type.

    Raises:
        ValueError: a budget without ``"auto"``, or the reverse.
    """
    if weights == AUTO:
        return Limit.of(bits, max_memory)
    if bits is not None or max_memory is not None or candidates is not None:
        raise ValueError(f"bits, max_memory and candidates belong to weights='auto', found weights={weights!r}")
    return None


def resolve_on_samples(
    model: nn.Module,
    config: QuantoConfig,
    planned: dict[str, PlannedWeight],
    calibration: Any,
    progress: bool = True,
    method: str | Method = "gptq",
) -> dict[str, PlannedWeight]:
    """Returns the plan with types chosen with samples, for rounding by ``method``, and records them in ``config``."""
    if not any(choice.options.auto for choice in planned.values()):
        return planned
    found = sample_costs(model, planned, calibration, find_method(method), progress)
    chosen = resolve(model, config, planned, importance=found, progress=progress)
    return planned if chosen is None else chosen.planned


def sample_costs(
    model: nn.Module, planned: Mapping[str, PlannedWeight], calibration: Any, method: Method, progress: bool
) -> dict[str, Importance]:
    """Returns the importance of errors that are left after a method has rounded."""
    samples = Samples(calibration)
    found = importances(model, planned, samples, progress)
    damping = method.compensation
    return found if damping is None else after_gptq(model, planned, samples, found, damping)


def choose_in_memory(
    model: nn.Module,
    planned: Mapping[str, PlannedWeight],
    auto_modules: Collection[str],
    limit: Limit,
    candidates: Sequence[str] | None,
    calibration: Any,
    options: Mapping[str, Any],
    progress: bool,
    method: Method,
) -> dict[str, PlannedWeight]:
    """Returns the plan with a type for every module in ``auto_modules``; weights that stay float are left out.

    See `choose`; ``method`` rounds the weights, and is not used without samples.
    """
    for name, choice in planned.items():
        choice.options.auto = name.rpartition(".")[0] in auto_modules
        for key, value in options.items():
            setattr(choice.options, "method" if key == "search" else key, value)
    found = None
    if calibration is not None:
        found = sample_costs(model, planned, calibration, method, progress)
    shapes = {name: model.get_parameter(name) for name in planned}
    chosen = choose(
        planned,
        shapes,
        lambda name: [shapes[name]],
        limit,
        model_bytes(model, planned),
        candidates=candidates,
        importance=found,
        progress=progress,
    )
    attach_record(model, chosen)
    return chosen.planned
