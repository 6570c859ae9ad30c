"""aten operators on QTensor: copies, moves and the views that keep whole rows or whole groups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from requanto.tensor.dispatch import implements_aten
from requanto.tensor.qtensor import QTensor

aten = torch.ops.aten


def each(
    tensor: QTensor,
    change: Callable[[torch.Tensor], torch.Tensor],
    keep: Collection[str] = (),
    **attributes: Any,
) -> QTensor:
    """The tensor with ``change`` applied to every inner tensor but those to ``keep``."""
    inner = {name: t if name in keep else change(t) for name, t in tensor.inner_tensors().items()}
    return tensor.with_inner(inner, **attributes)


@implements_aten(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor, packed = args[0], args[0].packed
    if packed is None:
        return return_and_correct_aliasing(func, args, kwargs, each(tensor, lambda t: func(t)))
    # Reading qdata would make the tensor plain; its alias shares the packed form.
    aliases = {name: func(t) for name, t in tensor.beside().items()}
    return tensor.replace(packed.handle, **aliases)


@implements_aten(aten.clone.default)
def _clone(func: Any, args: tuple, kwargs: dict) -> QTensor:
    return each(args[0], torch.clone)


@implements_aten(aten.contiguous.default)
def _contiguous(func: Any, args: tuple, kwargs: dict) -> QTensor:
    return each(args[0], lambda t: t.contiguous())


@implements_aten(aten._to_copy.default)
def _to_copy(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Moves to a device; a dtype changes what is computed in, never codes or scales."""
    tensor = args[0]
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise NotImplementedError(
            f"a quantized weight is seen as a float tensor; {dtype} was asked for. Call .dequantize() first."
        )
    kwargs.pop("memory_format", None)
    kwargs.pop("layout", None)
    return each(tensor, lambda t: aten._to_copy.default(t, **kwargs), dtype=dtype)


