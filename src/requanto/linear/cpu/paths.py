"""Registers the CPU implementations. All conditions were measured: docs/cpu.md, benchmarks/results/cpu_*.json.

In order of preference ("compiled" means a kernel compiled by AOTInductor, `requanto.linear.cpu.aot`):

    cpu-compiled-int8       int8, packed, where it is faster than the next three: compiled kernel
    cpu-compiled-int8-int8  int8, packed, int8 activations: one int8 GEMM, with compiled kernels before and after it
    cpu-onednn-int8         int8, packed, int8 activations: one int8 GEMM
    cpu-onednn-split        int8, packed, float16 or bfloat16: x as 16-bit integers, two int8 GEMMs
    cpu-int8pack            int8, plain, one row: torch's weight-only operator
    cpu-compiled-int4       int4, int3, int2, packed, more rows of bfloat16: dequantized by a compiled kernel, then a GEMM
    cpu-int4pack            int4, int3, int2, packed, few rows: torch's weight-only operator
    cpu-compiled-float8     e4m3, packed: compiled kernel
    cpu-dequantize          everything else: dequantized block by block into a scratch buffer, then a matmul
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.activations import quantize_activations
from requanto.linear.cpu import float8, fused_dequantize, int4, int4_gemm, int8, int8_gemm, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.dequantize import dequantize_rows, row_scaled
from requanto.linear.cpu.scratch_matmul import matmul, scaled_into
from requanto.linear.registry import Implementation, MakePlan, Problem, register
from requanto.runtime.buffers import rows_that_fit, scratch_buffer
from requanto.tensor.qtensor import QTensor

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32)
#: Most rows for which torch's int4 operator is faster than dequantizing with eager operators.
INT4_ROWS = 64
#: Most rows for which it is faster than a compiled kernel: the first number plus the second divided by the number of
#: weights, because the kernel's path needs two calls (cpu_paths.json).
COMPILED_INT4_ROWS, EXTRA_ROWS_TIMES_WEIGHTS = 7.5, 3e6
#: Bytes of a dequantized weight that are multiplied at a time: with eager operators, whose passes each read them again, and
#: with compiled kernels, for which fewer and larger matmuls are better.
BLOCK_BYTES, COMPILED_BLOCK_BYTES = 4 * 2**20, 16 * 2**20


def run_int8pack(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` for x with one row, with torch's int8 operator (fused dequantize)."""
    codes = weight._storage.parts["qdata"]
    # The operator uses aligned loads: with other pointers the process crashes.
    if codes.data_ptr() % 64 or not codes.is_contiguous():
        codes = aligned(codes)
    x = aligned(x)
    scale = weight.scale.reshape(-1).contiguous()  # it reads the scale's memory, whatever its strides
    if x.dtype == torch.float32:
        out = torch._weight_int8pack_mm(x, codes, aligned(scale.float()))
    else:  # scaled afterwards: the operator would round the scale to x's dtype
        out = torch._weight_int8pack_mm(x, codes, torch.ones_like(scale, dtype=x.dtype)).float().mul_(scale).to(x.dtype)
    return out if bias is None else out.add_(bias)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and with its first element at a multiple of 64 bytes; copied if necessary."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def run_dequantized(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` block by block: dequantizes into a scratch buffer, multiplies while it is in the cache."""
    dtype = x.dtype
    steps = None
    if activation is not None:
        codes, steps = quantize_activations(x, activation, input_scale)
        x = codes.to(dtype) if dtype != torch.float16 else codes
    if dtype == torch.float16:
        # Without float16 instructions, torch's float16 matmul takes 10 times as long as the float32 one.
        x = x.float()
    out = matmul_dequantized(x, weight)
    if steps is not None:
        out = out.float().mul_(steps)
    if bias is not None:
        out = out.add_(bias)
    return out.to(dtype)


