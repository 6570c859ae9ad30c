"""`torch.cat`, `torch.stack` and ``torch._foreach_copy_`` on quantized weights.

Weights of the same type are joined without a change of their codes: scales are repeated where groups of different sizes
meet, and low-rank terms are put next to each other. The values of other weights are joined, as a float tensor
(`requanto.tensor.values` logs it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from requanto.tensor.aten import aten, copy_, stored_axis
from requanto.tensor.dispatch import NeedsValues, implements_aten
from requanto.tensor.qtensor import QTensor
from requanto.tensor.sharding import with_groups
from requanto.tensor.spec import PER_COLUMN


class UnlikeWeights(NeedsValues):
    """Weights whose codes cannot be joined, e.g. because their types differ: torch.cat then joins their values."""


@implements_aten(aten.cat.default)
def _cat(func: Any, args: tuple, kwargs: dict) -> QTensor:
    return concatenate(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))


@implements_aten(aten.stack.default)
def _stack(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Weights ``[N, K]`` of one type as ``[E, N, K]``, the form of fused experts."""
    weights, dim = _quantized(args[0], "stack"), args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = weights[0]
    if dim % (first.dim() + 1) != 0 or first.dim() != 2 or first.axis != 0:
        raise UnlikeWeights(
            f"stack along axis {dim} of quantized weights of shape {tuple(first.shape)}: only matrices can be stacked, "
            f"along axis 0; call .dequantize() on them first"
        )
    _check_alike(weights)
    if any(weight.shape != first.shape for weight in weights):
        raise RuntimeError(f"stack expects equal shapes, found {[tuple(weight.shape) for weight in weights]}")
    weights = _same_rank(_same_groups(weights))
    parts = [weight.inner_tensors() for weight in weights]
    inner = {
        name: part.clone() if name == "codebook" else torch.stack([p[name] for p in parts])
        for name, part in parts[0].items()
    }
    return weights[0].with_inner(inner, shape=(len(weights), *first.shape), axis=1)


def concatenate(pieces: Sequence[torch.Tensor], dim: int) -> QTensor:
    """Joins quantized weights along one axis; the result has exactly their values.

    Raises:
        UnlikeWeights: a weight is float, or their types, rotations, codebooks, column scales or orders of columns differ, or
            rows end inside a byte.
        RuntimeError: their shapes differ in another axis.
    """
    weights = _quantized(pieces, "cat")
    first = weights[0]
    dim %= first.dim()
    others = [weight.shape[:dim] + weight.shape[dim + 1 :] for weight in weights]
    if any(other != others[0] for other in others):
        raise RuntimeError(
            f"sizes must match except in axis {dim}, found shapes {', '.join(str(tuple(w.shape)) for w in weights)}"
        )
    if len(weights) == 1:
        return first.clone()
    _check_alike(weights)
    axis = stored_axis(first, dim)
    if axis == first.axis:
        _check_columns(weights)
    shape = list(first.shape)
    shape[dim] = sum(weight.shape[dim] for weight in weights)
    if axis > first.axis:
        weights, group = _columns(weights, axis)
        axis = -1
    else:
        weights = _same_groups(weights)
        group = weights[0].group_size
    lowrank = _joined_lowrank(weights, axis)
    parts = [weight.inner_tensors() for weight in weights]
    alone = ("up", "down", "codebook", *(PER_COLUMN if axis == first.axis else ()))
    names = [name for name in parts[0] if name not in alone]
    inner: dict[str, torch.Tensor] = {name: torch.cat([part[name] for part in parts], axis) for name in names}
    if first.codebook is not None:
        inner["codebook"] = first.codebook.clone()
    inner |= {name: parts[0][name].clone() for name in PER_COLUMN if name in parts[0] and name not in inner}
    return weights[0].with_inner({**inner, **lowrank}, shape=shape, group_size=group)


def _quantized(pieces: Sequence[torch.Tensor], what: str) -> list[QTensor]:
    found = [piece for piece in pieces if isinstance(piece, QTensor)]
    if len(found) != len(pieces):
        raise UnlikeWeights(
            f"{what} of {len(found)} quantized and {len(pieces) - len(found)} float tensors: call .dequantize() on the "
            f"quantized ones, or quantize the others like them; nothing is dequantized silently."
        )
    return found


def _check_alike(weights: Sequence[QTensor]) -> None:
    first = weights[0]
    for other in weights[1:]:
        for field in (
            "qtype",
            "affine",
            "axis",
            "transposed",
            "activation",
            "scale_bits",
            "zeros",
            "signed",
            "scale_block",
            "rotation",
            "device",
        ):
            mine, theirs = getattr(first, field), getattr(other, field)
            if mine != theirs:
                mine, theirs = getattr(mine, "name", mine), getattr(theirs, "name", theirs)
                raise UnlikeWeights(
                    f"quantized weights of different {field} ({mine} and {theirs}) cannot be joined without rounding. "
                    f"Quantize them alike, or call .dequantize() on them."
                )
        if first.codebook is not None and not torch.equal(first.codebook, other.codebook):  # type: ignore[arg-type]
            raise UnlikeWeights(
                f"{first.qtype.name} weights with codebooks of their own cannot be joined without rounding. Use a type with "
                f"fixed values (nf4, int4), or call .dequantize() on them."
            )
        for part, what in PER_COLUMN.items():
            if (part in first._storage.parts) != (part in other._storage.parts):
                raise UnlikeWeights(
                    f"quantized weights with and without {what} cannot be joined without rounding. Quantize them alike, or "
                    f"call .dequantize() on them."
                )


