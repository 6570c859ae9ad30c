"""The reference implementation: dequantize, then F.linear. Generic torch operators, correct on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from requanto.dtypes.qtypes import qtype
from requanto.linear.activations import quantize_activations, rounded_in_blocks
from requanto.linear.registry import Implementation, choose, problem_of, register
from requanto.tensor.qtensor import QTensor


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
        if activation is not None and activation.blocks is not None:
            x, activation = rounded_in_blocks(x, activation, input_scale), None
        if activation is None:
            return F.linear(x, _values(weight, x.dtype), bias)
        codes, scale = quantize_activations(x, activation, input_scale)
        out = F.linear(codes.to(x.dtype), _values(weight, x.dtype)).float().mul_(scale).to(x.dtype)
        return out if bias is None else out + bias


def _values(weight: QTensor, dtype: torch.dtype) -> torch.Tensor:
    values = weight.stored_values().to(dtype)
    return values.mT if weight.transposed else values


def run_grouped(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """One GEMM per expert, by the implementation that the registry selects; reads ``offsets`` on the host."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            one = weight[expert]
            run_expert = choose(problem_of(one, x.dtype, end - start)).implementation.run
            out[start:end] = run_expert(x[start:end], one, None)
        start = max(start, end)
    return out


register(
    Implementation(
        name="reference",
        run=run,
        run_grouped=run_grouped,
        supports=lambda problem: True,
        reason="dequantizes the weight in each call; works everywhere",
    )
)
