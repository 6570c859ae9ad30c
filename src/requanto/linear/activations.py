"""Quantizes activations to int8, with one scale per token or a static scale, in a few passes of torch operators.

Non-finite values: a row of x with a NaN gives a row of NaN, as in a float GEMM. So does a row with an infinite element if
scales are per token; with a static scale, infinity becomes the largest code, like every value out of range. A static scale
of zero gives codes of zero (the result is the bias), and a static scale that is not finite gives NaN.
"""

from __future__ import annotations

import math
from ctypes import c_float

import torch

from requanto.dtypes.float8 import rounded_to_float8
from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.tracing import is_tracing
from requanto.scales.blocks import round_blocks

#: Lower bound of a row's absolute maximum, so that a row of zeros has a positive scale.
TINY = 1e-30
#: Integer code of a row's largest value in 16 and in 32 bits; each byte of every code, taken as signed, is in -128 .. 127.
STEPS, STEPS_32 = 32512, 127 * 2**24
#: `TINY` for 32-bit codes: the reciprocal of their scale must fit into float32.
TINY_32 = 1e-28
#: Smallest scale whose reciprocal fits into float32.
SMALLEST_SCALE = 2.0**-127
#: 128 in each of the four bytes of an int32.
_FOUR_128S = 0x80808080 - 2**32
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
    kind = _INT_OF_SIZE[x.dtype.itemsize]
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


def nan_rows(x: torch.Tensor) -> torch.Tensor | None:
    """Mask of the rows that have a NaN, bool ``[rows, 1]``; None if no row has one.

    The sum of x is NaN if any element is, or if infinities cancel. So the usual case takes a single pass.
    """
    if not math.isnan(x.detach().sum().item()):
        return None
    return x.detach().isnan().any(1, keepdim=True)


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


