"""The low-rank term that comes nearest to what rounding lost, found together with the codes.

``W - dequant(codes)`` has no low rank, but its largest singular directions carry more than their share; two thin matrices
take them back at ``rank * (N + K) / (N * K)`` weights of 16 bits. (ZeroQuant-V2, Yao et al. 2023, arXiv:2303.08302; LQER,
Zhang et al. 2024, arXiv:2402.02446.) What the term says the codes need not say: the weight less the term is rounded again,
the term is found for the new codes, and so on (LoftQ, Li et al. 2023, arXiv:2310.08659).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.runtime.tracing import without_autocast

#: Matrices whose shorter side is at most this are decomposed whole; of larger ones random projections find what is wanted.
FULL = 2048
#: Of the projections: columns beyond the rank, and rounds. Rounding errors have a flat spectrum, which takes rounds.
OVERSAMPLE, ROUNDS = 16, 8
#: Times that codes and term are found in turns, each as long as the first. In eight turns the squared error of MiniLM's
#: layers falls by a sixth at int3 with rank 16 and by a quarter at int2 with rank 32; after five most of that is there.
TURNS = 5


class Rounded(Protocol):
    """What `corrected` needs of a quantized weight."""

    def own_values(self) -> torch.Tensor:
        """float32 ``[..., N, K]``: what the codes stand for."""

    def set_lowrank(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Takes the term."""


Weight = TypeVar("Weight", bound=Rounded)


def check_low_rank(value: Any, where: str = "low_rank") -> int | None:
    """A rank to correct with; None and 0 mean none.

    Raises:
        ValueError: no integer, or a negative one.
    """
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where} must be a rank, a positive integer, or None for no correction; found {value!r}")
    return value or None


def corrected(rows: torch.Tensor, rank: int, rounded: Callable[[torch.Tensor], Weight]) -> Weight:
    """The quantized weight with its low-rank term, of the turn that leaves the least squared error.

    Args:
        rows: float ``[..., N, K]``.
        rank: of the term, whose dtype is that of ``rows``.
        rounded: quantizes float32 ``[..., N, K]``.
    """
    wide, best, least = rows.float(), None, math.inf
    left = wide
    for _ in range(TURNS):
        found = rounded(left)
        lost = wide - found.own_values()
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
    """``up`` ``[..., N, r]`` and ``down`` ``[..., r, K]`` whose product is nearest to ``error`` ``[..., N, K]``, float32.

    The same matrix gives the same factors whatever torch's global generator holds. r is ``rank``, or the shorter side.
    """
    rank = min(rank, *error.shape[-2:])
    with without_autocast(error.device):
        return _factors(error, rank, dtype)


def _factors(error: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    if error.shape[-2] > error.shape[-1]:
        down, up = _factors(error.mT, rank, dtype)
        return up.mT.contiguous(), down.mT.contiguous()
    if error.shape[-2] <= FULL:
        # The Gram matrix's eigenvectors are the left singular ones, at a fraction of an SVD's time; in float64, so that
        # squaring loses nothing.
        wide = error.double()
        left = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1).to(error.dtype)
    else:
        left = _randomized(error, rank)
    right = left.mT @ error
    # Both sides get the same size: neither leaves the range of a 16-bit float.
    root = right.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return (left * root.unsqueeze(-2)).to(dtype).contiguous(), (right / root.unsqueeze(-1)).to(dtype).contiguous()


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
