"""From a budget to a type for each layer."""

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
from requanto.budget.candidates import ALL_CANDIDATES, FLOAT, GROUPED_CANDIDATES, Candidate
from requanto.budget.measure import Importance
from requanto.budget.tables import Pieces, forms_of, like_the_others, measured, weighed_like_the_others
from requanto.config.limit import Limit
from requanto.config.plan import PlannedWeight
from requanto.dtypes.qtypes import short_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        planned: the plan with every type settled; weights that stay float are not in it.
        labels: module -> ``"int4 g64"`` ... or ``"float"``, of the modules that were chosen for.
        errors: module -> relative error of its weights, ``|W - W_q| / |W|``.
        costs: module -> what was minimized: squared relative errors, weighted, or the expected change of the answer.
        tables: module -> label -> (bytes, cost): everything that was weighed.
        allocation: the solution.
        weights, bytes: how many weights the plan names, and what they take.
        measured: ``"weights"`` or ``"samples"``.
        limit: what was asked for.
        asked: the plan before.
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
        """Bits a weight, of all that the plan named."""
        return self.bytes * 8 / max(1, self.weights)

    def modules(self) -> dict[str, Any]:
        """The choice in the words of ``QuantoConfig(modules=)``."""
        found: dict[str, Any] = {}
        for name, planned in self.planned.items():
            module = name.rpartition(".")[0]
            if module in self.labels:
                group = planned.options.group_size
                found[module] = {
                    "weights": short_name(planned.options.qtype),
                    "group_size": -1 if group is None else group,
                }
                # Where a type could not take what the whole config says, its entry says so.
                asked = self.asked[name].options
                for key in ("symmetric", "method"):
                    if getattr(asked, key) != getattr(planned.options, key):
                        found[module][key] = getattr(planned.options, key)
        found |= {module: None for module, label in self.labels.items() if label == FLOAT}
        # Deeper names first: "fc" alone would match "block.fc" too, and the first match counts.
        return dict(sorted(found.items(), key=lambda item: -item[0].count(".")))

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps to explain itself. Plain JSON."""
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
    """Chooses a form for every planned weight whose type is open, so that all of them keep within the budget.

    Weights of one module get the same form. A module's cost is its squared relative weight error times the square root of
    its number of weights, or what ``importance`` makes of its errors.

    Args:
        planned: full parameter name -> plan; of those with ``options.auto`` the type is chosen, the others count as planned.
        shapes: the parameters, or meta tensors of their shapes and dtypes.
        pieces: their values.
        limit: the budget.
        rest: bytes of everything in the model that is not planned.
        candidates: see `requanto.budget.candidates`.
        importance: of weights, by name (`requanto.budget.sensitivity`).
        progress: show a progress bar.

    Raises:
        ValueError: the budget is smaller than the smallest forms together, or larger than the float weights; the message
            holds the nearest possible one.
    """
    texts = tuple(candidates or (ALL_CANDIDATES if importance else GROUPED_CANDIDATES))
    groups: dict[str, list[str]] = {}
    fixed = 0
    for name, choice in planned.items():
        if choice.options.auto:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        else:
            fixed += choice.quantize(torch.empty_like(shapes[name], device="meta"), name).nbytes
    weights = sum(shapes[name].numel() for name in planned)
    forms = {module: forms_of(names, planned, shapes, texts) for module, names in groups.items()}
    capacity = limit.capacity(weights, rest) - fixed
    check_limit(forms, capacity, limit, weights, rest, fixed)

    tables: dict[str, dict[str, tuple[int, float, float]]] = {}
    unknown: list[str] = []
    unseen: list[str] = []
    importance = importance or {}
    bar = tqdm(groups.items(), desc="measuring", unit="layer", disable=not progress)
    for module, names in bar:
        table = measured(names, forms[module], pieces, shapes, importance)
        if table is None:
            unknown.append(module)
        else:
            tables[module] = table
            if importance and not all(name in importance for name in names):
                unseen.append(module)
    for module in unseen:
        tables[module] = weighed_like_the_others(tables[module], [t for m, t in tables.items() if m not in unseen])
    for module in unknown:
        tables[module] = like_the_others(module, forms[module], tables, unknown)
    items = [[Option(size, cost) for size, cost, _ in tables[module].values()] for module in groups]
    allocation = allocate(items, capacity)
    result = dict(planned)
    labels: dict[str, str] = {}
    for (module, names), pick in zip(groups.items(), allocation.picks):
        label = list(tables[module])[pick]
        labels[module] = label
        for name in names:
            del result[name]
            form = forms[module][label][names.index(name)].planned
            if form is not None:
                result[name] = form
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
        "%s: %d layers take %d bytes, %.4f bits a weight (%s)",
        *(limit, len(groups), chosen.bytes, chosen.bits),
        ", ".join(f"{count} {label}" for label, count in Counter(labels.values()).most_common()),
    )
    return chosen


def check_limit(
    forms: Mapping[str, Mapping[str, list[Candidate]]], capacity: int, limit: Limit, weights: int, rest: int, fixed: int
) -> None:
    """Refuses a budget that nothing fits, or that everything fits.

    Raises:
        ValueError: it holds the nearest budget that is possible.
    """
    sizes = [{label: sum(c.bytes for c in row) for label, row in table.items()} for table in forms.values()]
    smallest, largest = sum(min(s.values()) for s in sizes), sum(s[FLOAT] for s in sizes)
    if capacity < smallest:
        kinds = ", ".join(sorted({min(s, key=s.__getitem__) for s in sizes}))
        raise ValueError(
            f"{limit} is too small: the smallest forms of the {len(sizes)} layers ({kinds}) need "
            f"{limit.in_words(smallest + fixed, weights, rest, up=True)}. Ask for that or more"
            + ("" if limit.bits is not None else f"; {rest} bytes of it are not quantized")
            + "."
        )
    if capacity > largest:
        raise ValueError(
            f"{limit} is more than the float model takes: {limit.in_words(largest + fixed, weights, rest, up=False)} keeps "
            f"every weight as it is, so there is nothing to quantize. Ask for less, or load without a quantization_config."
        )
