"""Convolutions with a quantized weight on a GPU: a kernel dequantizes the weight, the vendor's library convolves.

At most `SCRATCH_BYTES` of the weight are dequantized at a time: whole groups of channels, or a part of one group's. The
backward dequantizes again: autograd keeps the codes, which exist anyway, and of the image only its shape.

    convolution             rows of the weight [N, C / groups, ...] are output channels: parts of a group are concatenated
    transposed convolution  rows of the weight [C, N / groups, ...] are input channels: parts of a group are added in float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from requanto.linear.gpu.dequantize import SCRATCH_BYTES, dequantized_rows
from requanto.runtime.tracing import needs_gradient, without_autocast
from requanto.tensor.qtensor import QTensor
from requanto.tensor.storage import WeightStorage

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
#: Arguments after the weight, in the order of torch's functions.
_NAMES = ("bias", "stride", "padding", "dilation", "groups")
_NAMES_TRANSPOSED = ("bias", "stride", "padding", "output_padding", "groups", "dilation")


def run(
    function: Callable[..., torch.Tensor], x: torch.Tensor, weight: QTensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """``function(x, weight, *args, **kwargs)``, see `requanto.linear.convolution`; for weights that a kernel dequantizes."""
    names = _NAMES_TRANSPOSED if function in _TRANSPOSED else _NAMES
    if len(args) > len(names) or kwargs.keys() & set(names[: len(args)]):
        return function(x, weight.dequantize(x.dtype), *args, **kwargs)  # torch names what is wrong
    how = {**dict(zip(names, args)), **kwargs}
    bias = how.pop("bias", None)
    with torch._C.DisableTorchFunctionSubclass():
        if needs_gradient(x, bias):
            return _Convolution.apply(x, bias, weight, function, how)
        return _forward(function, x, weight, bias, how)


class _Piece(NamedTuple):
    """A part of the weight: its rows, the channels of x and of the result that they belong to, and how many groups."""

    rows: slice
    inner: slice
    outer: slice
    groups: int


def _pieces(
    function: Any, x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, how: dict[str, Any]
) -> list[_Piece]:
    """Parts of at most `SCRATCH_BYTES` in x's dtype, in the order of their rows."""
    rows, others, groups = weight.shape[0], weight.shape[1], how.get("groups", 1)
    step = max(1, SCRATCH_BYTES // (weight.numel() // rows * x.dtype.itemsize))
    if step >= rows or not _fit(function, x, weight, bias, groups):
        return [_Piece(slice(0, rows), slice(None), slice(None), groups)]
    per_group, start, found = rows // groups, 0, []
    while start < rows:
        group = start // per_group
        stop = min(start + step, (group + 1) * per_group)
        if step >= per_group:
            stop = min(rows, start + step // per_group * per_group)
        own, last = slice(start, stop), -(-stop // per_group)
        shared = slice(group * others, last * others)
        inner, outer = (own, shared) if function in _TRANSPOSED else (shared, own)
        found.append(_Piece(own, inner, outer, last - group))
        start = stop
    return found


def _fit(function: Any, x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, groups: Any) -> bool:
    """Whether x, weight and bias fit together, so that parts of them do; if not, torch is to name the error."""
    rows = weight.shape[0]
    if weight.axis != 0 or weight.transposed or type(groups) is not int or groups < 1 or rows % groups:
        return False
    inner, outer = weight.shape[1] * groups, rows
    if function in _TRANSPOSED:
        inner, outer = outer, inner
    batched = x.dim() - weight.dim() + 1
    return batched in (0, 1) and x.shape[batched] == inner and (bias is None or bias.shape == (outer,))


def _values(weight: QTensor, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """These channels of the weight, dequantized."""
    if rows.stop - rows.start == weight.shape[0]:
        return weight.dequantize(dtype)
    with without_autocast(weight.device):
        return dequantized_rows(weight, rows.start, rows.stop, dtype).view(-1, *weight.shape[1:])


def _joined(parts: list[tuple[slice, torch.Tensor]], dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Results along the axis of channels: those of the same channels are added in float32, the others concatenated."""
    if len(parts) == 1:
        return parts[0][1]
    found: list[tuple[slice, torch.Tensor]] = []
    for place, part in parts:
        if found and found[-1][0] == place:
            found[-1] = place, found[-1][1].float().add_(part)
        else:
            found.append((place, part))
    return torch.cat([part.to(dtype) for _, part in found], dim)


def _forward(
    function: Any, x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, how: dict[str, Any]
) -> torch.Tensor:
    pieces = _pieces(function, x, weight, bias, how)
    if len(pieces) == 1:
        return function(x, _values(weight, pieces[0].rows, x.dtype), bias, **how)
    dim, parts = x.dim() - weight.dim() + 1, []
    for piece in pieces:
        part = _channels(x, piece.inner, dim)
        own = {**how, "groups": piece.groups}
        # The bias of a sum comes with its first part.
        first = not parts or parts[-1][0] != piece.outer
        own_bias = bias[piece.outer] if bias is not None and first else None
        parts.append((piece.outer, function(part, _values(weight, piece.rows, x.dtype), own_bias, **own)))
    return _joined(parts, dim, x.dtype)


def _channels(x: torch.Tensor, place: slice, dim: int) -> torch.Tensor:
    return x[(slice(None),) * dim + (place,)]


class _Convolution(torch.autograd.Function):
    """The convolution with a gradient for x and the bias."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, weight: QTensor, function: Any, how: dict[str, Any]
    ) -> torch.Tensor:
        ctx.spec, (ctx.layout, parts) = weight._spec, weight._storage.state
        ctx.names = list(parts)
        ctx.save_for_backward(*parts.values())  # autograd raises if they are overwritten meanwhile
        ctx.function, ctx.how = function, how
        ctx.like, ctx.device = torch.empty_like(x, device="meta"), x.device
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        out = _forward(function, x, weight, bias, how)
        return out if out._base is None else out.clone()  # autograd forbids in-place changes of a view made here

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        grad_x = grad_bias = None
        axes = ctx.like.dim() - len(ctx.spec.shape) + 1  # of the channels
        if ctx.needs_input_grad[0]:
            weight = QTensor._over(ctx.spec, WeightStorage(dict(zip(ctx.names, ctx.saved_tensors)), ctx.layout))
            with torch._C.DisableTorchFunctionSubclass():
                grad_x = _gradient(ctx, grad, weight, axes)
        if ctx.bias is not None and ctx.needs_input_grad[1]:
            grad_bias = grad.sum([i for i in range(grad.dim()) if i != axes]).to(ctx.bias[1]).view(ctx.bias[0])
        return grad_x, grad_bias, None, None, None


def _gradient(ctx: Any, grad: torch.Tensor, weight: QTensor, dim: int) -> torch.Tensor:
    """The gradient for x: x itself is not read, so a new tensor stands for it."""
    like = torch.empty_like(ctx.like, device=ctx.device)
    parts = []
    for piece in _pieces(ctx.function, like, weight, None, ctx.how):
        values, how = _values(weight, piece.rows, like.dtype), {**ctx.how, "groups": piece.groups}
        own, own_grad = _channels(like, piece.inner, dim), _channels(grad, piece.outer, dim)
        parts.append((piece.inner, _input_gradient(ctx.function, own, values, own_grad, how)))
    return _joined(parts, dim, like.dtype)


def _input_gradient(
    function: Any, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, how: dict[str, Any]
) -> torch.Tensor:
    """The gradient of one call of ``function`` for x, whose values are not read."""
    if x.dim() < weight.dim():  # without a batch
        return _input_gradient(function, x.unsqueeze(0), weight, grad.unsqueeze(0), how).squeeze(0)
    count = weight.dim() - 2
    stride, dilation = _sizes(how.get("stride", 1), count), _sizes(how.get("dilation", 1), count)
    padding, before, size = how.get("padding", 0), [0] * count, list(x.shape[2:])
    if padding == "same":  # torch pads a zero more at the end of an axis where the kernel is even
        total = [step * (taps - 1) for step, taps in zip(dilation, weight.shape[2:])]
        before = [one // 2 for one in total]
        x = x.new_empty([*x.shape[:2], *(one + more for one, more in zip(size, total))])
    padding = [0] * count if isinstance(padding, str) else _sizes(padding, count)
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, function in _TRANSPOSED,
        _sizes(how.get("output_padding", 0), count), how.get("groups", 1), [True, False, False],
    )[0]  # fmt: skip
    for axis, (start, length) in enumerate(zip(before, size)):
        found = found.narrow(axis + 2, start, length)
    return found


def _sizes(size: int | tuple[int, ...], count: int) -> list[int]:
    found = [size] if isinstance(size, int) else list(size)
    return found * count if len(found) == 1 else found
