"""aten operators on QTensor: copies, moves, and views of whole rows or whole groups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from requanto.runtime.tracing import is_tracing
from requanto.scales.compact import pack_codes, unpack_codes
from requanto.tensor import float_targets
from requanto.tensor.dispatch import NeedsValues, implements_aten
from requanto.tensor.layout import PLAIN, Layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import PER_COLUMN, WeightSpec, swapped
from requanto.tensor.storage import SlicedStorage
from requanto.tensor.values import read_only

aten = torch.ops.aten


def map_parts(
    tensor: QTensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    keep: Collection[str] = (),
    **changes: Any,
) -> QTensor:
    """A new weight with ``change`` applied to each stored tensor; those named in ``keep`` are copied.

    Args:
        changes: fields of the spec to replace, see `QTensor.with_inner`.
    """
    inner = {name: t.clone() if name in keep else change(t) for name, t in tensor.inner_tensors().items()}
    return tensor.with_inner(inner, **changes)


@implements_aten(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: tuple, kwargs: dict) -> QTensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0].view_of_storage())


@implements_aten(aten.clone.default)
def _clone(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """A copy in the same layout."""
    tensor = args[0]
    layout, parts = tensor._storage.state
    if layout is PLAIN:
        return map_parts(tensor, torch.clone)
    copied = {n: p.clone() for n, p in parts.items() if n not in ("qdata", *layout.extra)}
    return type(tensor)._of(tensor._spec, {**layout.clone(tensor._spec, parts), **copied}, layout)


@implements_aten(aten.contiguous.default)
def _contiguous(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor = args[0]
    parts = tensor._storage.parts.values()
    packed = tensor.is_packed  # scales may be stored in the order that kernels read
    return (
        tensor.view_of_storage()
        if all(p.is_contiguous() or (packed and p.dim() > 1 and p.mT.is_contiguous()) for p in parts)
        else map_parts(tensor, lambda t: t.contiguous())
    )


@implements_aten(aten._to_copy.default)
def _to_copy(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Moves to a device. A dtype changes the dtype that the weight shows, not its codes or scales."""
    tensor = args[0]
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise NotImplementedError(
            f"a quantized weight has a float dtype of 16 bits or more; {dtype} was asked for. Call .dequantize() first."
        )
    kwargs.pop("memory_format", None)
    kwargs.pop("layout", None)
    return map_parts(tensor, lambda t: aten._to_copy.default(t, **kwargs), dtype=dtype)


