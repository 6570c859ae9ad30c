"""Convolutions with a quantized weight: the weight is dequantized, then torch's operator runs.

A convolution uses each weight once per output pixel, so dequantization is a small part of its time. It runs in x's dtype
(autocast's, if enabled), whatever the weight's dtype is. On a CPU the weight is dequantized into a scratch buffer, a slice
of output channels at a time: page faults of a new tensor would take longer than the convolution of a small image. GPUs:
`requanto.linear.gpu.convolution`.

With few output pixels, reading the weight dominates. Then `F.unfold` turns the image into rows, and the convolution is a
GEMM with the prepacked weight (`requanto.linear.api.packed_gemm`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from requanto.linear.api import packed_gemm
from requanto.linear.cpu import library
from requanto.linear.cpu.dequantize import rows_rounded_once
from requanto.linear.cpu.library import FLOATS
from requanto.linear.gpu import convolution as gpu_convolution
from requanto.linear.gpu import dequantize as gpu_dequantize
from requanto.linear.prepack import expected_layout
from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.settings import settings
from requanto.runtime.tracing import needs_gradient, runs_eagerly
from requanto.tensor.qtensor import QTensor

#: The dequantized weight takes at most 1 / PART of ``workspace_bytes``. oneDNN is slower with fewer output channels.
PART = 2
#: The GEMM with patches is faster than dequantizing the weight up to so many output pixels of the whole batch, and up to one
#: pixel per `WEIGHTS_PER_PIXEL` weights. 1x1 kernels, which need no unfolding, have a bound of their own. The second numbers
#: are for x in bfloat16 on processors that multiply it, whose convolutions take half as long
#: (`python benchmarks/cpu_paths.py --convolutions`).
MAX_PIXELS, MAX_PIXELS_1X1, WEIGHTS_PER_PIXEL = (192, 96), (1024, 256), 10**4
#: Functions whose weight has the output channels as its first axis.
_FORWARD = (F.conv1d, F.conv2d, F.conv3d)


def convolution(
    function: Callable[..., torch.Tensor], x: torch.Tensor, weight: QTensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Computes ``function(x, weight, *args, **kwargs)`` with a quantized weight.

    Args:
        function: ``F.conv1d`` to ``F.conv3d``, ``F.conv_transpose1d`` to ``F.conv_transpose3d``.
        args, kwargs: further arguments of ``function``: bias, stride ...

    Returns:
        The result of ``function``, in x's dtype (autocast's, if enabled).

    Raises:
        RuntimeError: x is not a float tensor. Errors of ``function`` are passed on.
    """
    if not x.is_floating_point():
        raise RuntimeError(f"{function.__name__}: expected a float tensor for x, found {x.dtype}")
    if gpu_dequantize.by_kernel(weight):
        return gpu_convolution.run(function, as_autocast(x), weight, *args, **kwargs)
    bias, *rest = args or (kwargs.pop("bias", None),)
    plain = weight.rotation is None and weight.up is None and weight.order is None
    regular = plain and weight.axis == 0 and not weight.transposed
    needs_grad = needs_gradient(x, bias)
    # Autograd saves the dequantized weight, and traced code has no scratch buffers: both need a new tensor.
    if x.device.type != "cpu" or weight.device.type != "cpu" or needs_grad or not regular or not runs_eagerly():
        return function(x, weight.dequantize(x.dtype), bias, *rest, **kwargs)
    x = as_autocast(x)  # so that the weight is dequantized in this dtype, instead of converted by torch
    if bias is not None and (as_autocast(bias).dtype != x.dtype or not _is_bias(bias, function, weight)):
        # torch raises an error here; the code below would broadcast such a bias, or slice it.
        return function(x, weight.dequantize(x.dtype), bias, *rest, **kwargs)
    out = _conv2d_as_gemm(x, weight, bias, *rest, **kwargs) if function is F.conv2d else None
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


def _conv2d_as_gemm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> torch.Tensor | None:
    """`F.conv2d` as a GEMM of image patches with the prepacked weight; None if that is slower or not supported."""
    if x.dtype not in FLOATS or x.dim() != 4 or groups != 1 or x.shape[1] != weight.shape[1]:
        return None
    used = library.find()
    if weight.activation is not None or isinstance(padding, str) or used is None:
        return None
    kernel = weight.shape[2:]
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    if any(len(sizes) != 2 for sizes in (stride, padding, dilation)) or min(*stride, *dilation) < 1 or min(padding) < 0:
        return None  # invalid arguments: torch raises the error
    sizes = zip(x.shape[2:], padding, dilation, kernel, stride)
    height, width = ((size + 2 * pad - gap * (taps - 1) - 1) // step + 1 for size, pad, gap, taps, step in sizes)
    pixels = x.shape[0] * height * width
    pointwise = kernel == (1, 1) and stride == (1, 1) and padding == (0, 0)
    fast = x.dtype == torch.bfloat16 and used.has_bfloat16
    max_pixels = MAX_PIXELS_1X1[fast] if pointwise else min(MAX_PIXELS[fast], weight.numel() // WEIGHTS_PER_PIXEL)
    if height < 1 or width < 1 or not 0 < pixels <= max_pixels:
        return None
    if expected_layout(weight, x.dtype) == "plain":
        return None
    patches = x.flatten(2) if pointwise else F.unfold(x, kernel, dilation, padding, stride)
    rows = patches.transpose(1, 2).contiguous().view(pixels, -1)
    out = packed_gemm(rows, weight, bias)
    if out is None:
        return None
    return out.view(len(x), height * width, -1).transpose(1, 2).contiguous().view(len(x), -1, height, width)


def as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that torch.autocast would convert it to; float64 and integers are unchanged."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _is_bias(bias: torch.Tensor, function: Callable[..., torch.Tensor], weight: QTensor) -> bool:
    """True for a bias with one element per output channel, and for transposed convolutions, whose bias torch checks."""
    return function not in _FORWARD or bias.shape == weight.shape[:1]


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * 2 if len(sizes) == 1 else sizes


def _values(weight: QTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Dequantized output channels ``start .. stop``, in a scratch buffer if they fit, else in a new tensor."""
    shape = (stop - start, weight.row_length)
    if shape[0] * shape[1] * dtype.itemsize <= settings.workspace_bytes // PART:
        out = scratch_buffer(shape, dtype)
    else:
        out = torch.empty(shape, dtype=dtype, device=weight.device)
    return rows_rounded_once(weight, start, stop, out).view(stop - start, *weight.shape[1:])
