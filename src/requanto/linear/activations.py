"""Activations -> int8, per token or under a given scale: a handful of passes over x, in torch operators.

What is not finite: a row with a NaN has NaN for its result, as in a float product. A row with an infinite element too, where
rows have scales of their own; under a static scale infinity is the largest code, like all that is too large for it. A static
scale of zero stands for zeros (the result is the bias), one that is not finite for NaN.
"""

from __future__ import annotations

import math
from ctypes import c_float

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import workspace
from requanto.runtime.tracing import is_tracing

#: Smallest row maximum that is divided by: a row of zeros has codes of zero.
TINY = 1e-30
#: Steps of a 16-bit scale up to a row's largest value, and of a 32-bit one: all bytes of it are codes within -128 .. 127.
STEPS, STEPS_32 = 32512, 127 * 2**24
#: The same as `TINY` for 32-bit scales, whose reciprocal must be a float32 number.
TINY_32 = 1e-28
#: Smallest scale whose reciprocal is a float32 number.
SMALLEST = 2.0**-127
#: 128 in each of the four bytes of an int32.
_MIDDLES = 0x80808080 - 2**32
#: Integers as wide as floats of so many bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_absmax(x: torch.Tensor) -> torch.Tensor:
    """float32 ``[rows, 1]``: the largest absolute value of each row; NaN for a row with one."""
    if not x.shape[1]:
        return torch.full((x.shape[0], 1), TINY, dtype=torch.float32, device=x.device)
    if x.device.type != "cpu":
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        return torch.maximum(high, -low).float().clamp_min_(TINY)
    # Without their sign, floats are ordered as their bits are, NaN above all; integers of 16 bits take half the time, and
    # aminmax along an axis, which is not vectorized, ten times as long.
    kind = _BITS[x.dtype.itemsize]
    real = type(x) is torch.Tensor and not is_tracing()  # a tensor that a compiler traces has no memory
    own = workspace(tuple(x.shape), kind, slot=7) if real else None
    bits = torch.bitwise_and(x.view(kind), torch.iinfo(kind).max, out=own)
    return bits.amax(1, keepdim=True).view(x.dtype).float().clamp_min_(TINY)


def token_scale(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None) -> torch.Tensor:
    """float32 ``[rows, 1]`` (or ``[1, 1]`` for a static scale); NaN for a row with an element that is not finite."""
    if input_scale is not None:
        return input_scale.detach().float().reshape(-1, 1)
    return _finite_or_nan(row_absmax(x).div_(kind.qmax))


def _finite_or_nan(scale: torch.Tensor) -> torch.Tensor:
    """NaN for infinity, in place: the codes of a row with one would be those of zeros."""
    return scale.add_(scale, alpha=0)