@implements_aten(aten.empty_like.default)
def _empty_like(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor = args[0]
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    kwargs.pop("memory_format", None)
    return map_parts(tensor, lambda t: aten.empty_like.default(t, **kwargs), dtype=dtype)


@implements_aten(aten.copy_.default)
def _copy_(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    return copy_(args[0], args[1])


def copy_(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """``target.copy_(source)``: the parts between QTensors of the same spec; a float source is quantized like the target.

    Raises:
        NotImplementedError: the target is float (see `requanto.tensor.float_targets`).
        ValueError: the shapes or the types of two quantized weights differ.
    """
    if not isinstance(target, QTensor):
        return float_targets.copy_into_float(target, source)  # type: ignore[arg-type]
    if target.shape != source.shape:
        raise ValueError(f"copy_ into a QTensor of shape {tuple(target.shape)} from shape {tuple(source.shape)}")
    if not isinstance(source, QTensor):
        # A part of a weight has the column scale of the whole; another weight gets one of its own.
        same = target._storage.base is not None
        source = target._quantize_like(source.to(target.dtype), low_rank=target.rank or None, same_column=same)
    if source.rank != target.rank and target._storage.base is None and _kind(source, 0) == _kind(target, 0):
        # A merged adapter, or one less. The whole weight is written, so no alias keeps another term.
        up, down = source.up, source.down
        if up is None or down is None:
            target.set_lowrank(None, None)
        else:
            target.set_lowrank(up.to(target.device, copy=True), down.to(target.device, copy=True))
    if _kind(source) != _kind(target):
        raise ValueError(f"copy_ between unlike quantized weights: {_kind(source)} into {_kind(target)}")
    if source._storage is not target._storage:
        target._storage.write(target._spec, source.inner_tensors())
    return target


def _kind(tensor: QTensor, rank: int | None = None) -> str:
    """Text that is equal for two weights whose parts can be copied: the spec without dtype and activation."""
    return tensor._spec.replace(dtype=torch.float32, activation=None).text(tensor.rank if rank is None else rank)


@implements_aten(aten.t.default, aten.transpose.int, aten.permute.default)
def _transpose(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Swaps the last two axes: a view, the stored tensors stay."""
    tensor, count = args[0], args[0].dim()
    order = list(range(count))
    if func is aten.permute.default:
        order = [axis % count for axis in args[1]]
    else:
        one, two = (0, 1) if func is aten.t.default else (args[1] % count, args[2] % count)
        order[one], order[two] = order[two], order[one]
    if order == list(range(count)):
        return _alias(func, args, kwargs)
    if order[:-2] != list(range(count - 2)) or tensor.axis != count - 2:
        raise NeedsValues(
            f"only the last two axes of a quantized weight of shape {tuple(tensor.shape)} can be swapped, found order "
            f"{order}; call .dequantize() first"
        )
    new = tensor.view_of_storage(transposed=not tensor.transposed)
    return return_and_correct_aliasing(func, args, kwargs, new)


def stored_axis(tensor: QTensor, dim: int) -> int:
    """Axis of the stored shape for axis ``dim`` of the tensor."""
    dim %= tensor.dim()
    last = tensor.dim() - 1
    if tensor.transposed and dim >= last - 1:
        return last if dim == last - 1 else last - 1
    return dim


@implements_aten(aten.select.int)
def _select(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """One expert of a fused weight."""
    tensor, dim, index = args
    if (
        dim % tensor.dim() == 0 and tensor.axis == 0 and stored_axis(tensor, 0) == 0
    ):  # a row, of which the values are wanted
        index = range(tensor.shape[0])[index]
        return read_only(narrow(tensor, 0, index, index + 1).dequantize()[0])
    if dim % tensor.dim() != 0 or tensor.axis == 0:
        raise NeedsValues(
            f"select along axis {dim} of a quantized weight of shape {tuple(tensor.shape)}: only whole experts (axis 0 "
            f"of a 3D weight) can be selected; call .dequantize() first"
        )
    whole = tensor.shared_along(0)
    shape = tensor._spec.shape[1:]
    new = part_of(
        tensor,
        tensor._spec.replace(shape=shape, axis=tensor.axis - 1),
        lambda name, t: t if name in whole else aten.select.int(t, 0, index),
        experts=True,
    )
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements_aten(aten.unbind.int)
def _unbind(func: Any, args: tuple, kwargs: dict) -> list[QTensor]:
    """All experts, one by one."""
    tensor = args[0]
    dim = args[1] if len(args) > 1 else 0
    return [_select(aten.select.int, (tensor, dim, index), {}) for index in range(tensor.shape[dim])]


@implements_aten(aten.index.Tensor, aten.index_select.default)
def _index(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    """Experts or rows picked by an index tensor along axis 0; values of rows if the index has several axes."""
    tensor = args[0]
    if func is aten.index_select.default:
        dim, index = args[1] % tensor.dim(), args[2]
    else:
        indices = [i for i in args[1] if i is not None]
        dim, index = args[1].index(indices[0]) if len(indices) == 1 else -1, indices[0]
    if dim == 0 and index.dim() > 1 and index.dtype in (torch.int32, torch.int64) and stored_axis(tensor, 0) == 0:
        rows = map_parts(
            tensor,
            lambda t: t[index.reshape(-1)],
            keep=tensor.shared_along(0),
            shape=(index.numel(), *tensor.shape[1:]),
        )
        return rows.dequantize().view(*index.shape, *tensor.shape[1:])
    if dim != 0 or index.dim() != 1 or stored_axis(tensor, 0) != 0:
        raise NeedsValues(
            f"a quantized weight of shape {tuple(tensor.shape)} can be indexed by one 1D tensor along its rows or "
            f"experts (axis 0) only; call .dequantize() first"
        )
    count = index.numel() if index.dtype != torch.bool else int(index.sum())
    shape = (count, *tensor.shape[1:])
    return map_parts(tensor, lambda t: t[index], keep=tensor.shared_along(0), shape=shape)


@implements_aten(aten.slice.Tensor)
def _slice(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """A range of experts, of rows, or of whole groups along a row."""
    tensor = args[0]
    dim = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else None
    end = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    start, end, step = slice(start, end, step).indices(tensor.shape[dim])
    return return_and_correct_aliasing(func, args, kwargs, narrow(tensor, dim, start, end, step))


def part_of(
    tensor: QTensor,
    spec: WeightSpec,
    view: Callable[[str, torch.Tensor], torch.Tensor],
    *,
    rows: bool = True,
    experts: bool = False,
    read_only: str | None = None,
) -> QTensor:
    """A slice of a weight: a write into either is a write into both.

    Args:
        spec: spec of the slice.
        view: ``view(name, part)`` is the slice of one stored tensor, as a view; the tensor itself if it is shared.
        rows: True if the slice consists of whole rows (or experts).
        experts: True if it consists of whole experts.
        read_only: why nothing can be written into the slice; None if it can.
    """

    def slice_parts(parts: Any) -> dict[str, torch.Tensor]:
        return {name: view(name, part) for name, part in parts.items()}

    def viewable(layout: Layout) -> bool:
        return layout is PLAIN or (rows and layout.rows_are_views) or (experts and layout.experts_are_views)

    if tensor.is_packed and is_tracing():
        return type(tensor)._of(spec, slice_parts(tensor.inner_tensors()))
    new = SlicedStorage(tensor._storage, tensor._spec, slice_parts, viewable, read_only)
    new.layout.check(spec, new.parts)
    return type(tensor)._over(spec, new)


def narrow(tensor: QTensor, dim: int, start: int, end: int, step: int = 1) -> QTensor:
    """``tensor[start:end:step]`` along ``dim``.

    Raises:
        NotImplementedError: an end of the slice is not between groups, bytes or rotation blocks.
    """
    axis = stored_axis(tensor, dim)
    shape = list(tensor.shape)
    shape[dim % tensor.dim()] = max(0, -(-(end - start) // step))
    spec = tensor._spec
    if axis > spec.axis and (start, end, step) == (0, tensor.shape[dim], 1):
        return tensor.view_of_storage()
    group = spec.group_size or spec.row_length
    if axis > spec.axis:
        first, last = start * spec.qtype.bits, end * spec.qtype.bits
        between_bytes = step == 1 and not first % 8 and not last % 8
        between_groups = spec.group_size is None or (not start % group and not end % group)
        one_axis = spec.row_length == spec.shape[axis]
        if not (one_axis and between_bytes and between_groups):
            raise NeedsValues(
                f"a quantized weight can be sliced along its rows between groups of {group} only, found "
                f"[{start}:{end}:{step}]; call .dequantize() first"
            )
        if spec.order:
            raise NeedsValues(
                f"a weight whose columns are stored in another order cannot be sliced along its rows, found "
                f"[{start}:{end}]: the columns of a slice are in any groups; call .dequantize() first"
            )
        if spec.scale_block is not None and (start % spec.scale_block or end % spec.scale_block):
            raise NeedsValues(
                f"a weight with scales in blocks of {spec.scale_block} can be sliced along its rows between blocks only, "
                f"found [{start}:{end}]; call .dequantize() first"
            )
        if spec.rotation is not None and (start % spec.rotation or end % spec.rotation):
            raise NeedsValues(
                f"a weight whose rows are rotated in blocks of {spec.rotation} can be sliced between blocks only, found "
                f"[{start}:{end}]; quantize with smaller blocks, e.g. rotation={(start | end) & -(start | end)}"
            )
    new = spec.replace(shape=swapped(shape) if spec.transposed else torch.Size(shape))
    if axis <= spec.axis:
        whole = tensor.shared_along(axis)
        rows = (slice(None),) * axis + (slice(start, end, step),)
        return part_of(tensor, new, lambda name, t: t if name in whole else t[rows], experts=axis < spec.axis)
    groups = slice(start // group, end // group)
    bits, read_only = spec.code_bits, None
    for part, count in bits.items():
        if count < 8:  # the first code of a slice may be inside a byte, so the scales are repacked
            read_only = (
                f"copy_ into columns of a quantized weight whose {part}s are stored in {count} bits: their codes share "
                f"bytes with others. Write the whole weight instead."
            )
            break

    def columns(name: str, t: torch.Tensor) -> torch.Tensor:
        if name == "qdata":
            return t[..., first // 8 : last // 8]
        if name in ("down", "column"):
            return t[..., start:end]
        if name in ("row_scale", "row_shift") and spec.scale_block is not None:
            return t[..., start // spec.scale_block : end // spec.scale_block]
        if name in ("scale", "shift") and spec.group_size is not None:
            count = bits.get(name, 8)
            if count == 8:
                return t[..., groups]
            return pack_codes(unpack_codes(t, count, spec.groups)[..., groups].contiguous(), count)
        return t

    return part_of(tensor, new, columns, rows=False, read_only=read_only)


@implements_aten(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: tuple, kwargs: dict) -> list[QTensor]:
    tensor, sizes = args[0], args[1]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.dim()
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    unpacked = tensor._storage.stored(tensor._spec)  # one copy for all slices of a prepacked weight
    parts, start = [], 0
    for size in sizes:
        parts.append(narrow(tensor, dim, start, start + size))
        start += size
    del unpacked
    return parts


def _called_by_fsdp() -> bool:
    """True if FSDP2's code is the caller. For other callers, flattening a quantized weight is an error."""
    frame, depth = sys._getframe(1), 0
    while frame is not None and depth < 10:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed.fsdp."):
            return True
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    return False


@implements_aten(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor, size = args[0], list(args[1])
    if size == [-1] and _called_by_fsdp():
        # FSDP2 stores a flat view of each shard, but never reads it for a type with its own all-gather.
        size = list(tensor.shape)
    if -1 in size:
        rest = -torch.Size(size).numel()
        size[size.index(-1)] = tensor.numel() // rest if rest else 0
    if len(size) == 3 and tensor.dim() == 2 and size[0] * size[1] == tensor.shape[0] and size[2] == tensor.shape[1]:
        return _rows_in_groups(func, args, kwargs, size)
    if torch.Size(size) != tensor.shape:
        raise NeedsValues(
            f"{func} of a quantized weight from {tuple(tensor.shape)} to {tuple(size)}: only its own shape is possible; "
            f"call .dequantize() first"
        )
    return _alias(func, args, kwargs)


def _rows_in_groups(func: Any, args: tuple, kwargs: dict, size: list[int]) -> QTensor:
    """The rows of a matrix as a matrix for each group of rows: ``[G * N, K]`` as ``[G, N, K]``."""
    tensor = args[0]
    if tensor.transposed or tensor.axis != 0 or tensor.rank:
        raise NeedsValues("only the rows of a weight without a low-rank term can be viewed in groups")
    whole, refused = tensor.shared_along(0), None
    for part, what in PER_COLUMN.items():
        if part in tensor._storage.parts:
            refused = f"copy_ into rows in groups of a quantized weight with {what}, which all groups share."

    def grouped(name: str, t: torch.Tensor) -> torch.Tensor:
        if name in PER_COLUMN:
            return t.expand(size[0], *t.shape)
        return t if name in whole else t.view(*size[:2], *t.shape[1:])

    spec = tensor._spec.replace(shape=torch.Size(size), axis=1)
    new = part_of(tensor, spec, grouped, rows=False, read_only=refused)
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements_aten(aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple, kwargs: dict) -> bool:
    return all(func(t, *args[1:], **kwargs) for t in args[0]._storage.parts.values())


@implements_aten(aten._pin_memory.default)
def _pin_memory(func: Any, args: tuple, kwargs: dict) -> QTensor:
    return map_parts(args[0], lambda t: func(t, *args[1:], **kwargs))


@implements_aten(aten.record_stream.default)
def _record_stream(func: Any, args: tuple, kwargs: dict) -> None:
    """Records the stream on every part: they own the memory."""
    for part in args[0]._storage.parts.values():
        func(part, *args[1:], **kwargs)


@implements_aten(aten.equal.default)
def _equal(func: Any, args: tuple, kwargs: dict) -> bool:
    """True for the same codes, scales, shifts and low-rank terms."""
    one, two = args
    if not isinstance(one, QTensor) or not isinstance(two, QTensor):
        raise NotImplementedError("equal() of a quantized and a float tensor: call .dequantize() first")
    if _kind(one) != _kind(two):
        return False
    other = two.inner_tensors()
    return all(_same_bytes(inner, other[name]) for name, inner in one.inner_tensors().items())


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    # torch.equal does not support float8, and a comparison of bytes is wanted.
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    if one.is_floating_point() and one.element_size() == 1:
        one, two = one.view(torch.uint8), two.view(torch.uint8)
    return torch.equal(one, two)
