"""The basis in which methods round a weight: columns divided by a column scale, rows rotated, less a low-rank term.

    W = rotated(codes) * column + up @ down

Methods round plain rows ``[N, K]`` and see the moments of the inputs that these rows are multiplied with: ``column * x``,
rotated. So every method works with column scales (`requanto.scales.columns`), rotation (`requanto.scales.rotation`) and
low-rank terms, and none of them knows about it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

from requanto.methods.gptq import Rounded, damped, row_errors
from requanto.methods.moments import Moments
from requanto.scales.correction import left_vectors
from requanto.scales.rotation import rotate

#: Alternations of codes and low-rank term; each rounds the weight once.
TURNS = 3
#: Damping of the second moment that weighs the low-rank term.
DAMPING = 0.1


@dataclass(frozen=True)
class Basis:
    """What is undone after the codes of a weight are dequantized.

    Attributes:
        column: ``[K]``, as it is stored; None: no column scale.
        rotation: size of the blocks in which rows are rotated; None: no rotation.
        up, down: ``[N, r]`` and ``[r, K]``, as they are stored; None: no low-rank term.
    """

    column: torch.Tensor | None = None
    rotation: int | None = None
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the rows to round ``[N, K]`` for a float weight without its low-rank term."""
        rows = weight if self.column is None else weight / self.column.float()
        return rows if self.rotation is None else rotate(rows, self.rotation)

    def moments(self, moments: Moments) -> Moments:
        """Returns the moments of the inputs that the rows are multiplied with."""
        if self.column is not None:
            moments = moments.scaled(1 / self.column.float())
        return moments if self.rotation is None else rotated_moments(moments, self.rotation)

    def values(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the weight ``[N, K]`` of dequantized rows, with the low-rank term. Gradients reach the rows."""
        values = rows if self.rotation is None else rotate(rows, self.rotation)
        if self.column is not None:
            values = values * self.column.float()
        if self.up is None or self.down is None:
            return values
        return values + self.up.float() @ self.down.float()


def rotated_moments(moments: Moments, block: int) -> Moments:
    """Returns the second moments of rotated inputs. ``absolute`` and ``peak`` stay those of the inputs before.

    Raises:
        ValueError: the moments are not full.
    """
    if moments.hessian is None:
        raise ValueError("the second moments of rotated inputs need those of all pairs of input channels")
    found = copy.copy(moments)
    for name in ("hessian", "cross"):
        value = getattr(moments, name)
        if value is not None:
            setattr(found, name, rotate(rotate(value, block).t().contiguous(), block).t().contiguous())
    found.square = found.hessian.diagonal().clone()  # type: ignore[union-attr]
    return found


def with_low_rank(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rank: int,
    dtype: torch.dtype,
    rounded: Callable[[torch.Tensor], tuple[Rounded, torch.Tensor]],
    name: str,
) -> tuple[Rounded, torch.Tensor, torch.Tensor]:
    """Rounds a weight to codes plus a low-rank term, with little error of the layer's output.

    Codes and term are found in turns (LoftQ, Li et al. 2023, arXiv:2310.08659), the term as the one of least output error
    for the codes (CLoQ, Deng et al. 2025, arXiv:2501.18475). Two starts are tried: no term, and the term of the weight
    itself, which takes large weights away from the codes (SVDQuant, Li et al. 2024, arXiv:2411.05007).

    Args:
        weight: float32 ``[N, K]``.
        hessian: ``[K, K]``, second moment of the layer's inputs.
        rank: rank of the term.
        dtype: dtype in which the term is stored.
        rounded: rounds float32 ``[N, K]``; returns the codes' result and its values in the basis of the weight.
        name: the weight's name, for messages.

    Returns:
        (codes, up ``[N, r]``, down ``[r, K]``) of the turn with the least error.
    """
    hessian = damped(hessian, DAMPING, name)
    root = torch.linalg.cholesky(hessian.double()).to(weight.dtype)
    best: tuple[float, Rounded, torch.Tensor, torch.Tensor] | None = None
    starts = [torch.zeros_like(weight), _term(*weighted_factors(weight, root, rank, dtype))]
    for turn in range(TURNS):
        for term in starts:
            found, values = rounded(weight - term)
            lost = weight - values
            up, down = weighted_factors(lost, root, rank, dtype)
            error = float(row_errors(lost - _term(up, down), hessian).sum())
            if best is None or error < best[0]:
                best = error, found, up, down
        assert best is not None
        starts = [_term(*best[2:])]  # after the first turn, only the better start goes on
        if turn and best[0] < error:
            break  # this turn did not gain, so the next would repeat it
    return best[1:]  # type: ignore[index,return-value]


def weighted_factors(
    error: torch.Tensor, root: torch.Tensor, rank: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``up`` ``[N, r]`` and ``down`` ``[r, K]`` with the least ``tr(D H D^T)``, ``D = error - up @ down``.

    With ``H = L L^T`` this is the best approximation of ``error @ L`` by a matrix of that rank, ``U U^T error L``, where U
    holds the first left singular vectors. So the term is ``U (U^T error)``, and no inverse is needed.

    Args:
        error: float32 ``[N, K]``.
        root: ``L``, ``[K, K]``.
        rank: r, or the shorter side of ``error`` if that is less.
        dtype: dtype of the factors.
    """
    rank = min(rank, *error.shape)
    left = left_vectors(error @ root, rank)
    right = left.t() @ error
    # Both factors get the same norm, so that neither leaves the range of a 16-bit float.
    size = right.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return (left * size).to(dtype).contiguous(), (right / size[:, None]).to(dtype).contiguous()


def _term(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return up.float() @ down.float()
