"""Activations -> int8, per token or under a given scale: a handful of passes over x, in torch operators."""

from __future__ import annotations

import math
from ctypes import c_float

import torch

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import workspace
from requanto.runtime.tracing import is_tracing

#: Smallest row maximum that is divided by: a row of zeros has codes of zero.
TINY = 1e-30
#: Steps of a 16-bit scale up to a row's largest value.
STEPS = 32512


def row_absmax(x: torch.Tensor) -> torch.Tensor:
    """float32 ``[rows, 1]``: the largest absolute value of each row; NaN for a row with one."""
    if x.device.type != "cpu":
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        return torch.maximum(high, -low).float().clamp_min_(TINY)
    # Without their sign, floats are ordered as their bits are, NaN above all; integers of 16 bits take half the time, and
    # aminmax along an axis, which is not vectorized, ten times as long.
    kind = torch.int32 if x.dtype == torch.float32 else torch.int16
    real = type(x) is torch.Tensor and not is_tracing()  # a tensor that a compiler traces has no memory
    own = workspace(tuple(x.shape), kind, slot=7) if real else None
    bits = torch.bitwise_and(x.view(kind), torch.iinfo(kind).max, out=own)
    return bits.amax(1, keepdim=True).view(x.dtype).float().clamp_min_(TINY)


def token_scale(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None) -> torch.Tensor:
    """float32 ``[rows, 1]`` (or ``[1, 1]`` for a static scale)."""
    if input_scale is not None:
        return input_scale.detach().float().reshape(-1, 1)
    return row_absmax(x).div_(kind.qmax)


def quantize_activations(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric codes of ``x`` ``[rows, K]`` as float32 integers (float8: values), and their scale.

    Args:
        kind: ``qint8`` or a float8 type.
        input_scale: a static scale, one number; None: each row's own, absmax / qmax.

    Raises:
        ValueError: activations are quantized to 8 bits only.
    """
    if kind.bits != 8:
        raise ValueError(f"activations are quantized to int8 or float8, found {kind.name}")
    wide = x.float()
    scale = token_scale(wide, kind, input_scale)
    codes = wide.mul(scale.reciprocal()) if wide is x else wide.mul_(scale.reciprocal())
    if kind.is_floating_point:
        return codes.clamp_(kind.qmin, kind.qmax).to(kind.dtype).float(), scale
    codes.round_()
    return (codes if input_scale is None else codes.clamp_(kind.qmin, kind.qmax)), scale


def quantize_unsigned(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None, least: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes + 128 as uint8, as oneDNN takes them, in this thread's buffer; and their scale.

    Args:
        least: rows of the codes; where x has fewer, the last ones are of no meaning.
    """
    scale = token_scale(x, kind, input_scale)
    wide = _wide(x).mul_(scale.reciprocal())
    if input_scale is not None:
        wide.clamp_(kind.qmin, kind.qmax)
    return _bytes(wide, least), scale


def single_scale(x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None) -> float | None:
    """The scale as one float32 number, where x has one: a static scale, or one row. None: several, or not finite."""
    if input_scale is not None:
        step = input_scale.detach().float()
        # Zero has no reciprocal among Python's numbers; among torch's it has.
        return step.item() if step.numel() == 1 and bool(torch.isfinite(step.reciprocal())) else None
    return row_step(x, kind.qmax) if x.shape[0] == 1 else None


def row_step(x: torch.Tensor, qmax: float) -> float | None:
    """The scale of one row as a float32 number; None: the row has an element that is not finite.

    One operator in place of six small ones, whose start is all that they cost.
    """
    largest = torch.linalg.vector_norm(x.detach(), math.inf).item()
    return c_float(max(largest, TINY) / qmax).value if math.isfinite(largest) else None


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

    A row's largest value is 32512 steps of its scale: the product has an error of 3e-5 of its norm, a hundredth of
    bfloat16's own rounding. The codes stand in this thread's buffer, ``least`` rows of it if x has fewer.
    """
    scale = row_absmax(x).div_(STEPS)
    return _halves(_wide(x).mul_(scale.reciprocal()), least), scale


def split_by(x: torch.Tensor, step: float, least: int) -> torch.Tensor:
    """`split_16bit` under one scale."""
    return _halves(_wide(x).mul_(c_float(1 / step).value), least)


def _halves(wide: torch.Tensor, least: int) -> torch.Tensor:
    rows = wide.shape[0]
    bits = _integers(wide, 128 + 256 * 128)
    halves = workspace((max(2 * rows, least), wide.shape[1]), torch.uint8, slot=6)
    halves[rows : 2 * rows].copy_(bits)
    halves[:rows].copy_(bits.bitwise_right_shift_(8))
    return halves
