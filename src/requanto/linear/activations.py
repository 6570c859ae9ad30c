"""Activations -> int8, per token or under a given scale: a handful of passes over x, in torch operators."""

from __future__ import annotations

import torch

from requanto.qtypes import qtype
from requanto.workspace import workspace

#: Smallest row maximum that is divided by: a row of zeros has codes of zero.
TINY = 1e-30


def row_absmax(x: torch.Tensor) -> torch.Tensor:
    """float32 ``[rows, 1]``: the largest absolute value of each row; NaN for a row with one."""
    if x.device.type == "cpu":  # aminmax along an axis is not vectorized there: ten times these two passes in float32
        x = x.float()
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    else:
        low, high = torch.aminmax(x, dim=1, keepdim=True)
    return torch.maximum(high, -low).float().clamp_min_(TINY)


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
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes + 128 as uint8, as oneDNN takes them, in this thread's buffer; and their scale."""
    wide = _wide(x)
    scale = token_scale(wide, kind, input_scale)
    wide.mul_(scale.reciprocal()).round_()
    if input_scale is not None:
        wide.clamp_(kind.qmin, kind.qmax)
    codes = workspace(tuple(x.shape), torch.int8, slot=5).copy_(wide)
    # By way of int8, whose upper bit turned over is 128 more: torch converts floats to uint8 one at a time.
    return codes.view(torch.uint8).bitwise_xor_(128), scale


def _wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, in this thread's buffer: a fresh copy would cost more in page faults than all passes over it."""
    return workspace(tuple(x.shape), torch.float32, slot=4).copy_(x)


def split_16bit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x as 16-bit integers ``256 * high + low``: uint8 ``[2 * rows, K]`` (high + 128, then low + 128), and the scale.

    A row's largest value is 32512 steps of its scale: the product has an error of 3e-5 of its norm, a hundredth of
    bfloat16's own rounding. The codes stand in this thread's buffer.
    """
    rows, wide = x.shape[0], _wide(x)
    scale = row_absmax(wide).div_(32512)
    codes = workspace(tuple(x.shape), torch.int16, slot=5)
    codes.copy_(wide.mul_(scale.reciprocal()).round_().add_(128))
    halves = workspace((2 * rows, x.shape[1]), torch.uint8, slot=6)
    halves[rows:].copy_(codes)
    high = halves[:rows]
    high.copy_(codes.bitwise_right_shift_(8)).bitwise_xor_(128)
    return halves, scale
