"""Registers the GPU implementations for activations that are quantized to 8 bits: int8 and float8.

In order of preference, before the weight-only ones (`requanto.linear.gpu.paths`):

    triton-scaled-mm    int8 x int8 and float8 x float8: activations quantized per token, one GEMM of 8-bit codes
    triton-w4a8         integer weights below 8 bits, or with groups, and int8 activations
    triton-rounded      other pairs of types: activations rounded to their codes, then weight-only
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.activations import quantize_activations
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import paths  # noqa: F401  (registered first: these are inserted before them)
from requanto.linear.gpu.layout import codes_of
from requanto.linear.registry import Implementation, choose, problem_of, register
from requanto.tensor.qtensor import QTensor


def run_scaled_mm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """GEMM of 8-bit codes; on GPUs without float8 instructions, the kernel converts float8 codes first."""
    from requanto_kernels import scaled_mm

    assert activation is not None
    codes, steps = quantized(x, activation, input_scale)
    return scaled_mm(codes, codes_of(weight)[0], steps, weight.scale, bias, out_dtype=x.dtype)


def run_w4a8(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """GEMM of int8 activations and integer codes, with integer sums within each group."""
    from requanto_kernels import w4a8_gemm

    assert activation is not None
    codes, layout = codes_of(weight)
    x_codes, steps = quantized(x, activation, input_scale)
    return w4a8_gemm(
        x_codes,
        steps.expand(x.shape[0]),
        codes,
        weight.scale,
        weight.shift,
        bias,
        bits=weight.qtype.bits,
        group_size=weight.group_size,
        layout=layout,
        out_dtype=x.dtype,
    )


def run_rounded(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantizes and dequantizes the activations, then runs the weight-only implementation."""
    assert activation is not None
    codes, steps = quantized(x, activation, input_scale)
    x = codes.float().mul_(steps.unsqueeze(-1)).to(x.dtype)
    return choose(problem_of(weight, x.dtype, x.shape[0])).implementation.run(x, weight, bias)


def quantized(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes x: codes, and float32 scales, one per row or the static one."""
    from requanto_kernels import quant_rows

    if input_scale is None:
        return quant_rows(x, kind.dtype)
    codes, scale = quantize_activations(x, kind, input_scale)
    return codes.to(kind.dtype), scale.reshape(-1)


for _implementation in (
    Implementation(
        name="triton-scaled-mm",
        run=run_scaled_mm,
        supports=rules.both_8_bit,
        reason="activations quantized per token, one GEMM of 8-bit codes",
    ),
    Implementation(
        name="triton-w4a8",
        run=run_w4a8,
        supports=rules.int8_activations,
        reason="int8 activations times integer codes, exact sums within each group",
    ),
    Implementation(
        name="triton-rounded",
        run=run_rounded,
        supports=rules.rounded_activations,
        reason="no GEMM of these two types of codes: activations are rounded to their codes, then weight-only",
    ),
):
    register(_implementation, before="triton-dequantize")
