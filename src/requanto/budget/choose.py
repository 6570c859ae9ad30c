"""Chooses a type for each layer within a budget."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from requanto.budget.allocate import Allocation, Option, allocate
from requanto.budget.candidates import ALL_CANDIDATES, FLOAT, GROUPED_CANDIDATES, Candidate, bytes_of
from requanto.budget.measure import Importance
from requanto.budget.tables import Pieces, candidates_by_label, mean_costs, measure_module, scaled_costs
from requanto.config.few_bits import warn_few_bits_of_budget
from requanto.config.limit import Limit
from requanto.config.plan import PlannedWeight
from requanto.dtypes.qtypes import short_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Result of `choose`.

    Attributes:
        planned: the plan with a type for every weight; weights that stay float are left out.
        labels: module -> ``"int4 g64"`` ... or ``"float"``, for the modules whose type was chosen.
        errors: module -> relative error of its weights, ``|W - W_q| / |W|``.
        costs: module -> the minimized cost: weighted squared relative error, or expected change of the model's output.
        tables: module -> label -> (bytes, cost) of all candidates.
        allocation: the solution of the knapsack problem.
        weights, bytes: number of elements of all planned weights, and their total size.
        measured: ``"weights"`` or ``"samples"``.
        limit: the budget.
        asked: the original plan.
    """

    planned: dict[str, PlannedWeight]
    labels: dict[str, str]
    errors: dict[str, float]
    costs: dict[str, float]
    tables: dict[str, dict[str, tuple[int, float]]]
    allocation: Allocation
    weights: int
    bytes: int
    measured: str
    limit: Limit
    asked: Mapping[str, PlannedWeight] = field(repr=False)

    @property
    def bits(self) -> float:
        """Mean bits per weight over all planned weights."""
        return self.bytes * 8 / max(1, self.weights)

    def modules(self) -> dict[str, Any]:
        """Returns the choice as ``modules`` argument of QuantoConfig."""
        found: dict[str, Any] = {}
        for name, planned in self.planned.items():
            module = name.rpartition(".")[0]
            if module in self.labels:
                group = planned.options.group_size
                found[module] = {
                    "weights": short_name(planned.options.qtype),
                    "group_size": -1 if group is None else group,
                }
                # Options of the config that do not apply to the chosen type are overridden here.
                asked = self.asked[name].options
                for key in ("symmetric", "method"):
                    if getattr(asked, key) != getattr(planned.options, key):
                        found[module][key] = getattr(planned.options, key)
        found |= {module: None for module, label in self.labels.items() if label == FLOAT}
        # Longer names first: "fc" also matches "block.fc", and the first match is used.
        return dict(sorted(found.items(), key=lambda item: -item[0].count(".")))

    def record(self) -> dict[str, Any]:
        """Returns the record of the choice that a checkpoint stores, as plain JSON."""
        asked = {"bits": self.limit.bits} if self.limit.bits is not None else {"max_memory": self.limit.max_memory}
        return {
            "asked": asked,
            "measured": self.measured,
            "bits": round(self.bits, 4),
            "bytes": self.bytes,
            "gap": self.allocation.gap,
            "layers": {
                name: [float(f"{self.errors[name]:.4g}"), float(f"{self.costs[name]:.4g}")] for name in self.labels
            },
        }


