"""``weight.mul_(2)`` and ``weight.div_(2)``: by a power of two a quantized weight is multiplied exactly, through its scales.

Models do so to keep float16 activations in range (RWKV halves weights of deep layers for inference).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from requanto.tensor.aten import aten
from requanto.tensor.dispatch import implements_aten
from requanto.tensor.lowrank import moved_exponents, scale_rows
from requanto.tensor.qtensor import QTensor
from requanto.tensor.values import on_values


@implements_aten(aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.div_.Scalar)
def _scale_(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    weight, factor = args[0], _number(args[1])
    if not isinstance(weight, QTensor) or factor is None or kwargs:
        return on_values(func, args, kwargs)  # refuses to write into a quantized weight
    if func in (aten.div_.Tensor, aten.div_.Scalar) and factor:
        factor = 1 / factor
    if not _is_power_of_two(factor) or weight._storage.base is not None or not _exact(weight, factor):
        return on_values(func, args, kwargs)
    rows = dict(weight.inner_tensors())["scale"].shape[:-1]
    scale_rows(weight, torch.full(rows, factor, dtype=torch.float32, device=weight.device))
    return weight


def _number(value: Any) -> float | None:
    """The number by which a whole tensor is multiplied; None for anything else."""
    if isinstance(value, torch.Tensor):
        plain = (
            type(value) is torch.Tensor and value.dim() == 0 and not value.is_complex() and value.device.type == "cpu"
        )
        return float(value) if plain else None
    return float(value) if isinstance(value, int | float) else None


def _is_power_of_two(value: float) -> bool:
    return value > 0 and math.isfinite(value) and math.frexp(value)[0] == 0.5


def _exact(weight: QTensor, factor: float) -> bool:
    """Whether no scale overflows, and none loses digits below the smallest normal number."""
    parts = dict(weight.inner_tensors())
    names: tuple[str, ...] = ("row_scale", "row_shift") if "row_scale" in parts else ("scale", "shift")
    names = tuple(name for name in names if name not in weight._spec.code_bits)
    if weight._spec.scale_code_bits is not None and "row_scale" not in parts:
        try:
            moved_exponents(weight, torch.full((1,), factor, device=weight.device, dtype=torch.float32))
        except NotImplementedError:
            return False
        names = ()
    values = [parts[name] for name in (*names, "up") if parts.get(name) is not None]
    scaled = [(value.float() * factor).to(value.dtype).float() / factor for value in values]
    return all(torch.equal(new, value.float()) for new, value in zip(scaled, values))
