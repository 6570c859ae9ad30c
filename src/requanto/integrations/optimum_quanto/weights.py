"""optimum-quanto's quantize_weight."""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.integrations.optimum_quanto.weight_bits import WeightQBitsTensor
from requanto.integrations.optimum_quanto.weight_bytes import WeightQBytesTensor

__all__ = ["WeightQBitsTensor", "WeightQBytesTensor", "quantize_weight"]


def quantize_weight(
    t: torch.Tensor,
    qtype: qtype,
    axis: int,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    group_size: int | None = None,
    activation_qtype: qtype | None = None,
    optimized: bool = True,
) -> WeightQBytesTensor | WeightQBitsTensor:
    """Quantizes a weight along an axis.

    Args:
        t: float tensor.
        qtype: type of the codes.
        axis: 0 or -1.
        scale: from an optimizer.
        shift: from an optimizer; required for fewer than 8 bits, not allowed for 8.
        group_size: number of weights that share a scale; for fewer than 8 bits only.
        activation_qtype: stored as an attribute of an 8-bit weight.
        optimized: no effect; accepted for compatibility.
    """
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 (first axis) or -1 (last axis), found {axis!r}")
    if qtype.bits == 8:
        if shift is not None:
            raise ValueError("shift cannot be specified for 8-bit qtypes")
        if group_size is not None:
            raise ValueError("group_size cannot be specified for 8-bit qtypes")
        one = None if t.shape[axis] == 1 else axis
        return WeightQBytesTensor.quantize(t, qtype, one, scale, activation_qtype, optimized)
    if shift is None:
        raise ValueError("shift must be specified for qtypes lower than 8-bit")
    return WeightQBitsTensor.quantize(t, qtype, axis, group_size, scale, shift, optimized)
