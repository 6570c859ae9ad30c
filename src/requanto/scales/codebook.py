"""Codebooks: rounding to the nearest value, and values fitted to one tensor."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.tracing import is_fake, is_tracing, without_ambient_state

#: Cells of the lookup table for the nearest value. Only small floats with 4 exponent bits have values so close together
#: that a cell contains more than one border.
CELLS = 2**14
#: Most weights of a tensor to which its values are fitted, from evenly spaced rows.
SAMPLED = 2**21
#: Bins of the histogram of these weights.
BINS = 4096
#: Most rounds of Lloyd's algorithm, and the change (of the range -1 .. 1) below which it has converged.
ROUNDS = 2000
CONVERGED = 1e-6


class _Search(NamedTuple):
    """The sorted distinct values of a codebook: ``borders`` between neighbours, ``codes`` of each, and a lookup table.

    The table divides the range into cells of equal width. ``below`` is the number of borders in earlier cells, ``border``
    the one in the cell (infinity: none); both are None if a cell contains several borders.
    """

    borders: torch.Tensor
    codes: torch.Tensor | None
    below: torch.Tensor | None
    border: torch.Tensor | None
    low: float
    per_cell: float


def nearest_codes(scaled: torch.Tensor, kind: qtype) -> torch.Tensor:
    """Codes (uint8) of the values nearest to float32 ``scaled``; ties go to the lower value.

    Args:
        scaled: weights divided by their scale.
        kind: a type with values.
    """
    search = _search(kind.values, scaled.device)
    if search.below is None or search.border is None:
        found = torch.bucketize(scaled, search.borders, out_int32=True)
    else:
        # At most one border per cell: the number of borders below the cell, plus one comparison. This takes 2 ns per weight
        # on a CPU; bucketize takes 20 ns, since its binary search mispredicts every branch.
        cells = (scaled - search.low).mul_(search.per_cell).clamp_(0, CELLS - 1).to(torch.int32).flatten()
        found = torch.index_select(search.below, 0, cells)
        found += (scaled.flatten() > torch.index_select(search.border, 0, cells)).to(torch.int32)
        found = found.view(scaled.shape)
    if search.codes is None:
        return found.to(torch.uint8)
    return torch.index_select(search.codes, 0, found.flatten()).view(scaled.shape)


@functools.lru_cache(maxsize=64)
def _search(values: tuple[float, ...], device: torch.device) -> _Search:
    code_of: dict[float, int] = {}
    for code, value in enumerate(values):
        code_of.setdefault(value, code)  # of two equal values (0 and -0) the first
    ordered = sorted(code_of)
    with without_ambient_state():
        exact = torch.tensor(ordered, dtype=torch.float64, device="cpu")
        borders = ((exact[1:] + exact[:-1]) / 2).float()
        numbers = [code_of[value] for value in ordered]
        codes = (
            None if numbers == list(range(len(numbers))) else torch.tensor(numbers, dtype=torch.uint8, device=device)
        )
        low = ordered[0]
        per_cell = CELLS / (ordered[-1] - low) if ordered[-1] > low else 1.0
        # Must be the same arithmetic as in `nearest_codes`. It is monotonic, so a weight in a cell before that of a border
        # is below the border.
        cells = (borders - low).mul_(per_cell).clamp_(0, CELLS - 1).to(torch.int64)
        if cells.unique().numel() < cells.numel():
            return _Search(borders.to(device), codes, None, None, low, per_cell)
        border = torch.full((CELLS,), math.inf, dtype=torch.float32, device="cpu")
        border[cells] = borders
        places = torch.arange(CELLS, dtype=torch.int64, device="cpu")
        below = torch.searchsorted(cells, places).to(torch.int32)
        return _Search(borders.to(device), codes, below.to(device), border.to(device), low, per_cell)


def fit_codebook(rows: torch.Tensor, kind: qtype, group: int) -> tuple[float, ...]:
    """The 2^bits values of least squared error for a tensor whose groups are divided by their largest absolute weight.

    Lloyd's algorithm (Lloyd 1982, Least squares quantization in PCM) on a histogram of (a sample of) the normalized weights.
    Each counts with the square of its group's scale, which minimizes the error of the weights, not of the normalized ones.
    From 3 bits on, -1, 0 and 1 are among the values, so the largest weight of each group and zeros are exact. That increases
    the squared error a little, but language models are far more accurate (docs/types.md). The fit runs on the CPU in
    float64, so that all devices give the same values.

    Args:
        rows: float ``[rows, K]``.
        kind: a learned type.
        group: number of weights that share a scale, a divisor of K.

    Returns:
        Ascending values in -1 .. 1, exact in float32.
    """
    count = 2**kind.bits
    step = max(1, -(-rows.numel() // SAMPLED))
    sample = rows[::step].detach().to("cpu", torch.float32).reshape(-1, group)
    scale = sample.abs().amax(1, keepdim=True) if sample.numel() else sample.new_zeros(0, 1)
    good = (scale > 0) & torch.isfinite(scale)
    sample, scale = sample[good[:, 0]], scale[good[:, 0]]
    if not sample.numel():
        mass = np.ones(BINS)
    else:
        # Scales relative to the largest, so that their squares do not overflow or all vanish.
        weight = (scale / scale.max()).square().expand_as(sample)
        bins = ((sample / scale + 1) * ((BINS - 1) / 2)).round_().to(torch.int32)
        mass = torch.bincount(bins.flatten(), weights=weight.flatten().double(), minlength=BINS).numpy()
    return tuple(_lloyd(mass, count, pinned=kind.bits > 2).astype(np.float32).tolist())


def _lloyd(mass: np.ndarray, count: int, pinned: bool) -> np.ndarray:
    """``count`` ascending values of least squared error for a histogram.

    Args:
        mass: weight of each point of an even grid over -1 .. 1.
        count: number of values.
        pinned: 0 is one of the values, and so are -1 and 1 where their mass is not 0.
    """
    places = np.linspace(-1, 1, len(mass))
    total = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * places)])
    # The best density of values is proportional to the cube root of that of the weights (Panter and Dite 1951).
    density = np.cumsum(np.cbrt(mass))
    fixed: dict[int, float] = {}
    if pinned:
        middle = float(np.interp(0, places, density))
        below = int(min(max(middle / density[-1] * (count - 1), 1), count - 2))
        sides = (np.arange(below) + 0.5) / below * middle, (np.arange(count - 1 - below) + 0.5) / (count - 1 - below)
        steps = np.concatenate([sides[0], [middle], middle + sides[1] * (density[-1] - middle)])
        fixed = {below: 0.0}
        fixed |= {0: -1.0} if mass[0] > 0 else {}
        fixed |= {count - 1: 1.0} if mass[-1] > 0 else {}
    else:
        steps = (np.arange(count) + 0.5) / count * density[-1]
    values = np.interp(steps, density, places)
    for _ in range(ROUNDS):
        for code, value in fixed.items():
            values[code] = value
        edges = np.concatenate([[0], np.searchsorted(places, (values[1:] + values[:-1]) / 2), [len(mass)]])
        here = np.diff(total[edges])
        moved = np.where(here > 0, np.diff(moment[edges]) / np.where(here > 0, here, 1), values)
        for code, value in fixed.items():
            moved[code] = value
        converged = np.abs(moved - values).max() < CONVERGED
        values = moved
        if converged:
            break
    return np.sort(values)


def values_of(kind: qtype, like: torch.Tensor) -> torch.Tensor:
    """float32 ``[2^bits]``: the values of a fixed codebook, on the device of ``like``."""
    if is_tracing() or is_fake(like):  # a tensor that is made while tracing must not be cached
        return torch.tensor(kind.values, dtype=torch.float32, device=like.device)
    return _values(kind.values, like.device)


@functools.lru_cache(maxsize=64)
def _values(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    with without_ambient_state():
        return torch.tensor(values, dtype=torch.float32, device=device)