@implements_aten(aten.empty_like.default)
def _empty_like(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor = args[0]
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    kwargs.pop("memory_format", None)
    return each(tensor, lambda t: aten.empty_like.default(t, **kwargs), dtype=dtype)


@implements_aten(aten.copy_.default)
def _copy_(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Copies codes between equal QTensors; a float source is quantized into the target's own type."""
    target, source = args[0], args[1]
    if not isinstance(target, QTensor):
        raise NotImplementedError(
            "copy_ of a quantized weight into a float tensor: call .dequantize() on the source, nothing is "
            "dequantized silently."
        )
    if target.shape != source.shape:
        raise ValueError(f"copy_ into a QTensor of shape {tuple(target.shape)} from shape {tuple(source.shape)}")
    if not isinstance(source, QTensor):
        source = QTensor.quantize(
            source.to(target.dtype),
            target.qtype,
            group_size=target.group_size,
            symmetric=not target.affine,
            scale_bits=target.scale_bits,
            rotation=target.rotation,
            low_rank=target.rank or None,
            axis=target.axis,
            transposed=target.transposed,
        )
    if _layout(source) != _layout(target):
        raise ValueError(f"copy_ between unlike quantized weights: {_layout(source)} into {_layout(target)}")
    packed = target.packed
    pinned = packed is not None and packed.pinned
    if pinned:  # a captured graph reads these very bytes
        packed.write(source.qdata)
    parts = source.inner_tensors()
    for name, inner in target.inner_tensors().items():
        if not (pinned and name == "qdata"):
            inner.copy_(parts[name])
    return target


def _layout(tensor: QTensor) -> tuple:
    return (
        tensor.qtype.name,
        tensor.axis,
        tensor.group_size,
        tensor.transposed,
        tensor.affine,
        tensor.rank,
        tensor.scale_bits,
        tensor.rotation,
    )


@implements_aten(aten.t.default, aten.transpose.int, aten.permute.default)
def _transpose(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Swaps the last two axes: a change of view, the stored form stays."""
    tensor, count = args[0], args[0].dim()
    order = list(range(count))
    if func is aten.permute.default:
        order = [axis % count for axis in args[1]]
    else:
        one, two = (0, 1) if func is aten.t.default else (args[1] % count, args[2] % count)
        order[one], order[two] = order[two], order[one]
    if order == list(range(count)):
        return each(tensor, lambda t: aten.alias.default(t))
    if order[:-2] != list(range(count - 2)) or tensor.axis != count - 2:
        raise NotImplementedError(
            f"only the last two axes of a quantized weight of shape {tuple(tensor.shape)} can be swapped, found order "
            f"{order}; call .dequantize() first"
        )
    shape = [tensor.shape[axis] for axis in order]
    aliases = {name: aten.alias.default(t) for name, t in tensor.beside().items()}
    codes = aten.alias.default(tensor.operand)  # a packed form that operators take is shared by its view
    new = tensor.replace(codes, shape=shape, transposed=not tensor.transposed, **aliases)
    return return_and_correct_aliasing(func, args, kwargs, new)


def stored_axis(tensor: QTensor, dim: int) -> int:
    """Axis of the stored form that axis ``dim`` of the tensor is."""
    dim %= tensor.dim()
    last = tensor.dim() - 1
    if tensor.transposed and dim >= last - 1:
        return last if dim == last - 1 else last - 1
    return dim


@implements_aten(aten.select.int)
def _select(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """One expert of a fused weight."""
    tensor, dim, index = args
    if dim % tensor.dim() != 0 or tensor.axis == 0:
        raise NotImplementedError(
            f"select along axis {dim} of a quantized weight of shape {tuple(tensor.shape)}: only whole experts (axis 0 "
            f"of a 3D weight) can be selected; call .dequantize() first"
        )
    new = each(
        tensor,
        lambda t: aten.select.int(t, 0, index),
        keep=tensor.shared_along(0),
        shape=tensor.shape[1:],
        axis=tensor.axis - 1,
    )
    return return_and_correct_aliasing(func, args, kwargs, new)


@implements_aten(aten.unbind.int)
def _unbind(func: Any, args: tuple, kwargs: dict) -> list[QTensor]:
    """All experts, one by one."""
    tensor = args[0]
    dim = args[1] if len(args) > 1 else 0
    return [_select(aten.select.int, (tensor, dim, index), {}) for index in range(tensor.shape[dim])]


@implements_aten(aten.index.Tensor, aten.index_select.default)
def _index(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """Experts or rows picked by an index tensor along axis 0."""
    tensor = args[0]
    if func is aten.index_select.default:
        dim, index = args[1] % tensor.dim(), args[2]
    else:
        indices = [i for i in args[1] if i is not None]
        dim, index = args[1].index(indices[0]) if len(indices) == 1 else -1, indices[0]
    if dim != 0 or index.dim() != 1 or stored_axis(tensor, 0) != 0:
        raise NotImplementedError(
            f"a quantized weight of shape {tuple(tensor.shape)} can be indexed by one 1D tensor along its rows or "
            f"experts (axis 0) only; call .dequantize() first"
        )
    count = index.numel() if index.dtype != torch.bool else int(index.sum())
    shape = (count, *tensor.shape[1:])
    return each(tensor, lambda t: t[index], keep=tensor.shared_along(0), shape=shape)


@implements_aten(aten.slice.Tensor)
def _slice(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """A run of experts, of rows, or of whole groups along the row."""
    tensor = args[0]
    dim = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else None
    end = args[3] if len(args) > 3 else None
    step = args[4] if len(args) > 4 else 1
    start, end, step = slice(start, end, step).indices(tensor.shape[dim])
    return return_and_correct_aliasing(func, args, kwargs, narrow(tensor, dim, start, end, step))


def narrow(tensor: QTensor, dim: int, start: int, end: int, step: int = 1) -> QTensor:
    """``tensor[start:end:step]`` along ``dim``.

    Raises:
        NotImplementedError: the cut does not fall between groups (or bytes).
    """
    axis = stored_axis(tensor, dim)
    shape = list(tensor.shape)
    shape[dim % tensor.dim()] = max(0, -(-(end - start) // step))
    if axis <= tensor.axis:
        cut = (slice(None),) * axis + (slice(start, end, step),)
        return each(tensor, lambda t: t[cut], keep=tensor.shared_along(axis), shape=shape)
    if (start, end, step) == (0, tensor.shape[dim], 1):
        return each(tensor, lambda t: aten.alias.default(t))
    group = tensor.group_size or tensor.row_length
    first, last = start * tensor.qtype.bits, end * tensor.qtype.bits
    between_bytes = step == 1 and not first % 8 and not last % 8
    between_groups = tensor.group_size is None or (not start % group and not end % group)
    one_axis = tensor.canonical_shape[tensor.axis + 1 :].numel() == tensor.canonical_shape[axis]
    if not (one_axis and between_bytes and between_groups):
        raise NotImplementedError(
            f"a quantized weight can be cut along its rows' length between groups of {group} only, found "
            f"[{start}:{end}:{step}]; call .dequantize() first"
        )
    if tensor.rotation is not None and (start % tensor.rotation or end % tensor.rotation):
        raise NotImplementedError(
            f"a weight whose rows are rotated in blocks of {tensor.rotation} can be cut between blocks only, found "
            f"[{start}:{end}]; quantize with smaller blocks, e.g. rotation={(start | end) & -(start | end)}"
        )
    qdata = tensor.qdata[..., first // 8 : last // 8]
    down = None if tensor.down is None else tensor.down[..., start:end]
    if tensor.group_size is None:
        return tensor.replace(qdata, shape=shape, down=down)
    groups = slice(start // group, end // group)
    return tensor.replace(qdata, shape=shape, down=down, **tensor.scales(lambda t: t[..., groups]))


@implements_aten(aten.split.Tensor, aten.split_with_sizes.default)
def _split(func: Any, args: tuple, kwargs: dict) -> list[QTensor]:
    tensor, sizes = args[0], args[1]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.dim()
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    parts, start = [], 0
    for size in sizes:
        parts.append(narrow(tensor, dim, start, start + size))
        start += size
    return parts


def _called_by_fsdp() -> bool:
    """True if FSDP2's own code asked; anyone else who flattens a quantized weight is told that it cannot be."""
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
        # FSDP2 keeps a flat handle of each shard, and never looks into one whose type gathers itself.
        size = list(tensor.shape)
    if -1 in size:
        rest = -torch.Size(size).numel()
        size[size.index(-1)] = tensor.numel() // rest if rest else 0
    if torch.Size(size) != tensor.shape:
        raise NotImplementedError(
            f"{func} of a quantized weight from {tuple(tensor.shape)} to {tuple(size)}: only its own shape is possible; "
            f"call .dequantize() first"
        )
    return return_and_correct_aliasing(func, args, kwargs, each(tensor, lambda t: aten.alias.default(t)))


@implements_aten(aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple, kwargs: dict) -> bool:
    return all(func(t, *args[1:], **kwargs) for t in args[0].inner_tensors().values())


@implements_aten(aten._pin_memory.default)
def _pin_memory(func: Any, args: tuple, kwargs: dict) -> QTensor:
    return each(args[0], lambda t: func(t, *args[1:], **kwargs))


@implements_aten(aten.record_stream.default)
def _record_stream(func: Any, args: tuple, kwargs: dict) -> None:
    """The memory is that of the inner tensors: all of them wait for the stream."""
    for inner in args[0].inner_tensors().values():
        func(inner, *args[1:], **kwargs)


@implements_aten(aten.equal.default)
def _equal(func: Any, args: tuple, kwargs: dict) -> bool:
    """True for the same codes, scales, shifts and low-rank terms."""
    one, two = args
    if not isinstance(one, QTensor) or not isinstance(two, QTensor):
        raise NotImplementedError("equal() of a quantized and a float tensor: call .dequantize() first")
    if _layout(one) != _layout(two) or one.shape != two.shape:
        return False
    other = two.inner_tensors()
    return all(_same_bytes(inner, other[name]) for name, inner in one.inner_tensors().items())


def _same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    # float8 has no equal(); its bytes do, and byte for byte is what is meant.
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    if one.is_floating_point() and one.element_size() == 1:
        one, two = one.view(torch.uint8), two.view(torch.uint8)
    return torch.equal(one, two)
