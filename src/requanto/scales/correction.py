"""A low-rank term that corrects rounding errors, computed in alternation with the codes.

The rounding error ``W - dequant(codes)`` does not have low rank, but its largest singular directions have more than their
share of its norm. A low-rank term corrects these at a cost of ``rank * (N + K) / (N * K)`` 16-bit values per weight.
(ZeroQuant-V2, Yao et al. 2023, arXiv:2303.08302; LQER, Zhang et al. 2024, arXiv:2402.02446.) The weight minus the term is
then rounded again, the term is computed for the new codes, and so on (LoftQ, Li et al. 2023, arXiv:2310.08659).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.runtime.tracing import without_autocast

#: Matrices whose shorter side is at most this get a full eigendecomposition; larger ones a randomized one.
FULL = 2048
#: Randomized decomposition: columns in addition to the rank, and power iterations. Rounding errors have a flat spectrum,
#: which needs many iterations.
OVERSAMPLE, ROUNDS = 16, 8
#: Alternations of codes and term; all take equally long. Eight reduce the squared error of MiniLM's layers by a sixth for
#: int3 with rank 16 and by a quarter for int2 with rank 32; five give most of that.
TURNS = 5


class Rounded(Protocol):
    """The interface of a quantized weight that `corrected` uses."""

    def values_without_lowrank(self) -> torch.Tensor:
        """float32 ``[..., N, K]``: the dequantized codes."""

    def set_lowrank(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Sets the low-rank term."""


Weight = TypeVar("Weight", bound=Rounded)


def check_low_rank(value: Any, where: str = "low_rank") -> int | None:
    """Checks the rank of a correction; None and 0 mean no correction.

    Raises:
        ValueError: the value is not an integer, or negative.
    """
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where} must be a rank, a positive integer, or None for no correction; found {value!r}")
    return value or None


def corrected(rows: torch.Tensor, rank: int, rounded: Callable[[torch.Tensor], Weight]) -> Weight:
    """The quantized weight with its low-rank term, from the alternation with the least squared error.

    Args:
        rows: float ``[..., N, K]``; the term has the same dtype.
        rank: rank of the term.
        rounded: quantizes float32 ``[..., N, K]``.
    """
    wide, best, least = rows.float(), None, math.inf
    left = wide
    for _ in range(TURNS):
        found = rounded(left)
        lost = wide - found.values_without_lowrank()
        up, down = low_rank_factors(lost, rank, rows.dtype)
        with without_autocast(rows.device):
            term = up.float() @ down.float()
        found.set_lowrank(up, down)
        if rows.device.type == "meta" or isinstance(rows, FakeTensor):
            return found
        error = torch.linalg.vector_norm(lost.sub_(term)).item()
        if best is None or error < least:
            best, least = found, error
        left = torch.sub(wide, term, out=term)
    return best


def low_rank_factors(error: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` ``[..., N, r]`` and ``down`` ``[..., r, K]`` whose product is nearest to ``error``, float32 ``[..., N, K]``.

    r is ``rank`` or the shorter side. The result does not depend on the state of torch's global generator.
    """
    rank = min(rank, *error.shape[-2:])
    with without_autocast(error.device):
        return _factors(error, rank, dtype)


def _factors(error: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if error.shape[-2] > error.shape[-1]:
        down, up = _factors(error.mT, rank, dtype)
        return up.mT.contiguous(), down.mT.contiguous()
    left = left_vectors(error, rank)
    right = left.mT @ error
    # Both factors get the same norm, so that neither leaves the range of a 16-bit float.
    root = right.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return (left * root.unsqueeze(-2)).to(dtype).contiguous(), (right / root.unsqueeze(-1)).to(dtype).contiguous()


def left_vectors(error: torch.Tensor, rank: int) -> torch.Tensor:
    """The first ``rank`` left singular vectors ``[..., N, rank]`` of float32 ``[..., N, K]``."""
    if error.shape[-2] <= FULL:
        # The eigenvectors of the Gram matrix are the left singular vectors, and much faster than an SVD; in float64, since
        # the Gram matrix squares the singular values.
        wide = error.double()
        return torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1).to(error.dtype)
    return _randomized(error, rank)


def _randomized(error: torch.Tensor, rank: int) -> torch.Tensor:
    """The first left singular vectors ``[..., N, rank]``. (Halko, Martinsson and Tropp 2011, arXiv:0909.4061.)"""
    generator = torch.Generator("cpu").manual_seed(0)
    columns = min(rank + OVERSAMPLE, error.shape[-2])
    start = torch.randn(error.shape[-1], columns, generator=generator, dtype=torch.float32, device="cpu")
    start = start.to(error.device)
    basis = torch.linalg.qr(error @ start).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(error @ torch.linalg.qr(error.mT @ basis).Q).Q
    return basis @ torch.linalg.svd(basis.mT @ error, full_matrices=False).U[..., :rank]
