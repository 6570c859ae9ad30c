"""Budgets of whole models: what a budget leaves for the weights, and plans that are settled on a model in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from requanto.budget.choose import Choice, choose
from requanto.budget.measure import Importance
from requanto.budget.sensitivity import importances
from requanto.budget.tables import Pieces
from requanto.config.config import AUTO, QuantoConfig
from requanto.config.limit import Limit
from requanto.config.plan import PlannedWeight
from requanto.dtypes.qtypes import qtype


def model_bytes(model: nn.Module, names: Iterable[str]) -> int:
    """Bytes of all parameters and buffers of a model (or of its shapes, on meta) but the named parameters.

    Tied ones count once, also where a library has not made them one tensor yet.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources = {id(p) for name, p in parameters.items() if name not in tied}
    left = {id(model.get_parameter(name)) for name in names}
    left |= {id(p) for name, p in parameters.items() if name in tied} - sources
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in left}
    return sum(t.nelement() * t.element_size() for t in others.values())


#: where a model quantized in memory keeps the record of its choice
_RECORD = "_requanto_budget"


def budget_of(model: nn.Module) -> dict[str, Any] | None:
    """What a budget led to in a model that `requanto.quantize` made (`Choice.record`); None: there was none."""
    return model.__dict__.get(_RECORD)


def keep(model: nn.Module, chosen: Choice) -> None:
    """Leaves the record of a choice with its model."""
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
    """Settles a plan and writes the choice into its config; None where nothing was left open.

    Args:
        model: the model the plan is for, on any device, also meta.
        config: whose ``bits`` or ``max_memory`` is the budget; from here on it holds a type for every layer.
        planned: its plan.
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
    config.settle(chosen.modules(), chosen.record())
    return chosen


def auto_limit(
    weights: str | qtype | None, bits: float | None, max_memory: int | str | None, candidates: Sequence[str] | None
) -> Limit | None:
    """The budget where ``weights`` is ``"auto"``; None where it is a type.

    Raises:
        ValueError: a budget without ``"auto"``, or the reverse.
    """
    if weights == AUTO:
        return Limit.of(bits, max_memory)
    if bits is not None or max_memory is not None or candidates is not None:
        raise ValueError(f"bits, max_memory and candidates belong to weights='auto', found weights={weights!r}")
    return None


def settle_on_samples(
    model: nn.Module,
    config: QuantoConfig,
    planned: dict[str, PlannedWeight],
    calibration: Any,
    progress: bool = True,
) -> dict[str, PlannedWeight]:
    """A plan with every open type settled on samples; ``config`` then holds a choice for each layer."""
    if not any(choice.options.auto for choice in planned.values()):
        return planned
    found = importances(model, planned, calibration, progress)
    chosen = resolve(model, config, planned, importance=found, progress=progress)
    return planned if chosen is None else chosen.planned


def choose_in_memory(
    model: nn.Module,
    planned: Mapping[str, PlannedWeight],
    open_ones: Collection[str],
    limit: Limit,
    candidates: Sequence[str] | None,
    calibration: Any,
    options: Mapping[str, Any],
    progress: bool,
) -> dict[str, PlannedWeight]:
    """The plan with a type for every module in ``open_ones``; float ones are left out. See `choose`."""
    for name, choice in planned.items():
        choice.options.auto = name.rpartition(".")[0] in open_ones
        for key, value in options.items():
            setattr(choice.options, "method" if key == "search" else key, value)
    found = None if calibration is None else importances(model, planned, calibration, progress)
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
    keep(model, chosen)
    return chosen.planned
