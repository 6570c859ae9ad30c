"""The GPU's part of the table: `requanto_kernels` on CUDA, ROCm and XPU. Conditions: `triton_rules`.

In order of preference:

    triton-scaled-mm    int8 x int8 and float8 x float8: activations quantized per token, one product of 8-bit codes
    triton-w4a8         integer weights below 8 bits, or in groups, with int8 activations
    triton-rounded      other pairs: activations rounded to their codes, then one of the two below
    triton-dequantize   many rows: the weight rebuilt once, then the vendor's library
    triton-wq           everything else: the codes are decoded inside the product; forward, transposed, fused experts
    gpu-dequantize      types that the kernels do not read: dequantized in parts by torch, then the vendor's library

Without Triton, or with one that finds no driver, none of them applies and the reference runs; one log line says so.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F

from requanto.dtypes.qtypes import qtype
from requanto.linear import reference
from requanto.linear.activations import quantize_activations
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu.layout import codes_of
from requanto.linear.registry import Implementation, choose, problem_of, register
from requanto.tensor.qtensor import QTensor

#: Most bytes of a rebuilt weight at a time: every layer of a 70B model fits, a large vocabulary is done in parts.
SCRATCH_BYTES = 512 * 2**20
#: Most weights that torch's operators dequantize at a time; each takes some 12 bytes on the way.
PART = 16 * 2**20

logger = logging.getLogger(__name__)


def run_wq(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight-only: decoded in registers."""
    from requanto_kernels import wq_gemm, wq_gemm_dx

    codes, layout = codes_of(weight)
    common = {"bits": weight.qtype.bits, "group_size": weight.group_size, "layout": layout}
    if not weight.transposed:
        return wq_gemm(x, codes, weight.scale, weight.shift, bias, **common)
    # The product with a weight that is seen transposed is the other one's gradient.
    out = wq_gemm_dx(x, codes, weight.scale, weight.shift, k=weight.row_length, **common)
    return out if bias is None else out.add_(bias)


def run_grouped(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """Fused experts; the routing stays on the device. offsets: end rows, ``[E]``; rows past the last one give zeros."""
    from requanto_kernels import wq_gemm_dx, wq_gemm_grouped

    codes, layout = codes_of(weight)
    bounds = F.pad(offsets.to(x.device), (1, 0))
    out = x.new_zeros(x.shape[0], weight.shape[1])
    if not x.shape[0]:
        return out
    common = {"bits": weight.qtype.bits, "group_size": weight.group_size, "layout": layout, "out": out}
    if weight.transposed:
        return wq_gemm_dx(x, codes, weight.scale, weight.shift, k=weight.row_length, offsets=bounds, **common)
    return wq_gemm_grouped(x, bounds, codes, weight.scale, weight.shift, **common)


def run_dequantized(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rebuilds the weight in x's dtype, in parts of at most `SCRATCH_BYTES`, each multiplied by the vendor's library."""
    stored, length = weight.lead.numel(), weight.row_length
    step = max(1, SCRATCH_BYTES // (length * x.dtype.itemsize))
    bias = None if bias is None else bias.to(x.dtype)
    if step >= stored:
        whole = _rebuilt(weight, 0, stored, x.dtype)
        return F.linear(x, whole.t() if weight.transposed else whole, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    total = None
    for start in range(0, stored, step):
        stop = min(start + step, stored)
        part = _rebuilt(weight, start, stop, x.dtype)
        if not weight.transposed:
            torch.mm(x, part.t(), out=out[:, start:stop])
            continue
        # Parts of the sum, added in float32 so that they are rounded once.
        product = (x[:, start:stop] @ part).float()
        total = product if total is None else total.add_(product)
    out = out if total is None else total.to(x.dtype)
    return out if bias is None else out.add_(bias)


def _rebuilt(weight: QTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start .. stop`` of the stored form as floats."""
    from requanto_kernels import wq_dequant

    codes, layout = codes_of(weight)
    shift = None if weight.shift is None else weight.shift[start:stop]
    return wq_dequant(
        codes[start:stop],
        weight.scale[start:stop],
        shift,
        bits=weight.qtype.bits,
        k=weight.row_length,
        group_size=weight.group_size,
        layout=layout,
        dtype=dtype,
    )


def run_scaled_mm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Activations and weight as 8-bit codes. GPUs without float8 multiply the decoded values inside the same kernel."""
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
    """int8 activations times integer codes of 2, 4 or 8 bits, whose groups are summed as integers."""
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
    """The values that the activations' codes stand for, times the weight as if activations were not quantized."""
    assert activation is not None
    codes, steps = quantized(x, activation, input_scale)
    x = codes.float().mul_(steps.unsqueeze(-1)).to(x.dtype)
    return choose(problem_of(weight, x.dtype, x.shape[0])).implementation.run(x, weight, bias)


def run_undecoded(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of the weight, at most `PART` weights at a time, dequantized by torch's operators; says so once a type."""
    _say_undecoded(weight.qtype.name, x.device.type)
    stored, length = weight.lead.numel(), weight.row_length
    step = max(1, PART // max(1, length))
    if weight.transposed or step >= stored:
        return reference.run(x, weight, bias, activation, input_scale)
    parts = []
    for start in range(0, stored, step):
        rows = slice(start, min(start + step, stored))
        part_bias = None if bias is None else bias[rows]
        parts.append(reference.run(x, weight[rows], part_bias, activation, input_scale))
    return torch.cat(parts, dim=1)


@functools.cache
def _say_undecoded(name: str, device: str) -> None:
    logger.warning(
        "%s weights have no kernel on %s devices: each product dequantizes them first. int4, int2, int8 and float8 have.",
        name.removeprefix("q"),
        device,
    )


def quantized(
    x: torch.Tensor, kind: qtype, input_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x, and their float32 scales: one a row, or the static one."""
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
        reason="activations quantized per token, one product of 8-bit codes",
    ),
    Implementation(
        name="triton-w4a8",
        run=run_w4a8,
        supports=rules.int8_activations,
        reason="int8 activations times integer codes, exact sums inside each group",
    ),
    Implementation(
        name="triton-rounded",
        run=run_rounded,
        supports=rules.rounded_activations,
        reason="no product of these two code types: activations are rounded to their codes, then weight-only",
    ),
    Implementation(
        name="triton-dequantize",
        run=run_dequantized,
        supports=rules.dequantized,
        reason="many rows: the weight is rebuilt once, then the vendor's library (threshold not measured)",
    ),
    Implementation(
        name="triton-wq",
        run=run_wq,
        supports=rules.weight_only,
        reason="codes are decoded inside the product",
        run_grouped=run_grouped,
    ),
    Implementation(
        name="gpu-dequantize",
        run=run_undecoded,
        supports=rules.undecoded,
        reason="no kernel reads codes of this type: dequantized by torch, then the vendor's library",
        run_grouped=reference.run_grouped,
    ),
):
    register(_implementation, before="reference")
