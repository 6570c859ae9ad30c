"""Registers the GPU implementations: `requanto_kernels` on CUDA, ROCm and XPU. Conditions: `requanto.linear.gpu.conditions`.

In order of preference, after those for activations of 8 bits (`requanto.linear.gpu.eight_bit`):

    triton-dequantize   many rows: dequantized by a kernel, then the vendor's library
    triton-wq           everything else: GEMM with fused dequantize; also transposed, and for fused experts
    gpu-dequantize      where no kernel runs: dequantized in parts by torch, then the vendor's library

Without Triton or its driver only the last of them runs; one line is logged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from requanto.dtypes.qtypes import qtype
from requanto.linear import reference
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import dequantize
from requanto.linear.gpu.dequantize import SCRATCH_BYTES
from requanto.linear.gpu.layout import KernelParts, kernel_parts
from requanto.linear.gpu.plans import Run, recorded, with_bias_added
from requanto.linear.registry import Gemm, Implementation, Plan, cache_plan, register
from requanto.runtime.settings import registry_state
from requanto.runtime.tracing import runs_eagerly
from requanto.tensor.layout import PLAIN
from requanto.tensor.qtensor import QTensor

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
    from requanto_kernels import wq_gemm_dx

    parts = kernel_parts(weight, x.dtype)
    if not weight.transposed:
        return _gemm(x, parts, bias)
    # x @ W is the kernel for the gradient of x @ W.T.
    out = wq_gemm_dx(x, parts.codes, parts.scale, parts.shift, k=weight.row_length, **parts.how)
    return out if bias is None else out.add_(bias)


def _gemm(x: torch.Tensor, parts: KernelParts, bias: torch.Tensor | None) -> torch.Tensor:
    from requanto_kernels import wq_gemm

    return wq_gemm(x, parts.codes, parts.scale, parts.shift, bias, **parts.how)


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run_wq` for one shape of x."""
    return (
        recorded(_gemm, dtype)
        if not weight.transposed
        else with_bias_added(recorded(_gemm_dx(weight.row_length), dtype))
    )


def _gemm_dx(length: int) -> Run:
    def run(x: torch.Tensor, parts: KernelParts, bias: None) -> torch.Tensor:
        from requanto_kernels import wq_gemm_dx

        return wq_gemm_dx(x, parts.codes, parts.scale, parts.shift, k=length, **parts.how)

    return run


def run_grouped(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """GEMMs of fused experts; ``offsets``, the end rows ``[E]``, stay on the device. Rows after the last give zeros."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    if not x.shape[0]:
        return out
    offsets = offsets.to(x.device).contiguous()
    storage = weight._storage
    if storage.layout is PLAIN or not runs_eagerly():
        return _experts(weight.row_length, weight.transposed)(x, kernel_parts(weight, x.dtype), None, offsets, out)
    key = ("experts", x.shape, x.dtype, registry_state.version, weight.transposed)
    found = storage.plans.get(key)
    if found is None:
        gemm = recorded(_experts(weight.row_length, weight.transposed), x.dtype)
        found = cache_plan(storage, key, Plan(gemm, None, x.is_cpu), storage.version)
    return found.gemm(x, weight, None, offsets, out)  # type: ignore[call-arg]


def _experts(length: int, transposed: bool) -> Run:
    def run(x: torch.Tensor, parts: KernelParts, bias: None, offsets: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        from requanto_kernels import expert_bounds, wq_gemm_dx, wq_gemm_grouped

        bounds = expert_bounds(offsets, x.shape[0])
        tensors = (parts.codes, parts.scale, parts.shift)
        if transposed:
            return wq_gemm_dx(x, *tensors, k=length, offsets=bounds, out=out, **parts.how)
        return wq_gemm_grouped(x, bounds, *tensors, out=out, **parts.how)

    return run


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
        # Partial sums are accumulated in float32 (of float64 as they are) and rounded once.
        partial = (x[:, start:stop] @ part).to(torch.promote_types(x.dtype, torch.float32))
        total = partial if total is None else total.add_(partial)
    out = out if total is None else total.to(x.dtype)
    return out if bias is None else out.add_(bias)


def _dequantized_rows(weight: QTensor, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start .. stop`` of the stored matrix, dequantized by a kernel."""
    return _dequantized(kernel_parts(weight, dtype), slice(start, stop), weight.row_length, dtype)


def _dequantized(parts: KernelParts, rows: slice, length: int, dtype: torch.dtype) -> torch.Tensor:
    shift = None if parts.shift is None else parts.shift[rows]
    return dequantize.run(parts.codes[rows], parts.scale[rows], shift, length, dtype, parts.how)


def make_plan_dequantized(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run_dequantized` for one shape of x; None for a weight that is dequantized in several parts."""
    stored, length = weight.matrix_shape
    if stored * length * dtype.itemsize > SCRATCH_BYTES or dtype not in rules.FLOATS:
        return None
    transposed = weight.transposed
    recording = recorded(lambda x, parts, bias: _dequantized(parts, slice(0, stored), length, dtype), dtype)

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        whole = recording(None, weight, None)  # type: ignore[arg-type]
        return F.linear(x, whole.t() if transposed else whole, None if bias is None else bias.to(dtype))

    return gemm


def run_without_kernel(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantizes rows of the weight, at most `PART` weights at a time, with torch's operators where no kernel runs."""
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
        reason="many rows (threshold not measured) or float64: dequantized by a kernel, then the vendor's library",
        make_plan=make_plan_dequantized,
        plans_operators=True,
    ),
    Implementation(
        name="triton-wq",
        run=run_wq,
        supports=rules.weight_only,
        reason="GEMM with fused dequantize",
        make_plan=make_plan,
        plans_operators=True,
        run_grouped=run_grouped,
    ),
    Implementation(
        name="gpu-dequantize",
        run=run_without_kernel,
        supports=rules.without_kernel,
        reason="no kernel runs here (no Triton, an older GPU), or float64 experts: dequantized, then the vendor's library",
        run_grouped=reference.run_grouped,
    ),
):
    register(_implementation, before="reference")
