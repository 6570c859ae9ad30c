"""Budgets for a float model in memory: what `requanto.quantize(model, weights="auto", ...)` does first."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from requanto.budget.choose import choose, keep, model_bytes, resolve
from requanto.budget.sensitivity import importances
from requanto.config import AUTO, QuantoConfig
from requanto.limit import Limit
from requanto.plan import PlannedWeight
from requanto.qtypes import qtype


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
