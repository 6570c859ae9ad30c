"""Changing a quantized weight to given float values without rounding, where that is possible.

A weight's codes cannot take a small change, but three changes need no new codes:

- one of low rank, ``W' = W + up @ down``, is stored next to the codes (`requanto.tensor.lowrank`);
- one that multiplies rows by positive factors, ``W' = factor[:, None] * W``, changes scales and shifts only;
- one that multiplies columns by positive factors, ``W' = W * factor``, changes the column scale only.

`plan` finds which of them the change is, and checks the result against the wanted values. Anything else is refused:
rounded to codes, most of it would be lost without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from requanto.runtime.tracing import without_autocast
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor

#: how far a result may be from the wanted one, in units of the dtype's rounding of the largest value of a row
TOLERANCE = 16
#: up to this size of the smaller axis the SVD is computed in full, above it from a random projection
FULL_SVD = 256


@dataclass
class Change:
    """A change that needs no new codes: factors of stored rows or columns, then a low-rank term (stored orientation)."""

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def apply(self, weight: QTensor) -> None:
        """Changes the weight, in place."""
        if self.columns is not None:
            lowrank.scale_columns(weight, self.columns)
        if self.rows is not None:
            lowrank.scale_rows(weight, self.rows)
        if self.up is not None and self.down is not None:
            lowrank.append(weight, self.up, self.down)
            lowrank.compress(weight)


def assign(weight: QTensor, values: torch.Tensor) -> None:
    """Changes the weight, in place, to float values of its shape.

    Raises:
        ValueError: the values have another shape, or contain NaN or Inf.
        NotImplementedError: the change can be stored neither as a low-rank term nor as factors of rows or columns.
    """
    change = plan(weight, values)
    if change is not None:
        change.apply(weight)


def plan(weight: QTensor, values: torch.Tensor) -> Change | None:
    """How the weight can be changed to ``values`` without rounding; None: it has these values already.

    Raises:
        ValueError, NotImplementedError: see `assign`.
    """
    if values.shape != weight.shape:
        raise ValueError(f"values of shape {tuple(values.shape)} for a weight of shape {tuple(weight.shape)}")
    if not values.numel():
        return None
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the new values of a quantized weight contain NaN or Inf")
    with torch.no_grad(), without_autocast(weight.device):
        old, new = _rows(weight, weight.dequantize(torch.float32)), _rows(weight, values)
        bound = _bound(old, new, values.dtype)
        if bool(((new - old).abs() <= bound / 4).all()):
            return None
        ways = (_as_rows, _as_columns, lambda old, new, bound: _as_term(weight, new - old, bound))
        for change in (way(old, new, bound) for way in ways):
            if change is not None and _gives(weight, change, new):
                return change
    raise NotImplementedError(
        f"a {weight.qtype.name} weight of shape {tuple(weight.shape)} can be changed without loss by a low-rank term "
        f"(up to rank {_limit(old)}) or by a positive factor for each row or each column. This change is none of these, and "
        f"rounding it to the codes would lose most of it."
    )


def _rows(weight: QTensor, values: torch.Tensor) -> torch.Tensor:
    """float32 ``[*lead, K]``, in the stored orientation."""
    values = values.detach().to(weight.device, torch.float32)
    return (values.mT if weight.transposed else values).reshape(*weight.lead, weight.row_length)


def _bound(old: torch.Tensor, new: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding may do to the elements of a row, ``[*lead, 1]``."""
    size = torch.maximum(old.abs().amax(-1, keepdim=True), new.abs().amax(-1, keepdim=True))
    eps = torch.finfo(dtype).eps / 8 if dtype in (torch.float16, torch.bfloat16) else torch.finfo(torch.float32).eps
    # A row of zeros in the middle of others gets what is zero next to them: factors are not computed row by row.
    return (size * (TOLERANCE * eps)).clamp_min(float(size.amax()) * 1e-12)


