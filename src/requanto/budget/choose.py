"""From a budget to a type for each layer."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from requanto.budget.allocate import Allocation, Option, allocate
from requanto.budget.candidates import ALL_CANDIDATES, FLOAT, GROUPED_CANDIDATES, Candidate, candidates_for
from requanto.budget.measure import Importance, Rows, rows_of, squared_errors
from requanto.config import QuantoConfig
from requanto.limit import Limit
from requanto.plan import PlannedWeight
from requanto.qtypes import short_name

logger = logging.getLogger(__name__)

#: ``pieces(name)``: float tensors that together are a parameter: itself, or the parts a checkpoint keeps it in.
Pieces = Callable[[str], Iterable[Tensor]]


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        planned: the plan with every type settled; weights that stay float are not in it.
        labels: module -> ``"int4 g64"`` ... or ``"float"``, of the modules that were chosen for.
        errors: module -> relative error of its weights, ``|W - W_q| / |W|``.
        costs: module -> what was minimized: squared relative errors or, on samples, the expected change of the answer.
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

    Weights of one module get the same form. A module's cost is its squared relative weight error, or what ``importance``
    makes of its errors.

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
    forms = {module: _forms(names, planned, shapes, texts) for module, names in groups.items()}
    capacity = limit.capacity(weights, rest) - fixed
    check_limit(forms, capacity, limit, weights, rest, fixed)

    tables: dict[str, dict[str, tuple[int, float, float]]] = {}
    unknown: list[str] = []
    unseen: list[str] = []
    importance = importance or {}
    bar = tqdm(groups.items(), desc="measuring", unit="layer", disable=not progress)
    for module, names in bar:
        table = _measured(names, forms[module], pieces, shapes, importance)
        if table is None:
            unknown.append(module)
        else:
            tables[module] = table
            if importance and not all(name in importance for name in names):
                unseen.append(module)
    for module in unseen:
        tables[module] = _weighed_like_the_others(tables[module], [t for m, t in tables.items() if m not in unseen])
    for module in unknown:
        tables[module] = _like_the_others(module, forms[module], tables, unknown)
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


def _forms(
    names: Sequence[str], planned: Mapping[str, PlannedWeight], shapes: Mapping[str, Tensor], texts: Sequence[str]
) -> dict[str, list[Candidate]]:
    """Label -> a candidate for each of a module's weights. (A module with several has experts: one row length or few.)"""
    each = [{c.label: c for c in candidates_for(planned[name], shapes[name], texts)} for name in names]
    return {label: [table[label] for table in each] for label in each[0] if all(label in table for table in each)}


def _measured(
    names: Sequence[str],
    forms: Mapping[str, list[Candidate]],
    pieces: Pieces,
    shapes: Mapping[str, Tensor],
    importance: Mapping[str, Importance],
) -> dict[str, tuple[int, float, float]] | None:
    """Label -> (bytes, cost, relative error) of a module; None where its values are not to be had."""
    cost = dict.fromkeys(forms, 0.0)
    plain = dict.fromkeys(forms, 0.0)
    norm = 0.0
    weighted = all(name in importance for name in names)
    for position, name in enumerate(names):
        found = [_rows(piece, shapes[name], forms, position, importance.get(name)) for piece in pieces(name)]
        if not found or any(rows is None for rows in found):
            return None
        for rows in found:
            norm += rows.norm  # type: ignore[union-attr]
            for label, row in forms.items():
                choice = row[position].planned
                if choice is not None:
                    one, other = squared_errors(rows, choice, name)  # type: ignore[arg-type]
                    plain[label] += one
                    cost[label] += other
    norm = norm or 1.0
    return {
        label: (
            sum(c.bytes for c in row),
            cost[label] if weighted else plain[label] / norm,
            (plain[label] / norm) ** 0.5,
        )
        for label, row in forms.items()
    }


def _rows(
    piece: Tensor, shape: Tensor, forms: Mapping[str, list[Candidate]], position: int, importance: Importance | None
) -> Rows | None:
    """The rows of a piece, which has the parameter's shape or, in a checkpoint, may be one expert of many."""
    planned = next((row[position].planned for row in forms.values() if row[position].planned is not None), None)
    if planned is None:
        return None
    if piece.shape == shape.shape:
        return rows_of(piece, planned, shape.dtype, importance)
    length = shape.shape[-2] if planned.transposed else shape.shape[-1]
    if piece.dim() == 2 and length in piece.shape:
        transposed = piece.shape[-1] != length
        return rows_of(piece, replace(planned, axis=0, transposed=transposed), shape.dtype)
    return None


def _weighed_like_the_others(
    table: Mapping[str, tuple[int, float, float]], others: Sequence[Mapping[str, tuple[int, float, float]]]
) -> dict[str, tuple[int, float, float]]:
    """Costs of a layer that no sample reached: a squared relative error counts as much as it does in the others."""
    rows = [row for other in others for row in other.values() if row[1] > 0 and row[2] > 0]
    # The geometric mean: sensitivities of layers lie powers of two apart.
    factor = math.exp(sum(math.log(cost / error**2) for _, cost, error in rows) / len(rows)) if rows else 1.0
    return {label: (size, factor * error**2, error) for label, (size, _, error) in table.items()}


def _like_the_others(
    module: str, forms: Mapping[str, list[Candidate]], tables: Mapping[str, Any], unknown: Sequence[str]
) -> dict[str, tuple[int, float, float]]:
    """Costs of a layer that cannot be measured: the mean of the others'."""
    known = [tables[m] for m in tables if m not in unknown]
    if not known:
        raise ValueError(
            f"no weight could be found in the checkpoint's files to measure (e.g. {module}). Load the float model and call "
            f"requanto.quantize(model, weights='auto', ...) on it"
        )
    logger.warning(
        "%s is stored in another form than the model's: its errors are taken to be those of the others", module
    )
    result = {}
    for label, row in forms.items():
        same = [table[label] for table in known if label in table] or [next(iter(table.values())) for table in known]
        result[label] = (
            sum(c.bytes for c in row),
            sum(r[1] for r in same) / len(same),
            sum(r[2] for r in same) / len(same),
        )
    return result


# ---------------------------------------------------------------------- models


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
