"""GPTQ: rounding the columns of a weight one after another, each error made up for by the columns still to come.

The layer's output error on the samples is ``tr(E H E^T)``, ``E = W - Q``, ``H = E[x x^T]``. Frantar et al. 2022, "GPTQ"
(arXiv:2210.17323). What is done beyond it:

- Groups keep their columns together (as they are stored) and are taken in order of importance, the columns within likewise;
  scale and shift of a group are searched when its turn comes, on the weights as the errors before have moved them, each
  column weighted by what an error in it will cost.
- Afterwards scales and codes are improved in turn, on the whole of ``H``: scale and shift of all groups of a row by least
  squares, then codes by coordinate descent. Both can only lower the error.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from requanto.methods.grid import Grid

logger = logging.getLogger(__name__)

#: Columns rounded before the rest of the weight learns of their errors: one matrix product in place of many vectors.
BLOCK = 128
#: The most values of a temporary in the least-squares fit (32 MB in float32).
_CHUNK = 8 * 1024 * 1024


class Rounded(NamedTuple):
    """A weight on its grid.

    Attributes:
        values: float32 ``[N, K]``, exactly what the codes stand for.
        scale, shift: float32 ``[N, G]``; no shift where the grid is not affine.
        row_scale: ``[N, 1]``, where scales and shifts are stored in few bits; else None.
    """

    values: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    row_scale: torch.Tensor | None = None


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    group_size: int | None,
    *,
    damping: float = 0.1,
    order: str = "columns",
    steps: int = 24,
    rounds: int = 3,
    name: str = "weight",
) -> Rounded:
    """Rounds a weight for the inputs that ``hessian`` describes.

    Args:
        weight: float32 ``[N, K]``.
        hessian: float32 ``[K, K]``, the inputs' second moment ``E[x x^T]`` up to a factor.
        grid: the codes.
        group_size: a divisor of K, or None: one group a row.
        damping: share of the mean diagonal added to the diagonal.
        order: ``"groups"``: the most important groups first, and columns within them; ``"columns"``: the most important
            columns first, whatever their group; ``"none"``: as they stand. With ``"columns"``, and for scales stored in few
            bits, all scales are chosen beforehand.
        steps: clipping ranges that the search for scales tries.
        rounds: how often scales and codes are improved afterwards; 0: plain GPTQ.
        name: what to call the weight in messages.

    Raises:
        ValueError: the Hessian holds NaN or Inf, or stays singular under all damping.
    """
    columns, group = weight.shape[1], group_size or weight.shape[1]
    hessian = damped(hessian, damping, name)
    permutation = _permutation(hessian.diagonal(), group, order)
    scale_first = order == "columns" or grid.scale_bits is not None
    upper = inverse_factor(hessian[permutation][:, permutation], name).to(weight.dtype)
    importance = upper.diagonal().square().reciprocal()

    found = _Scales(weight, grid, group)
    if scale_first:
        found.search_all(weight, hessian.diagonal(), steps)
    moving = weight.t()[permutation].clone()  # [K, N]: a column of the weight is a row, contiguous
    rounded = torch.empty_like(moving)
    block = BLOCK if group == columns or group % BLOCK == 0 else group * max(1, BLOCK // group)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, factor = moving[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(part)
        for i in range(stop - start):
            column = start + i
            if not scale_first and column % group == 0:
                ahead = moving[column : column + group]
                found.search(int(permutation[column]) // group, ahead, importance[column : column + group], steps)
            scale, shift = found.of(int(permutation[column]) // group)
            rounded[column] = grid.round(part[i], scale, shift)
            errors[i] = (part[i] - rounded[column]) / factor[i, i]
            part[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        moving[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)

    back = torch.empty_like(permutation)
    back[permutation] = torch.arange(columns, device=back.device)
    result = Rounded(rounded[back].t().contiguous(), *found.tables())
    for _ in range(rounds):
        result = improve(weight, hessian, grid, group, result)
    return result


def improve(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, group: int, found: Rounded) -> Rounded:
    """One round of better scales for the codes, then better codes for the scales; rows that got worse are left."""
    scale, shift, row_scale = grid.settle(*refit(weight, hessian, grid, group, found))
    wide = _wide(scale, group), None if shift is None else _wide(shift, group)
    codes = grid.codes(found.values, _wide(found.scale, group), _maybe_wide(found.shift, group))
    values = descend(weight, hessian, grid, grid.values(codes, *wide), *wide)
    better = row_errors(weight - values, hessian) < row_errors(weight - found.values, hessian)
    pick = better[:, None]
    return Rounded(
        torch.where(pick, values, found.values),
        torch.where(pick, scale, found.scale),
        None if shift is None or found.shift is None else torch.where(pick, shift, found.shift),
        None if row_scale is None or found.row_scale is None else torch.where(pick, row_scale, found.row_scale),
    )


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    values: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """One pass of coordinate descent over the codes: each column in turn takes the best code, all others fixed.

    Args:
        weight, hessian, grid: as in :func:`gptq`, the Hessian damped.
        values: weights on the grid, ``[N, K]``.
        scale, shift: a value a weight, ``[N, K]``.
    """
    values, scale = values.t().contiguous(), scale.t()
    shift = None if shift is None else shift.t()
    slope = hessian @ (weight.t() - values)  # [K, N]
    diagonal = hessian.diagonal()
    for start in range(0, len(values), BLOCK):
        stop = min(start + BLOCK, len(values))
        inner, near = slope[start:stop], hessian[start:stop, start:stop]
        moved = torch.empty_like(inner)
        for i in range(stop - start):
            column = start + i
            wanted = values[column] + inner[i] / diagonal[column]
            new = grid.round(wanted, scale[column], None if shift is None else shift[column])
            moved[i] = new - values[column]
            values[column] = new
            inner.addr_(near[:, i], moved[i], alpha=-1)
        slope[:start].addmm_(hessian[:start, start:stop], moved, alpha=-1)
        slope[stop:].addmm_(hessian[stop:, start:stop], moved, alpha=-1)
    return values.t()


def refit(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, group: int, found: Rounded
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and shifts of least output error for the codes as they are: a small linear system for every row."""
    rows, columns = weight.shape
    groups = columns // group
    codes = grid.codes(found.values, _wide(found.scale, group), _maybe_wide(found.shift, group))
    by_group = hessian.view(columns, groups, group)
    sums = by_group.sum(-1)  # [K, G]: H times the indicator of each group
    target = weight @ hessian  # [N, K]
    scales, shifts = torch.empty_like(found.scale), None if found.shift is None else torch.empty_like(found.shift)
    step = max(1, _CHUNK // (columns * groups))
    for start in range(0, rows, step):
        c = codes[start : start + step].view(-1, groups, group)
        product = torch.einsum("kgi,ngi->nkg", by_group, c)  # H times the codes of each group
        cc = torch.einsum("ngi,ngih->ngh", c, product.view(-1, groups, group, groups))
        ct = (c * target[start : start + step].view(-1, groups, group)).sum(-1)
        if shifts is None:
            system, right = cc, ct
        else:
            c1 = torch.einsum("ngi,gih->ngh", c, sums.view(groups, group, groups))
            one = sums.view(groups, group, groups).sum(1).expand(len(c), -1, -1)
            system = torch.cat([torch.cat([cc, -c1], 2), torch.cat([-c1.transpose(1, 2), one], 2)], 1)
            right = torch.cat([ct, -target[start : start + step].view(-1, groups, group).sum(-1)], 1)
        system = system.double()
        ridge = 1e-7 * system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        solved = torch.linalg.solve(system, right.double()).to(weight.dtype)
        scales[start : start + step] = solved[:, :groups]
        if shifts is not None:
            shifts[start : start + step] = solved[:, groups:]
    usable = torch.isfinite(scales) & (scales > 0)
    if shifts is not None:
        usable &= torch.isfinite(shifts)
        shifts = torch.where(usable, shifts, found.shift)
    return grid.storable(torch.where(usable, scales, found.scale), shifts)


def row_errors(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``e H e^T`` of each row ``[N]``: the output error of each output channel."""
    return ((difference @ hessian) * difference).sum(-1)


def damped(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """The Hessian with a share of its mean diagonal added to the diagonal; input channels that were always 0 get it too.

    Raises:
        ValueError: it holds NaN or Inf.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            f"the inputs of {name} hold NaN or Inf: run the float model on the samples first, in float32 or bfloat16, and "
            f"leave out what overflows"
        )
    hessian = hessian.clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * mean if bool(mean > 0) else 1.0)
    return hessian