def choose(
    planned: Mapping[str, PlannedWeight],
    shapes: Mapping[str, Tensor],
    pieces: Pieces,
    limit: Limit,
    rest: int,
    *,
    candidates: Sequence[str] | None = None,
    importance: Mapping[str, Importance] | None = None,
    progress: bool = True,
) -> Choice:
    """Chooses a type for every planned weight with ``options.auto``, so that all planned weights fit the budget.

    All weights of a module get the same type. The cost of a module is its squared relative weight error times the square
    root of its number of elements, or with ``importance`` the expected change of the model's output.

    Args:
        planned: full parameter name -> plan; weights without ``options.auto`` count with their planned size.
        shapes: the parameters, or meta tensors of their shapes and dtypes.
        pieces: their values.
        limit: the budget.
        rest: bytes of everything in the model that is not planned.
        candidates: see `requanto.budget.candidates`.
        importance: importance of each weight, by name (`requanto.budget.sensitivity`).
        progress: show a progress bar.

    Raises:
        ValueError: the budget is below the smallest or above the largest possible size; the message gives that size.
    """
    texts = tuple(candidates or (ALL_CANDIDATES if importance else GROUPED_CANDIDATES))
    groups: dict[str, list[str]] = {}
    fixed, running = 0, limit.max_memory is not None
    for name, choice in planned.items():
        if choice.options.auto:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        else:
            fixed += bytes_of(choice.quantize(torch.empty_like(shapes[name], device="meta"), name), running)
    weights = sum(shapes[name].numel() for name in planned)
    options = {module: candidates_by_label(names, planned, shapes, texts, running) for module, names in groups.items()}
    capacity = limit.capacity(weights, rest) - fixed
    check_limit(options, capacity, limit, weights, rest, fixed)

    tables: dict[str, dict[str, tuple[int, float, float]]] = {}
    unknown: list[str] = []
    unseen: list[str] = []
    importance = importance or {}
    bar = tqdm(groups.items(), desc="measuring", unit="layer", disable=not progress)
    for module, names in bar:
        table = measure_module(names, options[module], pieces, shapes, importance)
        if table is None:
            unknown.append(module)
        else:
            tables[module] = table
            if importance and not all(name in importance for name in names):
                unseen.append(module)
    for module in unseen:
        tables[module] = scaled_costs(tables[module], [t for m, t in tables.items() if m not in unseen])
    for module in unknown:
        tables[module] = mean_costs(module, options[module], tables, unknown)
    items = [[Option(size, cost) for size, cost, _ in tables[module].values()] for module in groups]
    allocation = allocate(items, capacity)
    result = dict(planned)
    labels: dict[str, str] = {}
    for (module, names), pick in zip(groups.items(), allocation.picks):
        label = list(tables[module])[pick]
        labels[module] = label
        for name in names:
            del result[name]
            new_plan = options[module][label][names.index(name)].planned
            if new_plan is not None:
                result[name] = new_plan
    result = {name: result[name] for name in planned if name in result}
    chosen = Choice(
        result,
        labels,
        {m: tables[m][label][2] for m, label in labels.items()},
        {m: tables[m][label][1] for m, label in labels.items()},
        {m: {label: row[:2] for label, row in table.items()} for m, table in tables.items()},
        allocation,
        weights,
        allocation.bytes + fixed,
        "samples" if importance else "weights",
        limit,
        planned,
    )
    logger.info(
        "%s: %d layers, %d bytes, %.4f bits per weight (%s)",
        *(limit, len(groups), chosen.bytes, chosen.bits),
        ", ".join(f"{count} {label}" for label, count in Counter(labels.values()).most_common()),
    )
    if not importance:
        warn_few_bits_of_budget(chosen.bits)
    return chosen


def check_limit(
    options: Mapping[str, Mapping[str, list[Candidate]]],
    capacity: int,
    limit: Limit,
    weights: int,
    rest: int,
    fixed: int,
) -> None:
    """Raises for a budget below the smallest or above the largest possible size.

    Raises:
        ValueError: see above; the message gives the nearest possible budget.
    """
    sizes = [{label: sum(c.bytes for c in row) for label, row in table.items()} for table in options.values()]
    smallest, largest = sum(min(s.values()) for s in sizes), sum(s[FLOAT] for s in sizes)
    if capacity < smallest:
        kinds = ", ".join(sorted({min(s, key=s.__getitem__) for s in sizes}))
        raise ValueError(
            f"{limit} is too small: the smallest types of the {len(sizes)} layers ({kinds}) need "
            f"{limit.as_argument(smallest + fixed, weights, rest, up=True)}. Use that or more"
            + ("" if limit.bits is not None else f"; {rest} bytes of it are not quantized")
            + "."
        )
    if capacity > largest:
        raise ValueError(
            f"{limit} is more than the float model takes: with "
            f"{limit.as_argument(largest + fixed, weights, rest, up=False)} every weight stays float, so there is nothing "
            f"to quantize. Use less, or load without a quantization_config."
        )
