"""The optional low-rank term of a quantized weight: ``W = dequant(codes) + up @ down``.

A LoRA adapter changes each weight by far less than a 4-bit step, so rounding the merged weight to codes would lose most of
the adapter. Stored separately as two thin matrices, the merged weight is exact, and takes as much memory as the adapter.

``up`` is ``[*lead, r]`` and ``down`` ``[*lead[:-1], r, K]``, in the stored orientation (see `requanto.tensor.qtensor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from requanto.runtime.tracing import without_autocast
from requanto.tensor.qtensor import QTensor

#: a dense change of a weight is stored as factors up to this share of full rank; above it they would exceed the codes
MAX_RANK_SHARE = 0.25

#: singular values below this share of the largest are rounding errors
RANK_TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
HALF_TOLERANCE = 1e-2


# ---------------------------------------------------------------------- GEMMs


def lowrank_matmul(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """The low-rank term's part of ``x @ weight.T``: x ``[..., K]``, weight ``[N, K]`` -> ``[..., N]``."""
    first, second = _factors(weight)
    return (x @ first.to(x.dtype).mT) @ second.to(x.dtype).mT


def grouped_lowrank_matmul(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """`lowrank_matmul` for rows sorted by expert, see `requanto.linear.grouped_linear`.

    One GEMM with the factors of all experts; a mask then zeroes the r columns of the other experts. So there is no loop
    and no data-dependent shape.
    """
    first, second = _factors(weight)  # [E, r, K], [E, N, r]
    experts, rank = first.shape[:2]
    inner = (x @ first.to(x.dtype).flatten(0, 1).mT).view(x.shape[0], experts, rank)
    own = experts_of_rows(x.shape[0], offsets)
    mask = own[:, None] == torch.arange(experts, device=x.device)
    inner = torch.where(mask[..., None], inner, 0.0).flatten(1)
    return inner @ second.to(x.dtype).mT.flatten(0, 1)


def experts_of_rows(count: int, offsets: torch.Tensor) -> torch.Tensor:
    """The expert of each of ``count`` rows, from the end row of each expert ``[E]``; E for rows after the last end.

    Comparisons and a sum, since ONNX has no ``searchsorted``.
    """
    rows = torch.arange(count, device=offsets.device)
    return (offsets <= rows[:, None]).sum(1)


def _factors(weight: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(first, second) factor of ``x @ weight.T = x @ first.mT @ second.mT``."""
    assert weight.up is not None
    assert weight.down is not None
    return (weight.up.mT, weight.down.mT) if weight.transposed else (weight.down, weight.up)


# ---------------------------------------------------------------------- changing the term


def stored_orientation(weight: QTensor, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) in the stored orientation for ``left @ right`` in the orientation that the tensor shows."""
    return (right.mT, left.mT) if weight.transposed else (left, right)


def append(weight: QTensor, up: torch.Tensor, down: torch.Tensor) -> None:
    """Adds ``up @ down`` (stored orientation) to the weight, in place and without rounding.

    Old and new factors are concatenated in their common promoted dtype.
    """
    up, down = up.detach().to(weight.device), down.detach().to(weight.device)
    if weight.up is not None and weight.down is not None:
        up = torch.cat([weight.up.to(torch.promote_types(up.dtype, weight.up.dtype)), up], -1)
        down = torch.cat([weight.down.to(torch.promote_types(down.dtype, weight.down.dtype)), down], -2)
    dtype = torch.promote_types(up.dtype, down.dtype)
    weight.set_lowrank(up.to(dtype).contiguous(), down.to(dtype).contiguous())


def scale_rows(weight: QTensor, factor: torch.Tensor) -> None:
    """Multiplies each stored row by its factor ``[*lead]``, in place. Changes scale, shift and up, not the codes."""
    factor = factor.detach().to(weight.device, torch.float32).unsqueeze(-1)
    inner, changed = _without_codes(weight), {}
    if weight._spec.scale_code_bits is not None and weight.row_scale is None:
        changed["scale"] = moved_exponents(weight, factor)
    elif weight.row_scale is not None:  # no other part is float but row_shift; in float32 the result is exact
        changed |= {n: inner[n].float() * factor for n in ("row_scale", "row_shift") if n in inner}
    else:
        changed |= {
            n: (inner[n].float() * factor).to(inner[n].dtype)
            for n in ("scale", "shift")
            if n in inner and n not in weight._spec.code_bits
        }
    if weight.up is not None:
        changed["up"] = (weight.up.float() * factor).to(weight.up.dtype)
    set_parts(weight, changed)


def scale_columns(weight: QTensor, factor: torch.Tensor) -> None:
    """Multiplies each column by its factor ``[*lead[:-1], K]``, in place. Changes the column scale and down, not the
    codes; a weight without a column scale gets one, in float32.

    Args:
        factor: in the stored orientation, but in the weight's own order of columns.
    """
    factor = factor.detach().to(weight.device, torch.float32)
    stored = factor if weight.order is None else factor.gather(-1, weight.order.long())
    changed = {"column": stored.clone() if weight.column is None else weight.column.float() * stored}
    if weight.down is not None:
        changed["down"] = (weight.down.float() * factor.unsqueeze(-2)).to(weight.down.dtype)
    set_parts(weight, changed)


def moved_exponents(weight: QTensor, factor: torch.Tensor) -> torch.Tensor:
    """The stored scales (powers of two) of an MX weight whose rows are multiplied by ``factor`` ``[*lead, 1]``.

    Raises:
        NotImplementedError: a factor is not a power of two, or a scale would leave the range of the format.
    """
    mantissa, exponent = torch.frexp(factor)
    moved = weight.inner_tensors()["scale"].to(torch.int32) + (exponent - 1)
    if not bool((mantissa == 0.5).all()) or not bool(((moved >= 0) & (moved <= 0xFE)).all()):
        raise NotImplementedError(
            f"rows of a {weight.qtype.name} weight can be multiplied by powers of two only, which its scales are. Use "
            f"nvfp4 or a type with float scales, or dequantize the model first (model.dequantize())."
        )
    return moved.to(torch.uint8)


def set_parts(weight: QTensor, changed: Mapping[str, torch.Tensor | None]) -> None:
    """Replaces some tensors of a weight, for all its aliases; codes and layout stay.

    A column scale can come or go. Other aliases then compute with it too, but only this one can be stored.
    """
    layout, parts = weight._storage.state
    parts = {name: part for name, part in {**parts, **changed}.items() if part is not None}
    spec = weight._spec.replace(column="column" in parts)
    layout.check(spec, parts)
    weight._spec = spec
    weight._storage.set(parts, layout, spec)


def _without_codes(weight: QTensor) -> dict[str, torch.Tensor]:
    layout, parts = weight._storage.state
    return {name: part for name, part in parts.items() if name not in ("qdata", *layout.extra)}


@dataclass
class State:
    """The parts of a weight that a merge can change: all except the codes, which need no copy for an undo."""

    parts: dict[str, torch.Tensor]

    @classmethod
    def of(cls, weight: QTensor) -> State:
        """The current state of a weight."""
        return cls(_without_codes(weight))

    def weight(self, now: QTensor) -> QTensor:
        """A weight with the codes of ``now`` and the other parts of this state."""
        parts = {name: part.to(now.device) for name, part in self.parts.items()}
        return now.with_inner({"qdata": now.inner_tensors()["qdata"], **parts})

    def restore(self, weight: QTensor) -> None:
        """Restores this state of the weight, bit for bit."""
        set_parts(
            weight,
            {"up": None, "down": None, "column": None, **{n: part.to(weight.device) for n, part in self.parts.items()}},
        )

    @property
    def rows(self) -> torch.Tensor:
        """The scales that `scale_rows` changes."""
        return self.parts.get("row_scale", self.parts["scale"])

    def matches(self, weight: QTensor) -> bool:
        """True if the weight is in this state."""
        now = _without_codes(weight)
        return now.keys() == self.parts.keys() and all(
            t is now[name] or (t.shape == now[name].shape and torch.equal(t.to(now[name].device), now[name]))
            for name, t in self.parts.items()
        )


def add_dense(weight: QTensor, delta: torch.Tensor, sign: float = 1.0) -> None:
    """Adds a dense change to the weight, in place, if it is of low rank.

    Args:
        weight: the weight to change.
        delta: float, of the weight's shape.
        sign: -1 subtracts.

    Raises:
        ValueError: delta has another shape, or contains NaN or Inf.
        NotImplementedError: its rank is too high for a low-rank term.
    """
    if delta.shape != weight.shape:
        raise ValueError(f"a change of shape {tuple(delta.shape)} for a weight of shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("the change to add to a quantized weight contains NaN or Inf")
    canonical = delta.mT if weight.transposed else delta
    canonical = canonical.detach().to(weight.device).reshape(*weight.lead, weight.row_length)
    limit = max(1, int(MAX_RANK_SHARE * min(canonical.shape[-2:])))
    with without_autocast(canonical.device):
        left, values, right = torch.linalg.svd(canonical.float(), full_matrices=False)
    rank = _rank(values, RANK_TOLERANCE.get(delta.dtype, HALF_TOLERANCE))
    if rank == 0:
        return
    if rank > limit:
        raise NotImplementedError(
            f"a change of rank {rank} cannot be added to a {weight.qtype.name} weight of shape {tuple(weight.shape)}: up "
            f"to rank {limit} it is stored exactly as a low-rank term, but above that rounding would erase most of it. "
            f"Dequantize the model first (model.dequantize()), merge, and quantize again."
        )
    up, down = left[..., :rank] * (sign * values[..., None, :rank]), right[..., :rank, :]
    before = weight.up, weight.down
    append(weight, up, down)
    if before[0] is not None:
        compress(weight)


def compress(weight: QTensor) -> None:
    """Reduces the low-rank term to its numerical rank, in place: a change that was added and subtracted is removed."""
    if weight.up is None or weight.down is None:
        return
    with without_autocast(weight.device):
        _compress(weight)


def _compress(weight: QTensor) -> None:
    q_up, r_up = torch.linalg.qr(weight.up.float())
    q_down, r_down = torch.linalg.qr(weight.down.float().mT)
    left, values, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    # Relative to the norms of the factors, not of their product: what is left of equal terms is rounding error.
    size = (r_up.norm(dim=(-2, -1)) * r_down.norm(dim=(-2, -1))).amax()
    rank = int((values > RANK_TOLERANCE[torch.float32] * size).sum(-1).amax())
    if rank == 0:
        weight.set_lowrank(None, None)
    elif rank < weight.rank:
        up = (q_up @ left[..., :rank]) * values[..., None, :rank]
        weight.set_lowrank(up.to(weight.up.dtype), (right[..., :rank, :] @ q_down.mT).to(weight.down.dtype))


def _rank(values: torch.Tensor, tolerance: float) -> int:
    if not values.numel():
        return 0
    return int((values > tolerance * values.amax()).sum(-1).amax())


# ---------------------------------------------------------------------- the whole model


def fold(weight: QTensor) -> QTensor:
    """The weight with its low-rank term rounded into the codes: same type and groups, less memory, not exact."""
    folded = weight._quantize_like(weight.dequantize(torch.float32))
    scales = folded.scales(lambda t: t.to(weight.inner_tensors()["scale"].dtype))
    return weight.with_inner({**folded.inner_tensors(), **scales})


@torch.no_grad()
def fold_lowrank(model: nn.Module) -> dict[str, float]:
    """Rounds every merged adapter into the codes of its weight, in place.

    This is lossy: below 8 bits most of an adapter can be lost. So it never happens automatically.

    Returns:
        Name of each changed weight -> relative error of the low-rank term (Frobenius norm).
    """
    lost: dict[str, float] = {}
    for name, weight in model.named_parameters():
        if not isinstance(weight, QTensor) or not weight.rank:
            continue
        exact, plain = weight.dequantize(torch.float32), weight.without_lowrank().dequantize(torch.float32)
        folded = fold(weight)
        term = (exact - plain).norm()
        lost[name] = float((folded.dequantize(torch.float32) - exact).norm() / term) if term else 0.0
        weight.data = folded
    return lost