def _check_columns(weights: Sequence[QTensor]) -> None:
    """Rows that are joined have one column scale, and one order of columns, in common."""
    first = weights[0].column
    if first is not None and not all(torch.equal(first, w.column) for w in weights[1:]):  # type: ignore[arg-type]
        raise UnlikeWeights(
            "rows of quantized weights with different column scales cannot be joined without rounding. Quantize them with "
            "one column_scale tensor or with column_scale=False, or call .dequantize() on them."
        )
    order = weights[0].order
    if order is not None and not all(torch.equal(order, w.order) for w in weights[1:]):  # type: ignore[arg-type]
        raise UnlikeWeights(
            "rows of quantized weights whose columns are stored in different orders cannot be joined without rounding: "
            "their groups hold other columns. Keep the layers apart, or call .dequantize() on them."
        )


def _same_groups(weights: Sequence[QTensor]) -> list[QTensor]:
    """The weights with equal group sizes: the largest that divides all of them."""
    if all(weight.group_size == weights[0].group_size for weight in weights):
        return list(weights)
    return [with_groups(w, math.gcd(*(one.group_size or one.row_length for one in weights))) for w in weights]


def _columns(weights: Sequence[QTensor], axis: int) -> tuple[list[QTensor], int]:
    """Weights whose rows can be joined by joining their bytes and scales, and the group size that they have in common."""
    first = weights[0]
    if first.row_length != first._spec.shape[axis]:
        raise UnlikeWeights(
            f"a convolution's quantized weight {tuple(first.shape)} can be joined along its rows (axis 0) only; call "
            f".dequantize() first"
        )
    if first.row_scale is not None:
        raise UnlikeWeights(
            f"weights with scales in {first._spec.scale_code_bits} bits can be joined along their rows (axis 0) only: each "
            f"row has scales of its scales. Call .dequantize() first."
        )
    if first.order is not None:
        raise UnlikeWeights(
            "weights whose columns are stored in another order can be joined along their rows (axis 0) only; call "
            ".dequantize() first."
        )
    if any(weight.row_length * weight.qtype.bits % 8 for weight in weights[:-1]):
        raise UnlikeWeights(
            f"rows of {[w.row_length for w in weights]} {first.qtype.name} weights cannot be joined: one of them ends "
            f"inside a byte. Call .dequantize() first."
        )
    if not all(weight.row_length for weight in weights):
        raise UnlikeWeights("quantized weights without columns cannot be joined along their rows")
    group = math.gcd(*(weight.group_size or weight.row_length for weight in weights))
    return [with_groups(weight, group) for weight in weights], group


# ---------------------------------------------------------------------- low-rank terms


def _same_rank(weights: Sequence[QTensor]) -> list[QTensor]:
    """The weights with terms of the same rank: shorter ones are filled with zeros."""
    rank = max(weight.rank for weight in weights)
    if all(weight.rank == rank for weight in weights):
        return list(weights)
    found = []
    for weight in weights:
        up, down = _factors(weight)
        more = rank - weight.rank
        up = torch.cat([up, up.new_zeros(*up.shape[:-1], more)], -1)
        down = torch.cat([down, down.new_zeros(*down.shape[:-2], more, down.shape[-1])], -2)
        found.append(weight.with_inner({**weight.inner_tensors(), "up": up, "down": down}))
    return found


def _factors(weight: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    if weight.up is not None and weight.down is not None:
        return weight.up, weight.down
    shapes = weight._spec.low_rank_shapes(0)
    return tuple(torch.zeros(shapes[n], dtype=weight.dtype, device=weight.device) for n in ("up", "down"))  # type: ignore[return-value]


def _joined_lowrank(weights: Sequence[QTensor], axis: int) -> dict[str, torch.Tensor]:
    """The low-rank term of weights that are joined along their stored ``axis``; -1: along a row."""
    if not any(weight.rank for weight in weights):
        return {}
    if axis not in (-1, weights[0].axis):  # experts: each has a term of its own
        pairs = [_factors(weight) for weight in _same_rank(weights)]
        return {"up": torch.cat([up for up, _ in pairs], axis), "down": torch.cat([down for _, down in pairs], axis)}
    ups, downs = zip(*(_factors(weight) for weight in weights))
    if axis == -1:  # the values of a row of `down` are columns of the weight
        return {"up": torch.cat(ups, -1), "down": _diagonal(downs)}
    return {"up": _diagonal(ups), "down": torch.cat(downs, -2)}


def _diagonal(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices ``[..., n, m]`` as blocks on the diagonal of one; the rest is zero."""
    lead, dtype = blocks[0].shape[:-2], blocks[0].dtype
    for block in blocks[1:]:
        dtype = torch.promote_types(dtype, block.dtype)
    rows, columns = (sum(block.shape[axis] for block in blocks) for axis in (-2, -1))
    whole = torch.zeros(*lead, rows, columns, dtype=dtype, device=blocks[0].device)
    row = column = 0
    for block in blocks:
        whole[..., row : row + block.shape[-2], column : column + block.shape[-1]] = block
        row, column = row + block.shape[-2], column + block.shape[-1]
    return whole


# ---------------------------------------------------------------------- lists of tensors


@implements_aten(aten._foreach_copy_.default)
def _foreach_copy_(func: Any, args: tuple, kwargs: dict) -> None:
    for target, source in zip(args[0], args[1], strict=True):
        if isinstance(target, QTensor) or isinstance(source, QTensor):
            copy_(target, source)
        else:
            target.copy_(source, *args[2:], **kwargs)
