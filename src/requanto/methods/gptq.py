"""GPTQ: rounds the columns of a weight one after another; later columns compensate the errors of earlier ones.

The layer's output error on the samples is ``tr(E H E^T)``, ``E = W - Q``, ``H = E[x x^T]``. Frantar et al. 2022, "GPTQ"
(arXiv:2210.17323). Differences from the paper:

- With ``order="groups"``, groups are processed in order of importance, and so are the columns within a group. Scale and
  shift of a group are searched just before its columns are rounded, on the weights compensated so far, each column weighted
  by the cost of an error in it.
- Afterwards scales and codes are improved alternately with the full ``H``: scale and shift of all groups of a row by least
  squares, then codes by coordinate descent. Both can only lower the error.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from requanto.methods.grid import Grid

logger = logging.getLogger(__name__)

#: Columns rounded before their errors are applied to the rest of the weight, with one matmul instead of many outer products.
BLOCK = 128
#: Default damping, see :func:`gptq`.
DAMPING = 0.3
#: Maximum number of elements of a temporary in the least-squares fit (32 MB in float32).
_CHUNK = 8 * 1024 * 1024


class Rounded(NamedTuple):
    """A rounded weight.

    Attributes:
        values: float32 ``[N, K]``, the dequantized values.
        scale, shift: float32 ``[N, G]``; shift is None if the grid is not affine.
        row_scale: ``[N, 1]`` if scales and shifts are stored in few bits; else None.
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
    damping: float = DAMPING,
    order: str = "columns",
    steps: int = 24,
    rounds: int = 1,
    name: str = "weight",
) -> Rounded:
    """Rounds a weight so that the output error is small for inputs with the second moment ``hessian``.

    Args:
        weight: float32 ``[N, K]``.
        hessian: float32 ``[K, K]``, the inputs' second moment ``E[x x^T]`` up to a factor.
        grid: the codes.
        group_size: a divisor of K; None: one group per row.
        damping: fraction of the mean diagonal that is added to the diagonal.
        order: ``"groups"``: the most important groups first, and within a group the most important columns;
            ``"columns"``: the most important columns first, of any group; ``"none"``: in the stored order. With
            ``"columns"``, and for scales stored in few bits, all scales are chosen before rounding.
        steps: number of clipping ranges that the search for scales tries.
        rounds: how often scales and codes are improved afterwards; 0: plain GPTQ.
        name: the weight's name, for messages.

    Raises:
        ValueError: the Hessian holds NaN or Inf, or is singular even with the largest damping.
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
    """Refits scales to the codes, then codes to the scales; rows that did not improve are unchanged."""
    scale, shift, row_scale = grid.stored_tables(*refit(weight, hessian, grid, group, found))
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
    """Does one pass of coordinate descent over the codes: each column gets its best code with all others fixed.

    Args:
        weight, hessian, grid: as in :func:`gptq`, the Hessian damped.
        values: rounded weights, ``[N, K]``.
        scale, shift: one value per weight, ``[N, K]``.
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
    """Returns the scales and shifts with the least output error for fixed codes, from a small linear system per row."""
    rows, columns = weight.shape
    groups = columns // group
    codes = grid.codes(found.values, _wide(found.scale, group), _maybe_wide(found.shift, group))
    by_group = hessian.view(columns, groups, group)
    sums = by_group.sum(-1)  # [K, G]: H @ indicator of each group
    target = weight @ hessian  # [N, K]
    scales, shifts = torch.empty_like(found.scale), None if found.shift is None else torch.empty_like(found.shift)
    step = max(1, _CHUNK // (columns * groups))
    for start in range(0, rows, step):
        c = codes[start : start + step].view(-1, groups, group)
        hc = torch.einsum("kgi,ngi->nkg", by_group, c)  # H @ codes of each group
        cc = torch.einsum("ngi,ngih->ngh", c, hc.view(-1, groups, group, groups))
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
    """Returns ``e H e^T`` of each row ``[N]``: the output error of each output channel."""
    return ((difference @ hessian) * difference).sum(-1)


def damped(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Returns the Hessian with a fraction of its mean diagonal added to the diagonal, also where an input is always 0.

    Raises:
        ValueError: it holds NaN or Inf.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(
            f"the inputs of {name} hold NaN or Inf: run the float model on the samples in float32 or bfloat16, and leave "
            f"out samples that overflow"
        )
    hessian = hessian.clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * mean if bool(mean > 0) else 1.0)
    return hessian


def inverse_factor(hessian: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the upper triangular ``U`` with ``U^T U = H^-1``, computed in float64 (float32 above 4096 columns, for speed).

    The Cholesky factorization of ``H`` with rows and columns reversed gives an upper triangular R with ``H = R R^T``, and
    ``U = R^-1``: the inverse of ``H`` is not computed.
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
                f"the second moment of the inputs of {name} is singular even with the largest damping; use more samples"
            )
        logger.warning("%s: the inputs' second moment is singular; adding %.2g of its mean diagonal", name, extra)
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
    """Scale and shift of every group, ``[G, N]``; :meth:`search` fills in one group."""

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
        scale, shift, self.row_scale = self.grid.stored_tables(*self.tables()[:2])
        self.scale, self.shift = scale.t().contiguous(), None if shift is None else shift.t().contiguous()

    def of(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.scale[index], None if self.shift is None else self.shift[index]

    def tables(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        shift = None if self.shift is None else self.shift.t().contiguous()
        return self.scale.t().contiguous(), shift, self.row_scale