def _limit(rows: torch.Tensor) -> int:
    return max(1, int(lowrank.MAX_RANK_SHARE * min(rows.shape[-2:])))


def _as_rows(old: torch.Tensor, new: torch.Tensor, bound: torch.Tensor) -> Change | None:
    square = (old * old).sum(-1)
    factor = torch.where(square > 0, (old * new).sum(-1) / square.clamp_min(1e-30), torch.ones_like(square))
    if not bool(((new - old * factor[..., None]).abs() <= bound).all()):
        return None
    # A scale stays positive: a stored one that is not is taken for damage. Such rows are replaced by a low-rank term.
    others = torch.nonzero(factor <= 0)
    if not len(others):
        return Change(rows=factor)
    if factor.dim() > 1 or len(others) > _limit(old):
        return None
    up = torch.nn.functional.one_hot(others[:, 0], len(factor)).to(old.dtype).mT
    kept = torch.where(factor > 0, factor, torch.ones_like(factor))
    return Change(up=up, down=(new - old)[others[:, 0]], rows=kept)


def _as_columns(old: torch.Tensor, new: torch.Tensor, bound: torch.Tensor) -> Change | None:
    square = (old * old).sum(-2)
    factor = torch.where(square > 0, (old * new).sum(-2) / square.clamp_min(1e-30), torch.ones_like(square))
    if bool((factor <= 0).any()) or not bool(((new - old * factor.unsqueeze(-2)).abs() <= bound).all()):
        return None
    return Change(columns=factor)


def _as_term(weight: QTensor, delta: torch.Tensor, bound: torch.Tensor) -> Change | None:
    """The smallest rank whose truncated SVD is within the bound."""
    limit = _limit(delta)
    smaller = min(delta.shape[-2:])
    if delta.device.type != "mps":  # in float32 the SVD's error is that of the largest row, in every row
        delta, bound = delta.double(), bound.double()
    # A projection of few columns finds a change of small rank at once; only if that fails more columns are tried.
    sizes = [smaller] if smaller <= FULL_SVD else [size for size in (64, 256) if size < limit] + [limit + 8]
    for size in sizes:
        left, values, right = _svd(delta, min(size, smaller))

        def within(rank: int, left=left, values=values, right=right) -> bool:  # type: ignore[no-untyped-def]
            term = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
            return bool(((delta - term).abs() <= bound).all())

        high = min(limit, values.shape[-1])
        # Rounding errors of the elements have singular values of about this size.
        noise = float(bound.mean()) / TOLERANCE * sum(n**0.5 for n in delta.shape[-2:])
        guess = int((values > noise).sum(-1).amax())
        if 0 < guess < high and within(guess):
            low, high = guess - 1, guess
        elif within(high):
            low = 0  # not within the bound: the change is larger than rounding
        else:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if within(middle) else (middle, high)
        up = left[..., :high] * values[..., None, :high]
        return Change(up=up.to(weight.dtype), down=right[..., :high, :].to(weight.dtype))
    return None


def _svd(delta: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if size == min(delta.shape[-2:]):
        return torch.linalg.svd(delta, full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(delta.shape[-1], size, generator=generator, dtype=torch.float32, device="cpu").to(delta)
    basis, _ = torch.linalg.qr(delta @ random)
    left, values, right = torch.linalg.svd(basis.mT @ delta, full_matrices=False)
    return basis @ left, values, right


def _gives(weight: QTensor, change: Change, new: torch.Tensor) -> bool:
    """True if the changed weight has the new values up to the rounding of its dtype, in which the change is stored."""
    copy = weight.with_inner(dict(weight.inner_tensors()))
    try:
        change.apply(copy)
    except NotImplementedError:  # factors of rows that the scales of the type cannot hold
        return False
    found = _rows(weight, copy.dequantize(torch.float32))
    return bool(((found - new).abs() <= 4 * _bound(found, new, weight.dtype)).all())