def inverse_factor(hessian: torch.Tensor, name: str) -> torch.Tensor:
    """Upper triangular ``U`` with ``U^T U = H^-1``, in float64 (float32 above 4096 columns, where time begins to count).

    With the rows and columns of ``H`` in reverse order, ``H = R R^T`` for an upper triangular R is a Cholesky factorization,
    and ``U = R^-1``: no inverse of ``H`` is formed.
    """
    wide = hessian.flip(0, 1).to(torch.float64 if len(hessian) <= 4096 else torch.float32)
    mean = wide.diagonal().mean()
    extra = 0.0
    while True:
        lower, failed = torch.linalg.cholesky_ex(wide)
        if not bool(failed):
            break
        extra = 10 * extra if extra else 0.01
        if extra > 10:
            raise ValueError(
                f"the second moment of the inputs of {name} is singular under all damping; give more samples"
            )
        logger.warning("%s: the inputs' second moment is singular; %.2g of its mean diagonal added", name, extra)
        wide.diagonal().add_(extra * mean)
    upper = lower.flip(0, 1)
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def _permutation(diagonal: torch.Tensor, group: int, order: str) -> torch.Tensor:
    columns = len(diagonal)
    if order == "none":
        return torch.arange(columns, device=diagonal.device)
    if order == "columns":
        return torch.argsort(diagonal, descending=True, stable=True)
    if order != "groups":
        raise ValueError(f"order must be 'groups', 'columns' or 'none', found {order!r}")
    grouped = diagonal.view(-1, group)
    within = torch.argsort(grouped, dim=1, descending=True, stable=True)
    among = torch.argsort(grouped.sum(1), descending=True, stable=True)
    start = torch.arange(0, columns, group, device=diagonal.device)
    return (within + start[:, None])[among].reshape(-1)


