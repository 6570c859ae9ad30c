"""The reference: dequantize, multiply, forget. Generic torch operators only, right on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from requanto.linear.table import Implementation, register
from requanto.qtensor import QTensor


def run(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` in x's dtype. x: [rows, K] -> [rows, N]."""
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


register(
    Implementation(
        name="reference",
        run=run,
        supports=lambda problem: True,
        reason="dequantizes the weight for the call; right everywhere",
    )
)
