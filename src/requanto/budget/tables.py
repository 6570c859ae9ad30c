"""Size and cost of every candidate type of every layer."""

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

#: ``pieces(name)``: the float tensors that make up a parameter: itself, or the tensors that a checkpoint stores for it.
Pieces = Callable[[str], Iterable[Tensor]]


def candidates_by_label(
    names: Sequence[str],
    planned: Mapping[str, PlannedWeight],
    shapes: Mapping[str, Tensor],
    texts: Sequence[str],
    running: bool = False,
) -> dict[str, list[Candidate]]:
    """Maps labels to the candidates of a module's weights, one per weight; only labels that all its weights have.

    Args:
        running: see `requanto.budget.candidates.bytes_of`.
    """
    each = [{c.label: c for c in candidates_for(planned[name], shapes[name], texts, running)} for name in names]
    return {label: [table[label] for table in each] for label in each[0] if all(label in table for table in each)}


def measure_module(
    names: Sequence[str],
    candidates: Mapping[str, list[Candidate]],
    pieces: Pieces,
    shapes: Mapping[str, Tensor],
    importance: Mapping[str, Importance],
) -> dict[str, tuple[int, float, float]] | None:
    """Maps labels to (bytes, cost, relative error) of a module; None if its values are not available."""
    cost = dict.fromkeys(candidates, 0.0)
    plain = dict.fromkeys(candidates, 0.0)
    norm = 0.0
    weighted = all(name in importance for name in names)
    for position, name in enumerate(names):
        found = [_rows(piece, shapes[name], candidates, position, importance.get(name)) for piece in pieces(name)]
        if not found or any(rows is None for rows in found):
            return None
        for rows in found:
            norm += rows.norm  # type: ignore[union-attr]
            for label, row in candidates.items():
                choice = row[position].planned
                if choice is not None:
                    one, other = squared_errors(rows, choice, name)  # type: ignore[arg-type]
                    plain[label] += one
                    cost[label] += other
    norm = norm or 1.0
    # The weight of a layer is the square root of its number of elements. Measured on SmolLM2 and MiniLM, this is better than
    # equal weights for all layers, and than the number of elements itself.
    share = math.sqrt(sum(shapes[name].numel() for name in names))
    return {
        label: (
            sum(c.bytes for c in row),
            cost[label] if weighted else share * plain[label] / norm,
            (plain[label] / norm) ** 0.5,
        )
        for label, row in candidates.items()
    }


def _rows(
    piece: Tensor,
    shape: Tensor,
    candidates: Mapping[str, list[Candidate]],
    position: int,
    importance: Importance | None,
) -> Rows | None:
    """Returns the rows of a piece: the whole parameter, or (in a checkpoint) one of several experts; None for others."""
    planned = next((row[position].planned for row in candidates.values() if row[position].planned is not None), None)
    if planned is None:
        return None
    if piece.shape == shape.shape:
        return rows_of(piece, planned, shape.dtype, importance)
    length = shape.shape[-2] if planned.transposed else shape.shape[-1]
    if piece.dim() == 2 and length in piece.shape:
        transposed = piece.shape[-1] != length
        return rows_of(piece, replace(planned, axis=0, transposed=transposed), shape.dtype)
    return None


def scaled_costs(
    table: Mapping[str, tuple[int, float, float]], others: Sequence[Mapping[str, tuple[int, float, float]]]
) -> dict[str, tuple[int, float, float]]:
    """Returns the costs of a layer that no sample reached: its squared errors times the other layers' mean sensitivity."""
    rows = [row for other in others for row in other.values() if row[1] > 0 and row[2] > 0]
    # Geometric mean, because sensitivities of layers differ by orders of magnitude.
    factor = math.exp(sum(math.log(cost / error**2) for _, cost, error in rows) / len(rows)) if rows else 1.0
    return {label: (size, factor * error**2, error) for label, (size, _, error) in table.items()}


def mean_costs(
    module: str, candidates: Mapping[str, list[Candidate]], tables: Mapping[str, Any], unknown: Sequence[str]
) -> dict[str, tuple[int, float, float]]:
    """Returns the costs of a layer that cannot be measured: the mean over the other layers."""
    known = [tables[m] for m in tables if m not in unknown]
    if not known:
        raise ValueError(
            f"found none of the weights to measure in the checkpoint's files (e.g. {module}). Load the float model and call "
            f"requanto.quantize(model, weights='auto', ...) on it"
        )
    logger.warning(
        "%s is stored in another layout than in the model: its errors are estimated by those of other layers", module
    )
    result = {}
    for label, row in candidates.items():
        same = [table[label] for table in known if label in table] or [next(iter(table.values())) for table in known]
        result[label] = (
            sum(c.bytes for c in row),
            sum(r[1] for r in same) / len(same),
            sum(r[2] for r in same) / len(same),
        )
    return result