def quantize_unsigned(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None, min_rows: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x as uint8 (int8 code + 128, as oneDNN expects) in a scratch buffer, and their scale.

    Codes of a row with a NaN are undefined. Its scale is NaN if scales are per token; with a static scale the caller has to
    check `nan_rows`.

    Args:
        min_rows: minimum number of rows of the result; rows beyond those of x are undefined.
    """
    scale = token_scale(x, kind, input_scale)
    wide = _float32_copy(x).mul_(_inverse(scale, input_scale))
    if input_scale is not None:
        wide.clamp_(kind.qmin, kind.qmax)
    return _to_uint8(wide, min_rows), scale


def single_scale(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None) -> float | None:
    """The scale as a float32 number if it is static or x has one row; None if there are several or it is not finite."""
    if input_scale is not None:
        if input_scale.numel() != 1:
            return None
        step = c_float(input_scale.item()).value
        return step if SMALLEST_SCALE <= abs(step) < math.inf else None
    return scale_of_row(x, kind.qmax) if x.shape[0] == 1 else None


def scale_of_row(x: torch.Tensor, qmax: float) -> float | None:
    """Scale of x with one row, rounded to float32; None if an element is not finite.

    One operator instead of six small ones, whose cost is their launch.
    """
    return _scale_of_row(x.detach(), qmax, TINY)


def _scale_of_row(row: torch.Tensor, steps: float, tiny: float) -> float | None:
    if not row.numel():
        return c_float(tiny / steps).value
    low, high = torch.aminmax(row)  # vectorized for a whole tensor, unlike the maximum norm
    largest = max(-low.item(), high.item())
    return c_float(max(largest, tiny) / steps).value if math.isfinite(largest) else None


def quantize_with_scale(x: torch.Tensor, kind: qtype, step: float) -> torch.Tensor:
    """Codes of x for one given scale as uint8 (int8 code + 128), in a scratch buffer."""
    wide = _float32_copy(x).mul_(c_float(1 / step).value).clamp_(kind.qmin, kind.qmax)
    return _to_uint8(wide, 1)


def _to_uint8(wide: torch.Tensor, min_rows: int) -> torch.Tensor:
    rows = wide.shape[0]
    codes = scratch_buffer((max(rows, min_rows), wide.shape[1]), torch.uint8, slot=5)
    codes[:rows].copy_(_round_to_int32(wide, 128))
    return codes


def _float32_copy(x: torch.Tensor) -> torch.Tensor:
    """x as float32 in a scratch buffer: page faults of a new tensor would cost more than all passes over it."""
    return scratch_buffer(tuple(x.shape), torch.float32, slot=4).copy_(x)


def _round_to_int32(wide: torch.Tensor, offset: int) -> torch.Tensor:
    """``round(wide) + offset`` in the lower 16 bits of an int32, in place, for values that fit into 16 bits.

    Adding 1.5 * 2^23 rounds a float32 to an integer and leaves this integer in its lowest bits: one pass instead of two for
    rounding and converting.
    """
    return wide.add_(1.5 * 2**23 + offset).view(torch.int32)


def split_16bit(x: torch.Tensor, min_rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x as 16-bit integers ``256 * high + low``: uint8 ``[2 * rows, K]`` (high + 128, then low + 128), and the scale.

    A row's largest value has code 32512, and the error of each element is at most half a scale. That is 3e-5 of the row's
    norm if its elements have similar magnitude, a hundredth of bfloat16's rounding error; elements much smaller than the
    largest one keep few bits, or none (`coarse_rows`). The codes are in a scratch buffer of at least ``min_rows`` rows.
    """
    scale = _finite_or_nan(row_absmax(x).div_(STEPS))
    return _halves(_float32_copy(x).div_(scale), min_rows), scale


def coarse_rows(x: torch.Tensor, halves: torch.Tensor) -> torch.Tensor | None:
    """Indices of the rows of x ``[rows, K]`` for which 16 bits are too few; None if there is no such row.

    In such a row, fewer than half of the nonzero elements keep at least 8 bits, bfloat16's precision. An element keeps 8
    bits if its 16-bit code is 128 or more, or below -128: its high byte is not 0.

    Args:
        halves: codes from `split_16bit`.
    """
    rows, length = x.shape
    # 1 where the high byte is not 0 (clamp and & are vectorized for bytes, a comparison is not).
    precise = torch.clamp(
        halves[:rows], 127, 129, out=scratch_buffer((rows, length), torch.uint8, slot=7)
    ).bitwise_and_(1)
    if length % 8 == 0:  # an int64 addition adds 8 bytes at once; at most 128 of them, so that no byte overflows
        precise = precise.view(torch.int64).view(rows, -1, math.gcd(length // 8, 128)).sum(-1).view(torch.uint8)
    counts = precise.view(rows, -1).sum(1)
    if 2 * int(counts.amin()) >= length:
        return None
    coarse = (2 * counts < torch.count_nonzero(x, dim=1)).nonzero().flatten()
    return coarse if len(coarse) else None


def split_32bit(x: torch.Tensor, min_rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x as 32-bit integers: uint8 ``[4 * rows, K]`` (each byte + 128, lowest byte first), and the scale.

    The error of an element is at most one scale, 5e-10 of the row's largest value; float32 sums are not more precise.
    """
    scale = _finite_or_nan(row_absmax(x).clamp_min_(TINY_32).div_(STEPS_32))
    return _quarters(_float32_copy(x).mul_(scale.reciprocal()), min_rows), scale


def split_row_32bit(x: torch.Tensor, min_rows: int) -> tuple[torch.Tensor, float] | None:
    """`split_32bit` for x with one row, with the scale as a number; None if an element is not finite."""
    wide = _float32_copy(x.detach())
    step = _scale_of_row(wide, STEPS_32, TINY_32)
    return None if step is None else (_quarters(wide.mul_(c_float(1 / step).value), min_rows), step)


def _halves(wide: torch.Tensor, min_rows: int) -> torch.Tensor:
    rows = wide.shape[0]
    bits = _round_to_int32(wide, 128 + 256 * 128)
    halves = scratch_buffer((max(2 * rows, min_rows), wide.shape[1]), torch.uint8, slot=6)
    halves[rows : 2 * rows].copy_(bits)
    halves[:rows].copy_(bits.bitwise_right_shift_(8))
    return halves


def _quarters(wide: torch.Tensor, min_rows: int) -> torch.Tensor:
    rows, length = wide.shape
    codes = scratch_buffer((rows, length), torch.int32, slot=7).copy_(wide).add_(_FOUR_128S)
    quarters = scratch_buffer((max(4 * rows, min_rows), length), torch.uint8, slot=6)
    quarters[: 4 * rows].view(4, rows, length).copy_(codes.view(torch.uint8).view(rows, length, 4).permute(2, 0, 1))
    return quarters