def _wide(table: torch.Tensor, group: int) -> torch.Tensor:
    return table.repeat_interleave(group, dim=1)


def _maybe_wide(table: torch.Tensor | None, group: int) -> torch.Tensor | None:
    return None if table is None else _wide(table, group)


class _Scales:
    """Scale and shift of every group, filled in as their turn comes: ``[G, N]``."""

    def __init__(self, weight: torch.Tensor, grid: Grid, group: int) -> None:
        self.grid, self.group = grid, group
        self.scale = weight.new_ones(weight.shape[1] // group, weight.shape[0])
        self.shift = torch.zeros_like(self.scale) if grid.affine else None
        self.row_scale: torch.Tensor | None = None

    def search(self, index: int, columns: torch.Tensor, importance: torch.Tensor, steps: int) -> None:
        self.scale[index], shift = self.grid.search(columns.t(), importance, steps)
        if self.shift is not None and shift is not None:
            self.shift[index] = shift

    def search_all(self, weight: torch.Tensor, importance: torch.Tensor, steps: int) -> None:
        for index in range(len(self.scale)):
            part = slice(index * self.group, (index + 1) * self.group)
            self.search(index, weight.t()[part], importance[part], steps)
        scale, shift, self.row_scale = self.grid.settle(*self.tables()[:2])
        self.scale, self.shift = scale.t().contiguous(), None if shift is None else shift.t().contiguous()

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.scale[index], None if self.shift is None else self.shift[index]

    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        shift = None if self.shift is None else self.shift.t().contiguous()
        return self.scale.t().contiguous(), shift, self.row_scale
