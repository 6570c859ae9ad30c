"""Squared errors of a quantized weight, plain or weighted by an importance computed from samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from requanto.config.plan import PlannedWeight
from requanto.runtime.tracing import without_autocast

#: Maximum number of elements measured of one tensor; of larger ones, evenly spaced rows are measured. With importances,
#: which differ a lot between rows, more rows are needed.
MOST_WEIGHTS = 2**18
MOST_WEIGHTS_IMPORTANCE = 2**20


@dataclass(frozen=True)
class Importance:
    """How much an error in each element of a weight changes the model's output.

    Attributes:
        rows: ``[N]``, sum of squared gradients of each output, or None.
        columns: ``[K]``, mean square of each input, or None.
        weights: ``[N, K]``, squared gradient of each element, if rows * columns is not available.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows ``[n, K]`` of a weight that are measured; the weight has ``factor * n`` rows."""

    values: Tensor
    factor: float
    importance: Importance | None = None

    @property
    def norm(self) -> float:
        """Estimate of the squared norm of the whole weight."""
        return self.factor * self.values.float().square().sum(dtype=torch.float64).item()


def rows_of(weight: Tensor, planned: PlannedWeight, dtype: torch.dtype, importance: Importance | None = None) -> Rows:
    """Returns the rows of a weight to measure, in the dtype that it is quantized from.

    Args:
        weight: ``[..., K]``, or ``[..., K, N]`` if ``planned.transposed``.
        planned: its axis and whether it is transposed.
        dtype: the dtype of the rows.
        importance: of the weight.
    """
    canonical = weight.detach().transpose(-1, -2) if planned.transposed else weight.detach()
    # Experts [E, N, K] have rows of length K; a row of a convolution is all inputs of one output channel.
    length = canonical.shape[planned.axis + 1 :].numel() if planned.axis + 1 < canonical.dim() else canonical.shape[-1]
    rows = canonical.reshape(-1, length)
    most = MOST_WEIGHTS if importance is None else MOST_WEIGHTS_IMPORTANCE
    count = max(1, most // max(1, length))
    if len(rows) <= count or planned.options.low_rank:  # a low-rank term fits few rows better than all rows
        return Rows(rows.to(dtype), 1.0, importance)
    picked = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64, device=rows.device).round().long()
    if importance is not None:
        parts = (importance.rows, importance.weights)
        taken = [None if p is None else p[picked.to(p.device)] for p in parts]
        importance = Importance(taken[0], importance.columns, taken[1])
    return Rows(rows[picked].to(dtype), len(rows) / count, importance)


@torch.no_grad()
def squared_errors(rows: Rows, planned: PlannedWeight, name: str) -> tuple[float, float]:
    """Returns (plain, weighted) squared error of the whole weight if quantized as planned; equal without importance."""
    quantized = replace(planned, axis=0, transposed=False).quantize(rows.values, name)
    error = (quantized.dequantize(torch.float32) - rows.values.float()).square_()
    plain = error.sum(dtype=torch.float64).item()
    found = rows.importance
    if found is None:
        return rows.factor * plain, rows.factor * plain
    if found.weights is not None:
        weighted = (error * found.weights.reshape(error.shape).to(error.device)).sum(dtype=torch.float64).item()
    else:
        with without_autocast(error.device):
            by_row = error if found.columns is None else error @ found.columns.to(error.device).unsqueeze(-1)
        by_row = by_row.sum(-1).double()
        weighted = (by_row if found.rows is None else by_row * found.rows.to(error.device)).sum().item()
    return rows.factor * plain, rows.factor * weighted
