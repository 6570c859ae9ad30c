"""The low-rank term that comes nearest to what rounding lost.

``W - dequant(codes)`` has no low rank, but its largest singular directions carry more than their share; two thin matrices
take them back at ``rank * (N + K) / (N * K)`` weights of 16 bits. (ZeroQuant-V2, Yao et al. 2023, arXiv:2303.08302; LQER,
Zhang et al. 2024, arXiv:2402.02446.)
"""

from __future__ import annotations

from typing import Any

import torch

#: Matrices whose shorter side is at most this are decomposed whole; of larger ones random projections find what is wanted.
FULL = 2048
#: Of the projections: columns beyond the rank, and rounds. Rounding errors have a flat spectrum, which takes rounds.
OVERSAMPLE, ROUNDS = 16, 8


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


def low_rank_factors(error: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` ``[..., N, r]`` and ``down`` ``[..., r, K]`` whose product is nearest to ``error`` ``[..., N, K]``, float32.

    The same matrix gives the same factors whatever torch's global generator holds. r is ``rank``, or the shorter side.
    """
    rank = min(rank, *error.shape[-2:])
    if error.shape[-2] > error.shape[-1]:
        down, up = low_rank_factors(error.mT, rank, dtype)
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
    generator = torch.Generator().manual_seed(0)
    columns = min(rank + OVERSAMPLE, error.shape[-2])
    start = torch.randn(error.shape[-1], columns, generator=generator).to(error.device)
    basis = torch.linalg.qr(error @ start).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(error @ torch.linalg.qr(error.mT @ basis).Q).Q
    return basis @ torch.linalg.svd(basis.mT @ error, full_matrices=False).U[..., :rank]
