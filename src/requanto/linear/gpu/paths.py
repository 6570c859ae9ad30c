"""Registers the GPU implementations: `requanto_kernels` on CUDA, ROCm and XPU. Conditions: `requanto.linear.gpu.conditions`.

In order of preference, after those for activations of 8 bits (`requanto.linear.gpu.eight_bit`):

    triton-dequantize   many rows: dequantized by a kernel, then the vendor's library
    triton-wq           everything else: GEMM with fused dequantize; also transposed, and for fused experts
    gpu-dequantize      where no kernel runs: dequantized in parts by torch, then the vendor's library

Without Triton or its driver only the last of them runs; one line is logged.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from requanto.dtypes.codebooks import MINIFLOATS, minifloat
from requanto.dtypes.qtypes import qtype
from requanto.linear import reference
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu.layout import codes_of
from requanto.linear.registry import Implementation, register
from requanto.scales.codebook import values_of
from requanto.tensor.qtensor import QTensor

#: Most bytes of a weight that are dequantized at a time: every layer of a 70B model fits, a large output head does not.
SCRATCH_BYTES = 512 * 2**20
#: Most weights that torch's operators dequantize at a time; each takes about 12 bytes of temporary memory.
PART = 16 * 2**20


def run_wq(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight-only GEMM with fused dequantize."""
    from requanto_kernels import wq_gemm, wq_gemm_dx

    codes, common = _described(weight)
    if not weight.transposed:
        return wq_gemm(x, codes, weight.scale, weight.shift, bias, **common)
    # x @ W is the kernel for the gradient of x @ W.T.
    out = wq_gemm_dx(x, codes, weight.scale, weight.shift, k=weight.row_length, **common)
    return out if bias is None else out.add_(bias)


def run_grouped(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """GEMMs of fused experts; ``offsets``, the end rows ``[E]``, stay on the device. Rows after the last give zeros."""
    from requanto_kernels import wq_gemm_dx, wq_gemm_grouped

    codes, common = _described(weight)
    # Kernels write the rows between two bounds: none may be beyond the result, nor before the one before it.
    ends = offsets.to(x.device).clamp(0, x.shape[0]).cummax(0).values
    bounds = F.pad(ends.to(offsets.dtype), (1, 0))
    out = x.new_zeros(x.shape[0], weight.shape[1])
    if not x.shape[0]:
        return out
    if weight.transposed:
        return wq_gemm_dx(x, codes, weight.scale, weight.shift, k=weight.row_length, offsets=bounds, out=out, **common)
    return wq_gemm_grouped(x, bounds, codes, weight.scale, weight.shift, out=out, **common)


def run_dequantized(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantizes the weight in parts of at most `SCRATCH_BYTES`, each multiplied by the vendor's library."""
    stored, length = weight.lead.numel(), weight.row_length
    step = max(1, SCRATCH_BYTES // (length * x.dtype.itemsize))
    bias = None if bias is None else bias.to(x.dtype)
    if step >= stored:
        whole = _dequantized_rows(weight, 0, stored, x.dtype)
        return F.linear(x, whole.t() if weight.transposed else whole, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    total = None
    for start in range(0, stored, step):
        stop = min(start + step, stored)
        part = _dequantized_rows(weight, start, stop, x.dtype)
        if not weight.transposed:
            torch.mm(x, part.t(), out=out[:, start:stop])
            continue
        # Partial sums are accumulated in float32 and rounded once.
        partial = (x[:, start:stop] @ part).float()
        total = partial if total is None else total.add_(partial)
    out = out if total is None else total.to(x.dtype)
    return out if bias is None else out.add_(bias)


def _dequantized_rows(weight: QTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start .. stop`` of the stored matrix, dequantized by a kernel."""
    from requanto_kernels import wq_dequant

    codes, common = _described(weight)
    shift = None if weight.shift is None else weight.shift[start:stop]
    return wq_dequant(
        codes[start:stop], weight.scale[start:stop], shift, k=weight.row_length, dtype=dtype, **common
    )  # fmt: skip


def _described(weight: QTensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The codes, and what they are, as arguments of kernels."""
    kind = weight.qtype
    codes, layout = codes_of(weight)
    described = {"bits": kind.bits, "group_size": weight.group_size, "layout": layout}
    if kind.is_codebook:
        form = _small_float(kind)
        described |= {"small_float": form} if form else {"codebook": _values(weight, codes.device)}
    return codes, described


@functools.cache
def _small_float(kind: qtype) -> str:
    """The form of a codebook's values if they are those of small floats, ``"e2m1"``; else empty: kernels look them up."""
    forms = ((bits, e, m) for bits, e, m in MINIFLOATS if bits == kind.bits)
    return next((f"e{e}m{m}" for _, e, m in forms if minifloat(e, m) == kind.values), "")


def _values(weight: QTensor, device: torch.device) -> torch.Tensor:
    return _fixed_values(weight.qtype, device) if weight.codebook is None else weight.codebook


@functools.cache
def _fixed_values(kind: qtype, device: torch.device) -> torch.Tensor:
    """The values of a fixed codebook; kept for good, since captured graphs read them."""
    return values_of(kind, torch.empty(0, dtype=torch.uint8, device=device))


def run_without_kernel(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantizes rows of the weight, at most `PART` weights at a time, with torch's operators."""
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


for _implementation in (
    Implementation(
        name="triton-dequantize",
        run=run_dequantized,
        supports=rules.dequantized,
        reason="many rows: the weight is dequantized once, then the vendor's library (threshold not measured)",
    ),
    Implementation(
        name="triton-wq",
        run=run_wq,
        supports=rules.weight_only,
        reason="GEMM with fused dequantize",
        run_grouped=run_grouped,
    ),
    Implementation(
        name="gpu-dequantize",
        run=run_without_kernel,
        supports=rules.without_kernel,
        reason="no kernel runs here (no Triton, an older GPU, or float64): dequantized by torch, then the vendor's library",
        run_grouped=reference.run_grouped,
    ),
):
    register(_implementation, before="reference")
