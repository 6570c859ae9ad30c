"""Convolutions with a quantized weight: dequantized, then torch's own operator.

A convolution reads each weight once per output pixel, so its arithmetic is left to torch, in x's dtype (autocast's, inside
autocast) whatever dtype the weight is seen as. On a CPU the float weight lies in this thread's buffer, some output channels
at a time: fresh pages for all of it would take longer than a small image's convolution.

With few output pixels it is the weight that takes the time. Then the image's patches become rows of x, and the convolution
is a product with the packed weight (`requanto.linear.api.packed_product`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from requanto.linear.api import packed_product
from requanto.linear.cpu import onednn_bf16
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.dequantize import rows_rounded_once
from requanto.linear.prepack import layout_to_be
from requanto.runtime.buffers import workspace
from requanto.runtime.settings import settings
from requanto.runtime.tracing import has_numbers, wants_gradient
from requanto.tensor.qtensor import QTensor

#: Part of the workspace that the float weight may take: oneDNN is the slower the fewer output channels it is given.
PART = 2
#: Output pixels, of all images together, up to which a product of patches is faster, and not more than one for so many
#: weights; and with kernels of one pixel, whose patches are the image (benchmarks/results/cpu_paths.json).
PIXELS, WEIGHTS_A_PIXEL, PIXELS_ONE_BY_ONE = 128, 10**5, 256
#: Those whose weight begins with the output channels.
_FORWARD = (F.conv1d, F.conv2d, F.conv3d)


def convolution(
    function: Callable[..., torch.Tensor], x: torch.Tensor, weight: QTensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """``function(x, weight, *args, **kwargs)`` of a quantized weight.

    Args:
        function: ``F.conv1d`` to ``F.conv3d``, ``F.conv_transpose1d`` to ``F.conv_transpose3d``.
        args, kwargs: those of ``function``: bias, stride ...

    Returns:
        As ``function``, in x's dtype (autocast's, inside autocast).

    Raises:
        RuntimeError: x is no float tensor: the weight would be cut down to its dtype. And whatever ``function`` raises.
    """
    if not x.is_floating_point():
        raise RuntimeError(f"{function.__name__}: expected a float tensor beside a quantized weight, found {x.dtype}")
    bias, *rest = args or (kwargs.pop("bias", None),)
    usual = weight.rotation is None and weight.up is None and weight.axis == 0 and not weight.transposed
    asked = wants_gradient(x, bias)
    # A derivative keeps the weight, and a trace has no buffers.
    if x.device.type != "cpu" or weight.device.type != "cpu" or asked or not usual or not has_numbers():
        return function(x, weight.dequantize(x.dtype), bias, *rest, **kwargs)
    x = as_autocast(x)  # torch would narrow x and all of the weight
    if bias is not None and (as_autocast(bias).dtype != x.dtype or not _is_bias(bias, function, weight)):
        # torch raises. The ways below would broadcast such a bias, or cut it.
        return function(x, weight.dequantize(x.dtype), bias, *rest, **kwargs)
    out = _of_patches(x, weight, bias, *rest, **kwargs) if function is F.conv2d else None
    if out is not None:
        return out
    out_channels, row_bytes = weight.shape[0], weight.row_length * x.dtype.itemsize
    groups = kwargs.get("groups", rest[3] if len(rest) > 3 else 1)
    step = max(1, settings.workspace_bytes // PART // max(1, row_bytes))
    if function not in _FORWARD or groups != 1 or out_channels <= step:
        return function(x, _values(weight, 0, out_channels, x.dtype), bias, *rest, **kwargs)
    step = -(-out_channels // -(-out_channels // step))
    parts = []
    for start in range(0, out_channels, step):
        stop = min(start + step, out_channels)
        own = None if bias is None else bias[start:stop]
        parts.append(function(x, _values(weight, start, stop, x.dtype), own, *rest, **kwargs))
    return torch.cat(parts, x.dim() - weight.dim() + 1)


def _of_patches(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    """`F.conv2d` as a product of patches with the packed weight; None where that does not pay, or cannot be."""
    if x.dtype != torch.bfloat16 or x.dim() != 4 or groups != 1 or x.shape[1] != weight.shape[1]:
        return None
    if weight.activation is not None or isinstance(padding, str) or not cache.wanted(calls.NIBBLES):
        return None
    kernel = weight.shape[2:]
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    if any(len(sizes) != 2 for sizes in (stride, padding, dilation)) or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None  # torch raises
    sizes = zip(x.shape[2:], padding, dilation, kernel, stride)
    height, width = ((size + 2 * pad - gap * (taps - 1) - 1) // step + 1 for size, pad, gap, taps, step in sizes)
    pixels = x.shape[0] * height * width
    itself = kernel == (1, 1) and stride == (1, 1) and padding == (0, 0)
    most = PIXELS_ONE_BY_ONE if itself else min(PIXELS, weight.numel() // WEIGHTS_A_PIXEL)
    if height < 1 or width < 1 or not 0 < pixels <= most:
        return None
    if not onednn_bf16.fits(*weight.matrix_shape) or layout_to_be(weight, x.dtype) == "plain":
        return None
    patches = x.flatten(2) if itself else F.unfold(x, kernel, dilation, padding, stride)
    rows = patches.transpose(1, 2).contiguous().view(pixels, -1)
    out = packed_product(rows, weight, bias)
    if out is None:
        return None
    return out.view(len(x), height * width, -1).transpose(1, 2).contiguous().view(len(x), -1, height, width)


def as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as torch.autocast hands it to an operator on its list: float64 and integers stay as they are."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _is_bias(bias: torch.Tensor, function: Callable[..., torch.Tensor], weight: QTensor) -> bool:
    """True for one number for each output channel; those of a transposed convolution are left to torch."""
    return function not in _FORWARD or bias.shape == weight.shape[:1]


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * 2 if len(sizes) == 1 else sizes


def _values(weight: QTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the weight in this thread's buffer; in memory of their own where that is too small for them."""
    shape = (stop - start, weight.row_length)
    if shape[0] * shape[1] * dtype.itemsize <= settings.workspace_bytes // PART:
        out = workspace(shape, dtype)
    else:
        out = torch.empty(shape, dtype=dtype, device=weight.device)
    return rows_rounded_once(weight, start, stop, out).view(stop - start, *weight.shape[1:])
