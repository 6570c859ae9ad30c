"""ActivationQBytesTensor: Requanto's quantized activation with optimum-quanto's class name and base classes."""

from __future__ import annotations

from typing import Any

import torch

from requanto.dtypes.qtypes import qtype
from requanto.integrations.optimum_quanto.base import QBytesTensor, QTensor
from requanto.integrations.optimum_quanto.weight_base import Weight
from requanto.nn.activation import QActivation


class ActivationQBytesTensor(QActivation, QBytesTensor):
    """An activation of 8-bit codes with one scale."""

    equal = QTensor.equal

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, Weight) for kind in types):
            return NotImplemented  # Weight.__torch_function__ handles activations
        return super().__torch_function__(func, types, args, kwargs)


def quantize_activation(t: torch.Tensor, qtype: qtype, scale: torch.Tensor) -> ActivationQBytesTensor:
    """Quantizes ``t`` to 8 bits with a scalar scale."""
    if scale.numel() != 1:
        raise ValueError(f"activations have one scale for the tensor, found {scale.numel()} scales")
    return ActivationQBytesTensor.quantize(t, qtype, scale)
