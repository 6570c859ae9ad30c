"""Quantizes activations to int8, with one scale per token or a static scale, in a few passes of torch operators.

Non-finite values: a row of x with a NaN gives a row of NaN, as in a float GEMM. So does a row with an infinite element if
scales are per token; with a static scale, infinity becomes the largest code, like every value out of range. A static scale
of zero gives codes of zero (the result is the bias), and a static scale that is not finite gives NaN.
"""

from __future__ import annotations

import torch

from requanto.dtypes.float8 import rounded_to_float8
from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.tracing import is_tracing
from requanto.scales.blocks import round_blocks

#: Lower bound of a row's absolute maximum, so that a row of zeros has a positive scale.
TINY = 1e-30
#: Integer dtype by size in bytes.
_INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_absmax(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of each row, float32 ``[rows, 1]``; NaN for a row that has a NaN."""
    if not x.shape[1]:
        return torch.full((x.shape[0], 1), TINY, dtype=torch.float32, device=x.device)
    if x.device.type != "cpu":
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        return torch.maximum(high, -low).float().clamp_min_(TINY)
    # Without the sign bit, floats compare like their bits as integers, and NaN is the largest. On 16-bit integers this takes
    # half the time; aminmax along an axis is not vectorized and takes ten times as long.
    kind, x = _INT_OF_SIZE[x.dtype.itemsize], x.resolve_neg()
    real = type(x) is torch.Tensor and not is_tracing()  # a traced tensor has no memory
    own = scratch_buffer(tuple(x.shape), kind, slot=7) if real else None
    bits = torch.bitwise_and(x.view(kind), torch.iinfo(kind).max, out=own)
    return bits.amax(1, keepdim=True).view(x.dtype).float().clamp_min_(TINY)


def token_scale(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None) -> torch.Tensor:
    """Scale of each row, float32 ``[rows, 1]`` (``[1, 1]`` if static); NaN for a row with an element that is not finite."""
    if input_scale is not None:
        return input_scale.detach().float().reshape(-1, 1)
    return _finite_or_nan(row_absmax(x).div_(kind.qmax))


def _finite_or_nan(scale: torch.Tensor) -> torch.Tensor:
    """Replaces infinity by NaN, in place; an infinite scale would give codes of zero."""
    return scale.add_(scale, alpha=0)


def _inverse(scale: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
    """Reciprocal of the scale; 0, which gives codes of 0, for a static scale that is 0 or too small to invert."""
    inverse = scale.reciprocal()
    return inverse if input_scale is None else inverse.masked_fill_(inverse.isinf(), 0)


def quantize_activations(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes ``x`` ``[rows, K]`` symmetrically: codes as float32 (integers, or float8 values), and their scale.

    Args:
        kind: ``qint8`` or a float8 type.
        input_scale: a static scale with one element; None: absmax / qmax of each row.

    Raises:
        ValueError: x is not 2-dimensional, or ``kind`` does not have 8 bits.
    """
    if x.dim() != 2:
        raise ValueError(f"activations must have shape [rows, K] to be quantized, found shape {tuple(x.shape)}")
    if kind.bits != 8:
        raise ValueError(f"activations can be quantized to int8 or float8 per token, found {kind.name}")
    wide = x.float()
    scale = token_scale(wide, kind, input_scale)
    inverse = _inverse(scale, input_scale)
    codes = wide.mul(inverse) if wide is x else wide.mul_(inverse)
    if kind.is_floating_point:
        return rounded_to_float8(codes.clamp_(kind.qmin, kind.qmax), kind.dtype), scale
    codes.round_()
    return (codes if input_scale is None else codes.clamp_(kind.qmin, kind.qmax)), scale


def rounded_in_blocks(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None = None) -> torch.Tensor:
    """x ``[rows, K]`` rounded to NVFP4 or an MX type in blocks along K, in its own dtype (`requanto.scales.blocks`).

    No implementation multiplies such codes: x is rounded, then multiplied as floats.

    Raises:
        ValueError: a static scale was given.
    """
    if input_scale is not None:
        raise ValueError(
            f"{kind.name} activations have a scale for each block, computed on the fly; found a static input_scale"
        )
    rounded = round_blocks(x.detach(), kind)
    # Autograd is off in here, but not in torch.func's transforms.
    return x + (rounded - x).detach() if torch.is_grad_enabled() else rounded
