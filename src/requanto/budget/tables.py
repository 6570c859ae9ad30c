"""What every form of every layer takes and costs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from requanto.budget.candidates import Candidate, candidates_for
from requanto.budget.measure import Importance, Rows, rows_of, squared_errors
from requanto.config.plan import PlannedWeight

logger = logging.getLogger(__name__)

#: ``pieces(name)``: float tensors that together are a parameter: itself, or the parts a checkpoint keeps it in.
Pieces = Callable[[str], Iterable[Tensor]]


def forms_of(
    names: Sequence[str], planned: Mapping[str, PlannedWeight], shapes: Mapping[str, Tensor], texts: Sequence[str]
) -> dict[str, list[Candidate]]:
    """Label -> a candidate for each of a module's weights. (A module with several has experts: one row length or few.)"""
    each = [{c.label: c for c in candidates_for(planned[name], shapes[name], texts)} for name in names]
    return {label: [table[label] for table in each] for label in each[0] if all(label in table for table in each)}


def measured(
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
    # Between every layer alike and every weight alike: measured, better than both on SmolLM2 and MiniLM.
    share = math.sqrt(sum(shapes[name].numel() for name in names))
    return {
        label: (
            sum(c.bytes for c in row),
            cost[label] if weighted else share * plain[label] / norm,
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


def weighed_like_the_others(
    table: Mapping[str, tuple[int, float, float]], others: Sequence[Mapping[str, tuple[int, float, float]]]
) -> dict[str, tuple[int, float, float]]:
    """Costs of a layer that no sample reached: a squared relative error counts as much as it does in the others."""
    rows = [row for other in others for row in other.values() if row[1] > 0 and row[2] > 0]
    # The geometric mean: sensitivities of layers lie powers of two apart.
    factor = math.exp(sum(math.log(cost / error**2) for _, cost, error in rows) / len(rows)) if rows else 1.0
    return {label: (size, factor * error**2, error) for label, (size, _, error) in table.items()}


def like_the_others(
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