def matmul_dequantized(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``x @ w.T``, or ``x @ w`` of a transposed weight, in x's dtype."""
    packed = int4.packed(weight)
    if packed is not None:
        return (int4_gemm.run_large_transposed if weight.transposed else int4_gemm.run_large)(x, weight, packed)
    stored_rows, length = weight.lead.numel(), weight.row_length
    compiled_here = fused_dequantize.ready(weight, x.dtype)
    at_once = COMPILED_BLOCK_BYTES if compiled_here else BLOCK_BYTES
    step = rows_that_fit(2 * length * x.dtype.itemsize, max(64, at_once // max(1, length * x.dtype.itemsize)))
    if weight.transposed:
        out = float8.run_transposed(x, weight)
        return _matmul_transposed(x, weight, step) if out is None else out
    # Scales multiply the weight; or the result, if there is one per row, x has few rows and no compiled kernel is used.
    scaled = compiled_here or not row_scaled(weight) or (weight.qtype == qint8 and 2 * x.shape[0] >= length)
    if scaled and stored_rows <= step:
        return torch.mm(x, dequantize_rows(weight, 0, stored_rows, scratch_buffer((stored_rows, length), x.dtype)).t())
    scale = None if scaled else weight.scale.reshape(-1).to(torch.float32)
    out = x.new_empty(x.shape[0], stored_rows)
    for start in range(0, stored_rows, step):
        stop = min(start + step, stored_rows)
        block = scratch_buffer((stop - start, length), x.dtype)
        dequantize_rows(weight, start, stop, block, scaled=scaled)
        columns = out[:, start:stop]
        if scale is None:
            columns.copy_(matmul(x, block.t()))
        else:
            scaled_into(columns, matmul(x, block.t()), scale[start:stop])
    return out


def _matmul_transposed(x: torch.Tensor, weight: QTensor, step: int) -> torch.Tensor:
    # x @ w: partial sums over blocks of stored rows are accumulated in float32 and rounded once.
    stored_rows, length = weight.lead.numel(), weight.row_length
    total = None
    for start in range(0, stored_rows, step):
        stop = min(start + step, stored_rows)
        block = dequantize_rows(weight, start, stop, scratch_buffer((stop - start, length), x.dtype))
        part = (x[:, start:stop] @ block).float()
        total = part if total is None else total.add_(part)
    return (x.new_zeros(x.shape[0], length) if total is None else total).to(x.dtype)


def run_int4(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` with torch's int4 operator; float16 in float32, because scales may exceed its range."""
    dtype, steps = x.dtype, None
    if activation is not None:
        x, steps = quantize_activations(x, activation, input_scale)
        x = x if dtype == torch.float16 else x.to(dtype)
    out = int4.run(x.float() if dtype == torch.float16 else x, weight, None)
    if steps is not None:
        out = out.float().mul_(steps)
    return (out if bias is None else out.add_(bias)).to(dtype)


def _float_activations_only(make_plan: MakePlan) -> MakePlan:
    """Restricts plans to weights without activation quantization, which the plan would not apply."""
    return lambda weight, rows, dtype: make_plan(weight, rows, dtype) if weight.activation is None else None


def _cpu(problem: Problem) -> bool:
    return problem.device == "cpu" and problem.dtype in _FLOATS


def _int8(problem: Problem) -> bool:
    return _cpu(problem) and problem.qtype == qint8 and not problem.affine and problem.group_size is None


def _onednn_layout(problem: Problem) -> bool:
    return problem.layout.startswith(onednn_int8.BLOCKED.name) and not problem.transposed and onednn_int8.works()


def _int4_layout(problem: Problem) -> bool:
    return problem.layout == int4.layout().name and not problem.transposed and int4.works()


def _compiled_int4_available(problem: Problem) -> bool:
    """True if a compiled kernel is available for many rows with int4, int3 or int2."""
    return (
        problem.dtype == torch.bfloat16
        and cache.wanted(calls.NIBBLES)
        and onednn_bf16.fits(problem.out_features, problem.in_features)
    )


def _int4_operator_rows(problem: Problem) -> float:
    """Most rows for which torch's int4 operator is the fastest; 0 if it does not support the group size.

    For float32 and float16 (which runs in float32) torch has no vector kernel: a row takes three times as long as
    dequantizing, and every further row as long again.
    """
    if problem.group_size not in int4.GROUPS or problem.dtype != torch.bfloat16:
        return 0
    weights = problem.out_features * problem.in_features
    return COMPILED_INT4_ROWS + EXTRA_ROWS_TIMES_WEIGHTS / weights if _compiled_int4_available(problem) else INT4_ROWS


def _compiled_int8_layout(problem: Problem) -> bool:
    """True if the weight has the layout that compiled int8 kernels read, and these are available."""
    return (
        _int8(problem)
        and not problem.transposed
        and problem.layout == onednn_int8.BLOCKED.name
        and cache.wanted(calls.INT8)
        and onednn_bf16.fits(problem.out_features, problem.in_features)
    )


register(
    Implementation(
        name="cpu-compiled-int8",
        run=int8.run,
        make_plan=int8.make_plan,
        supports=lambda p: (
            p.activation is None
            and p.dtype in _HALVES
            and int8.pays(p.rows, p.out_features * p.in_features, p.dtype)
            and _compiled_int8_layout(p)
        ),
        reason="compiled kernel: GEMV for one row, else dequantizes to bfloat16 in oneDNN's layout",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-compiled-int8-int8",
        run=int8.run_quantized,
        make_plan=int8.make_plan_quantized,
        supports=lambda p: (
            _int8(p)
            and _onednn_layout(p)
            and p.activation == qint8
            and not p.static
            and p.dtype == torch.bfloat16
            and cache.wanted(calls.INT8_INT8)
            and (p.rows > 1 or _compiled_int8_layout(p))
        ),
        reason="int8 times int8; compiled kernels quantize x and scale the sums, or do all of it for one row",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-onednn-int8",
        run=int8_gemm.run_int8,
        supports=lambda p: _int8(p) and _onednn_layout(p) and p.activation == qint8,
        reason="int8 times int8 in oneDNN's blocked layout, exact int32 sums",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-onednn-split",
        run=int8_gemm.run_split,
        supports=lambda p: _int8(p) and _onednn_layout(p) and p.activation is None and p.dtype in _HALVES,
        reason="x as 16-bit integers: two int8 GEMMs, the weight is not dequantized",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-int8pack",
        run=run_int8pack,
        supports=lambda p: (
            _int8(p)
            and p.layout == "plain"
            and not p.transposed
            and p.activation is None
            and p.rows == 1
            and p.in_features % 16 == 0
            and p.out_features % 16 == 0
        ),
        reason="one row: torch's int8 operator reads the plain codes",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-compiled-int4",
        run=run_dequantized,
        make_plan=_float_activations_only(int4_gemm.make_plan),
        supports=lambda p: (
            _cpu(p) and _int4_layout(p) and _compiled_int4_available(p) and p.rows > _int4_operator_rows(p)
        ),
        reason="a compiled kernel dequantizes block by block in oneDNN's layout, then a GEMM",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-int4pack",
        run=run_int4,
        make_plan=_float_activations_only(int4.make_plan),
        supports=lambda p: (
            _cpu(p)
            and _int4_layout(p)
            and (p.activation is None or p.activation == qint8)
            and p.rows <= _int4_operator_rows(p)
        ),
        reason="few rows: torch's int4 operator dequantizes in registers",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-compiled-float8",
        run=float8.run,
        make_plan=float8.make_plan,
        supports=lambda p: (
            _cpu(p)
            and p.layout == float8.LAYOUT.name
            and not p.transposed
            and p.activation is None
            and (p.rows <= float8.MAX_ROW_KERNEL_ROWS or p.dtype == torch.bfloat16)
            and cache.wanted(calls.FLOAT8)
        ),
        reason="compiled kernel: fused dequantize for few rows, else dequantizes in oneDNN's layout",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-dequantize",
        run=run_dequantized,
        supports=lambda p: _cpu(p),
        reason="dequantizes block by block into a scratch buffer, then a matmul",
    ),
    before="reference",
)
