"""The reference: dequantize, multiply, forget. Generic torch operators only, right on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from requanto.linear.activations import quantize_activations
from requanto.linear.table import Implementation, register
from requanto.qtensor import QTensor
from requanto.qtypes import qtype


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` in x's dtype. x: [rows, K] -> [rows, N]."""
    bias = None if bias is None else bias.to(x.dtype)
    with torch._C.DisableTorchFunctionSubclass():
        if activation is None:
            return F.linear(x, weight.dequantize(x.dtype), bias)
        codes, scale = quantize_activations(x, activation, input_scale)
        out = F.linear(codes.to(x.dtype), weight.dequantize(x.dtype)).float().mul_(scale).to(x.dtype)
        return out if bias is None else out.add_(bias)


register(
    Implementation(
        name="reference",
        run=run,
        supports=lambda problem: True,
        reason="dequantizes the weight for the call; right everywhere",
    )
)
