"""Slicing and joining quantized weights exactly, for tensor parallelism.

A weight can be sliced between rows (or experts), and along its rows between bytes. A slice that ends inside a group copies
the group's scale. So the slices have exactly the values of the whole weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from requanto.tensor.aten import narrow, stored_axis
from requanto.tensor.qtensor import QTensor


def slice_weight(tensor: QTensor, dim: int, start: int, end: int, name: str = "weight") -> QTensor:
    """``tensor[start:end]`` along ``dim``, also inside a group; a copy, so that the whole weight can be freed.

    Raises:
        NotImplementedError: an end of the slice is inside a byte or a block of scales, or columns are stored in another
            order.
    """
    if stored_axis(tensor, dim) > tensor.axis and (start, end) != (0, tensor.shape[dim]):
        _check_cut(tensor, start, end, name)
    group = tensor.group_size or tensor.row_length
    if stored_axis(tensor, dim) > tensor.axis and (start % group or end % group):
        finer = math.gcd(math.gcd(start, end - start), group)
        if (finer * tensor.qtype.bits) % 8:
            raise NotImplementedError(
                f"{name}: rows of {tensor.row_length} {tensor.qtype.name} weights in groups of {group} cannot be sliced at "
                f"{start}: it falls inside a byte. Use another number of ranks."
            )
        if tensor.group_size is not None:
            tensor = with_groups(tensor, finer)
    return narrow(tensor, dim, start, end).clone()


def _check_cut(tensor: QTensor, start: int, end: int, name: str) -> None:
    """Refuses slices along rows that no words can describe."""
    if tensor.order is not None:
        raise NotImplementedError(
            f"{name}: its columns are stored in another order, so its groups cannot be divided among ranks by columns. "
            f"Divide this layer by rows, or dequantize it (QTensor.dequantize) first."
        )
    block = tensor.scale_block
    if block is not None and (start % block or end % block):
        raise NotImplementedError(
            f"{name}: its rows of {tensor.row_length} weights have scales in blocks of {block} and cannot be sliced at "
            f"[{start}:{end}], inside a block. Use another number of ranks, or dequantize it (QTensor.dequantize) first."
        )


def join_weights(pieces: Sequence[QTensor], dim: int) -> QTensor:
    """Concatenates slices of one weight along ``dim``; different group sizes become their greatest common divisor.

    Raises:
        ValueError: the slices have different codebooks.
        NotImplementedError: the slices have parts that cannot be joined along rows, or different row scales.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if first.codebook is not None and not all(torch.equal(first.codebook, piece.codebook) for piece in pieces):
        raise ValueError("pieces with codebooks of their own are not slices of one weight")
    axis = stored_axis(first, dim)
    shape = list(first.shape)
    shape[dim % first.dim()] = sum(piece.shape[dim] for piece in pieces)
    if axis <= first.axis:
        shared = first.shared_along(axis)
    else:
        # `up` has no axis along a row, and without groups each piece has the one scale of its row.
        shared = first.shared_along(axis) | ({"up"} if first.group_size is not None else {"up", "scale", "shift"})
        if first.scale_block is None:
            shared |= {"row_scale"}
        axis = -1
        known = {"qdata", "scale", "shift", "up", "down", "codebook", "row_scale", "column", "row_shift"}
        if unknown := first.inner_tensors().keys() - known:
            raise NotImplementedError(f"joining pieces of rows that have parts {sorted(unknown)}")
    if first.group_size is not None:
        group = math.gcd(*(piece.group_size or piece.row_length for piece in pieces))
        pieces = [with_groups(piece, group) for piece in pieces]
        first = pieces[0]
    parts = [piece.inner_tensors() for piece in pieces]
    inner = {name: t if name in shared else torch.cat([p[name] for p in parts], axis) for name, t in parts[0].items()}
    if axis == -1 and first._spec.code_bits and first.group_size is not None:
        inner |= _joined_scales(pieces)
    return first.with_inner(inner, shape=shape)


def _joined_scales(pieces: Sequence[QTensor]) -> dict[str, torch.Tensor]:
    """Repacked scale codes of pieces of the same rows: the codes of a piece may end inside a byte."""
    first, rest = pieces[0], pieces[1:]
    if (
        first.row_scale is not None
        and first.scale_block is None
        and any(not torch.equal(first.row_scale, piece.row_scale) for piece in rest)
    ):  # type: ignore[arg-type]
        raise NotImplementedError("joining pieces of rows with different row_scale")
    unpacked = [piece.scale_codes() for piece in pieces]
    return first.packed_scales({name: torch.cat([codes[name] for codes in unpacked], -1) for name in unpacked[0]})


def with_groups(tensor: QTensor, group: int) -> QTensor:
    """The same values in groups of another size.

    Smaller groups repeat each scale. Larger groups need equal scales in the groups that are merged.

    Raises:
        ValueError: larger groups would change values, or neither size divides the other.
    """
    now = tensor.group_size or tensor.row_length
    if group == now:
        return tensor
    if now % group == 0:
        change = _repeat(now // group)
    elif group % now == 0:
        change = _every(group // now)
    else:
        raise ValueError(f"groups of {now} cannot be converted to groups of {group}")
    others = {name: part.clone() for name, part in tensor.inner_tensors().items()}
    return tensor.with_inner({**others, **tensor.scales(change)}, group_size=group)


def _repeat(times: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda scale: scale.repeat_interleave(times, -1)


def _every(times: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        parts = scale.unflatten(-1, (-1, times))
        if not torch.equal(parts, parts[..., :1].expand_as(parts)):
            raise ValueError(f"{times} neighbouring groups have different scales: they cannot be merged into one")
        return parts[..., 0].contiguous()

    return change