def _inverse(scale: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
    """What x is multiplied with. A static scale may be 0, or too small for a reciprocal: codes are 0 then."""
    inverse = scale.reciprocal()
    return inverse if input_scale is None else inverse.masked_fill_(inverse.isinf(), 0)


def nan_rows(x: torch.Tensor) -> torch.Tensor | None:
    """bool ``[rows, 1]``: the rows with a NaN, which int8 codes cannot say; None: there is none.

    A sum is NaN where an element is (or where infinities cancel): one pass, and no more of them in the usual case.
    """
    if not math.isnan(x.detach().sum().item()):
        return None
    return x.detach().isnan().any(1, keepdim=True)


def quantize_activations(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes of ``x`` ``[rows, K]`` as float32 integers (float8: values), and their scale.

    Args:
        kind: ``qint8`` or a float8 type.
        input_scale: a static scale, one number; None: each row's own, absmax / qmax.

    Raises:
        ValueError: activations are quantized to 8 bits only, and row by row.
    """
    if x.dim() != 2:
        raise ValueError(f"activations are quantized as [rows, K], found shape {tuple(x.shape)}")
    if kind.bits != 8:
        raise ValueError(f"activations are quantized to int8 or float8, found {kind.name}")
    wide = x.float()
    scale = token_scale(wide, kind, input_scale)
    inverse = _inverse(scale, input_scale)
    codes = wide.mul(inverse) if wide is x else wide.mul_(inverse)
    if kind.is_floating_point:
        return codes.clamp_(kind.qmin, kind.qmax).to(kind.dtype).float(), scale
    codes.round_()
    return (codes if input_scale is None else codes.clamp_(kind.qmin, kind.qmax)), scale


def quantize_unsigned(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None, least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes + 128 as uint8, as oneDNN takes them, in this thread's buffer; and their scale.

    The codes of a row with a NaN are of no meaning; its own scale is NaN, of a static one the caller asks `nan_rows`.

    Args:
        least: rows of the codes; where x has fewer, the last ones are of no meaning.
    """
    scale = token_scale(x, kind, input_scale)
    wide = _wide(x).mul_(_inverse(scale, input_scale))
    if input_scale is not None:
        wide.clamp_(kind.qmin, kind.qmax)
    return _bytes(wide, least), scale


def single_scale(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None) -> float | None:
    """The scale as one float32 number, where x has one: a static scale, or one row. None: several, or not finite."""
    if input_scale is not None:
        if input_scale.numel() != 1:
            return None
        step = c_float(input_scale.item()).value
        return step if SMALLEST <= abs(step) < math.inf else None
    return row_step(x, kind.qmax) if x.shape[0] == 1 else None


def row_step(x: torch.Tensor, qmax: float) -> float | None:
    """The scale of one row as a float32 number; None: the row has an element that is not finite.

    One operator in place of six small ones, whose start is all that they cost.
    """
    return _step(x.detach(), qmax, TINY)


def _step(row: torch.Tensor, steps: float, tiny: float) -> float | None:
    if not row.numel():
        return c_float(tiny / steps).value
    low, high = torch.aminmax(row)  # vectorized, over all of a tensor; the maximum norm is not
    largest = max(-low.item(), high.item())
    return c_float(max(largest, tiny) / steps).value if math.isfinite(largest) else None


def quantize_by(x: torch.Tensor, kind: qtype, step: float) -> torch.Tensor:
    """int8 codes of x under one scale + 128 as uint8, in this thread's buffer."""
    wide = _wide(x).mul_(c_float(1 / step).value).clamp_(kind.qmin, kind.qmax)
    return _bytes(wide, 1)


def _bytes(wide: torch.Tensor, least: int) -> torch.Tensor:
    rows = wide.shape[0]
    codes = workspace((max(rows, least), wide.shape[1]), torch.uint8, slot=5)
    codes[:rows].copy_(_integers(wide, 128))
    return codes


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, in this thread's buffer: a fresh copy would cost more in page faults than all passes over it."""
    return workspace(tuple(x.shape), torch.float32, slot=4).copy_(x)


def _integers(wide: torch.Tensor, offset: int) -> torch.Tensor:
    """round(x) + offset as int32, of which the lower 16 bits count, in place; of numbers that 16 bits hold.

    Added to 1.5 * 2^23, a float32 is rounded to an integer, and its lowest bits are that integer: one pass instead of
    rounding and converting.
    """
    return wide.add_(1.5 * 2**23 + offset).view(torch.int32)


def split_16bit(x: torch.Tensor, least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x as 16-bit integers ``256 * high + low``: uint8 ``[2 * rows, K]`` (high + 128, then low + 128), and the scale.

    A row's largest value is 32512 steps of its scale, and every element is off by half a step at most. That is 3e-5 of the
    row's norm where elements are alike, a hundredth of bfloat16's own rounding; elements much smaller than the largest one
    keep few bits, or none (`coarse_rows`). The codes stand in this thread's buffer, ``least`` rows of it if x has fewer.
    """
    scale = _finite_or_nan(row_absmax(x).div_(STEPS))
    return _halves(_wide(x).div_(scale), least), scale


def coarse_rows(x: torch.Tensor, halves: torch.Tensor) -> torch.Tensor | None:
    """Numbers of the rows of x ``[rows, K]`` that 16 bits are too few for; None: there is none.

    Those of whose elements, zeros left out, fewer than half keep 8 bits or more, as bfloat16 does: their 16-bit code is
    128 or more, or below -128, so that its high byte is not 0.

    Args:
        halves: of `split_16bit`.
    """
    rows, length = x.shape
    # 1 where the high byte is not 0. (clamp and & are vectorized, a comparison of bytes is not.)
    kept = torch.clamp(halves[:rows], 127, 129, out=workspace((rows, length), torch.uint8, slot=7)).bitwise_and_(1)
    if length % 8 == 0:  # eight sums at a time, each of no more than 128 ones, in the bytes of a word
        kept = kept.view(torch.int64).view(rows, -1, math.gcd(length // 8, 128)).sum(-1).view(torch.uint8)
    counts = kept.view(rows, -1).sum(1)
    if 2 * int(counts.amin()) >= length:
        return None
    coarse = (2 * counts < torch.count_nonzero(x, dim=1)).nonzero().flatten()
    return coarse if len(coarse) else None


def split_32bit(x: torch.Tensor, least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x as 32-bit integers: uint8 ``[4 * rows, K]``, the lowest byte + 128 first, and the scale.

    An element is off by one step at most, 5e-10 of the row's largest one: the sums' float32 has no more digits.
    """
    scale = _finite_or_nan(row_absmax(x).clamp_min_(TINY_32).div_(STEPS_32))
    return _quarters(_wide(x).mul_(scale.reciprocal()), least), scale


def split_row(x: torch.Tensor, least: int) -> tuple[torch.Tensor, float] | None:
    """`split_32bit` of one row, its scale as a number; None: it has an element that is not finite."""
    wide = _wide(x.detach())
    step = _step(wide, STEPS_32, TINY_32)
    return None if step is None else (_quarters(wide.mul_(c_float(1 / step).value), least), step)


def _halves(wide: torch.Tensor, least: int) -> torch.Tensor:
    rows = wide.shape[0]
    bits = _integers(wide, 128 + 256 * 128)
    halves = workspace((max(2 * rows, least), wide.shape[1]), torch.uint8, slot=6)
    halves[rows : 2 * rows].copy_(bits)
    halves[:rows].copy_(bits.bitwise_right_shift_(8))
    return halves


def _quarters(wide: torch.Tensor, least: int) -> torch.Tensor:
    rows, length = wide.shape
    codes = workspace((rows, length), torch.int32, slot=7).copy_(wide).add_(_MIDDLES)
    quarters = workspace((max(4 * rows, least), length), torch.uint8, slot=6)
    quarters[: 4 * rows].view(4, rows, length).copy_(codes.view(torch.uint8).view(rows, length, 4).permute(2, 0, 1))
    return quarters
