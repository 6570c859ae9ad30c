"""The CPU's part of the table. Every condition comes from a measurement: docs/cpu.md, benchmarks/results/cpu_*.json.

In order of preference:

    cpu-compiled-int8  int8 weights, packed: a kernel of torch's compiler, where it beats the next two
    cpu-compiled-int8-int8  int8 weights, packed, with int8 activations: the same, around one int8 product
    cpu-onednn-int8    int8 weights, packed, with int8 activations: one int8 product
    cpu-onednn-split   int8 weights, packed, with float16 or bfloat16: x as 16-bit integers, two int8 products
    cpu-int8pack       int8 weights, stored form, one row: torch's weight-only operator
    cpu-compiled-int4  int4, int3 and int2, packed, some rows of bfloat16: dequantized by a kernel of torch's compiler
    cpu-int4pack       int4, int3 and int2 weights, packed, few rows: torch's weight-only operator
    cpu-compiled-float8  e4m3, packed: a kernel of torch's compiler
    cpu-workspace      everything else: dequantized into a kept buffer, block by block, then F.linear
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.activations import quantize_activations
from requanto.linear.cpu import float8, fused_dequantize, int4, int4_gemm, int8, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.dequantize import dequantize_rows, row_scaled
from requanto.linear.cpu.scratch_matmul import matmul, scaled_into
from requanto.linear.registry import Bind, Implementation, Problem, register
from requanto.runtime.buffers import rows_that_fit, workspace
from requanto.tensor.qtensor import QTensor

_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32)
#: Rows up to which torch's int4 operator beats dequantization.
INT4_ROWS = 64
#: Rows up to which it beats a compiled kernel: so many, and the more the smaller a weight is, since two calls cost more
#: (cpu_paths.json).
COMPILED_INT4_ROWS, PER_WEIGHT = 7.5, 3e6
#: Bytes of a weight that are dequantized and multiplied at a time: by operators, whose every pass reads them again, and by
#: kernels, which leave the product's own cost to be saved, a call for each.
BLOCK_BYTES, COMPILED_BLOCK_BYTES = 4 * 2**20, 16 * 2**20


def run_int8pack(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One row times int8 codes."""
    codes = weight._storage.parts["qdata"]
    # The operator reads both with aligned loads: other pointers end the process.
    if codes.data_ptr() % 64 or not codes.is_contiguous():
        codes = aligned(codes)
    x = aligned(x)
    scale = weight.scale.reshape(-1)
    if x.dtype == torch.float32:
        out = torch._weight_int8pack_mm(x, codes, scale.float())
    else:  # scaled afterwards: the operator would round the scale to x's dtype
        out = torch._weight_int8pack_mm(x, codes, torch.ones_like(scale, dtype=x.dtype)).float().mul_(scale).to(x.dtype)
    return out if bias is None else out.add_(bias)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous, its first element at a multiple of 64 bytes; copied where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def run_workspace(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dequantizes blocks of rows into this thread's buffer and multiplies each while it is in the cache."""
    dtype = x.dtype
    steps = None
    if activation is not None:
        codes, steps = quantize_activations(x, activation, input_scale)
        x = codes.to(dtype) if dtype != torch.float16 else codes
    if dtype == torch.float16:  # without native float16 products torch computes those 10 times slower than float32
        x = x.float()
    out = product(x, weight)
    if steps is not None:
        out = out.float().mul_(steps)
    if bias is not None:
        out = out.add_(bias)
    return out.to(dtype)


def product(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``x @ w.T``, or ``x @ w`` of a transposed weight, in x's dtype."""
    packed = int4.packed(weight)
    if packed is not None:
        return (int4_gemm.run_large_transposed if weight.transposed else int4_gemm.run_large)(x, weight, packed)
    stored_rows, length = weight.lead.numel(), weight.row_length
    compiled_here = fused_dequantize.ready(weight, x.dtype)
    at_once = COMPILED_BLOCK_BYTES if compiled_here else BLOCK_BYTES
    step = rows_that_fit(2 * length * x.dtype.itemsize, max(64, at_once // max(1, length * x.dtype.itemsize)))
    if weight.transposed:
        return _product_transposed(x, weight, step)
    # The scale multiplies the weight; or the result, where rows have one each, x has few, and no kernel does all at once.
    scaled = compiled_here or not row_scaled(weight) or (weight.qtype == qint8 and 2 * x.shape[0] >= length)
    if scaled and stored_rows <= step:
        return torch.mm(x, dequantize_rows(weight, 0, stored_rows, workspace((stored_rows, length), x.dtype)).t())
    scale = None if scaled else weight.scale.reshape(-1).to(torch.float32)
    out = x.new_empty(x.shape[0], stored_rows)
    for start in range(0, stored_rows, step):
        stop = min(start + step, stored_rows)
        block = workspace((stop - start, length), x.dtype)
        dequantize_rows(weight, start, stop, block, scaled=scaled)
        columns = out[:, start:stop]
        if scale is None:
            columns.copy_(matmul(x, block.t()))
        else:
            scaled_into(columns, matmul(x, block.t()), scale[start:stop])
    return out


def _product_transposed(x: torch.Tensor, weight: QTensor, step: int) -> torch.Tensor:
    # x @ w with w stored [K', N'] row by row: blocks of K' add up, in float32 so that they are rounded once.
    stored_rows, length = weight.lead.numel(), weight.row_length
    total = None
    for start in range(0, stored_rows, step):
        stop = min(start + step, stored_rows)
        block = dequantize_rows(weight, start, stop, workspace((stop - start, length), x.dtype))
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
    """torch's int4 operator; float16 goes through float32, whose range holds every scale."""
    dtype, steps = x.dtype, None
    if activation is not None:
        x, steps = quantize_activations(x, activation, input_scale)
        x = x if dtype == torch.float16 else x.to(dtype)
    out = int4.run(x.float() if dtype == torch.float16 else x, weight, None)
    if steps is not None:
        out = out.float().mul_(steps)
    return (out if bias is None else out.add_(bias)).to(dtype)


def _floats(bind: Bind) -> Bind:
    """Only for x that stays as it is: activations are quantized before these products."""
    return lambda weight, rows, dtype: bind(weight, rows, dtype) if weight.activation is None else None


def _cpu(problem: Problem) -> bool:
    return problem.device == "cpu" and problem.dtype in _FLOATS


def _int8(problem: Problem) -> bool:
    return _cpu(problem) and problem.qtype == qint8 and not problem.affine and problem.group_size is None


def _onednn_layout(problem: Problem) -> bool:
    return problem.layout.startswith(onednn_int8.BLOCKED.name) and not problem.transposed and onednn_int8.works()


def _int4_layout(problem: Problem) -> bool:
    return problem.layout == int4.layout().name and not problem.transposed and int4.works()


def _nibbles(problem: Problem) -> bool:
    """True where a compiled kernel is to be had for many rows of int4, int3 or int2."""
    return (
        problem.dtype == torch.bfloat16
        and cache.wanted(calls.NIBBLES)
        and onednn_bf16.fits(problem.out_features, problem.in_features)
    )


def _operator_rows(problem: Problem) -> float:
    """Rows up to which torch's int4 operator is the fastest; none, where it does not take the groups."""
    if problem.group_size not in int4.GROUPS:
        return 0
    weights = problem.out_features * problem.in_features
    return COMPILED_INT4_ROWS + PER_WEIGHT / weights if _nibbles(problem) else INT4_ROWS


def _readable(problem: Problem) -> bool:
    """True where oneDNN's blocked form is in the order that the kernels read, and they are to be had."""
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
        bind=int8.bind,
        supports=lambda p: (
            p.activation is None
            and p.dtype in _HALVES
            and int8.pays(p.rows, p.out_features * p.in_features, p.dtype)
            and _readable(p)
        ),
        reason="a kernel of torch's compiler reads the codes once: times one row, or into bfloat16 in oneDNN's order",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-compiled-int8-int8",
        run=int8.run_quantized,
        bind=int8.bind_quantized,
        supports=lambda p: (
            _int8(p)
            and _onednn_layout(p)
            and p.activation == qint8
            and not p.static
            and p.dtype == torch.bfloat16
            and cache.wanted(calls.INT8_INT8)
            and (p.rows > 1 or _readable(p))
        ),
        reason="int8 times int8; kernels of torch's compiler quantize x and scale the sums, or do all of it for one row",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-onednn-int8",
        run=onednn_int8.run_int8,
        supports=lambda p: _int8(p) and _onednn_layout(p) and p.activation == qint8,
        reason="int8 times int8 in oneDNN's blocked form, exact int32 sums",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-onednn-split",
        run=onednn_int8.run_split,
        supports=lambda p: _int8(p) and _onednn_layout(p) and p.activation is None and p.dtype in _HALVES,
        reason="x as 16-bit integers: two int8 products read the weight as 8 bits, nothing is dequantized",
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
        reason="one row: torch's int8 operator reads the stored codes",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-compiled-int4",
        run=run_workspace,
        bind=_floats(int4_gemm.bind),
        supports=lambda p: _cpu(p) and _int4_layout(p) and _nibbles(p) and p.rows > _operator_rows(p),
        reason="dequantized block by block by a kernel of torch's compiler, in oneDNN's order, then a product",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-int4pack",
        run=run_int4,
        bind=_floats(int4.bind),
        supports=lambda p: (
            _cpu(p)
            and _int4_layout(p)
            and (p.activation is None or p.activation == qint8)
            and p.rows <= _operator_rows(p)
        ),
        reason="few rows: torch's int4 operator dequantizes in registers",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-compiled-float8",
        run=float8.run,
        bind=float8.bind,
        supports=lambda p: (
            _cpu(p)
            and p.layout == float8.LAYOUT.name
            and not p.transposed
            and p.activation is None
            and (p.rows <= float8.FEW or p.dtype == torch.bfloat16)
            and cache.wanted(calls.FLOAT8)
        ),
        reason="a kernel of torch's compiler reads the float8 codes once",
    ),
    before="reference",
)
register(
    Implementation(
        name="cpu-workspace",
        run=run_workspace,
        supports=lambda p: _cpu(p),
        reason="dequantizes block by block into a kept buffer, then F.linear",
    ),
    before="reference",
)
