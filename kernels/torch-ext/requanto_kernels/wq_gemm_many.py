"""`wq_gemm` for several weights of one input in one launch: `y_i[M, N_i] = x[M, K] @ W_i[N_i, K]^T + bias_i`.

Queries, keys and values of one token; gate and up projections. With few rows a launch takes as long as the GEMM, and
each GEMM alone is too small to fill the device. The weights stay where they are: the programs of the launch are dealt
out to the weights, one after the other, and each program selects the addresses of its weight by its number.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _check as check
from ._accumulate import accumulate
from ._device import arch_of, on_device, processors
from ._launch import launch
from ._split import is_last, slices, store_part, sum_of_parts, workspace
from .config import Config, split_for
from .wq_gemm import config_for, constants, rows_of

#: Most weights of one launch.
MOST = 4


@triton.jit
def pick(part, a, b, c, d, PARTS: tl.constexpr):
    """The one of a, b, c, d with the number `part`, of the first PARTS. Keeps what is known of their alignment."""
    found = a
    if PARTS > 1:
        found = tl.where(part == 1, b, found)
    if PARTS > 2:
        found = tl.where(part == 2, c, found)
    if PARTS > 3:
        found = tl.where(part == 3, d, found)
    return found


@triton.jit
def wq_gemm_many_kernel(
    x0, x1, x2, x3, q0, q1, q2, q3, s0, s1, s2, s3, z0, z1, z2, z3, t_ptr, b0, b1, b2, b3, y0, y1, y2, y3,
    n0, n1, n2, n3, g0, g1, g2, g3, work_ptr, count_ptr, M, K,
    stride_xp, stride_xm, stride_xk, stride_qn, stride_sn, steps_per_split,
    PARTS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr,
    EXEC: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    SCALE: tl.constexpr, LEFT: tl.constexpr, BY_FIELD: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of one y, or its part for a slice of K. g: stride of scale and shift along the groups. BIAS: bit i for weight
    i. Grid: tiles along all N, splits, tiles along M."""
    pid = tl.program_id(0)
    begin, part, end = pid * 0, pid * 0, pid * 0
    if PARTS > 1:
        end += tl.cdiv(n0, BLOCK_N)
        begin, part = tl.where(pid >= end, end, begin), tl.where(pid >= end, 1, part)
    if PARTS > 2:
        end += tl.cdiv(n1, BLOCK_N)
        begin, part = tl.where(pid >= end, end, begin), tl.where(pid >= end, 2, part)
    if PARTS > 3:
        end += tl.cdiv(n2, BLOCK_N)
        begin, part = tl.where(pid >= end, end, begin), tl.where(pid >= end, 3, part)
    N = pick(part, n0, n1, n2, n3, PARTS)
    stride_g = pick(part, g0, g1, g2, g3, PARTS)
    split = tl.program_id(1)
    first_step = split * steps_per_split
    m0, begin_n = tl.program_id(2) * BLOCK_M, (pid - begin) * BLOCK_N
    acc = accumulate(
        pick(part, x0, x1, x2, x3, PARTS) + part.to(tl.int64) * stride_xp, pick(part, q0, q1, q2, q3, PARTS),
        pick(part, s0, s1, s2, s3, PARTS), pick(part, z0, z1, z2, z3, PARTS), t_ptr,
        m0, M, begin_n, first_step, min(first_step + steps_per_split, tl.cdiv(K, BLOCK_K)), N, K,
        stride_xm, stride_xk, stride_qn, stride_sn, stride_g, stride_sn, stride_g,
        BITS, KIND, GROUP, AFFINE, EXEC, BLOCK_M, BLOCK_N, BLOCK_K, DEPTH, SLOTS, SCALE, LEFT, BY_FIELD, PAIRS, EVEN_K,
        STAGES, PTX,
    )  # fmt: skip
    bias, y = pick(part, b0, b1, b2, b3, PARTS), pick(part, y0, y1, y2, y3, PARTS)
    has_bias = ((BIAS >> part) & 1) != 0
    if SPLIT:
        tile = tl.program_id(2) * tl.num_programs(0) + pid
        store_part(work_ptr, tile, acc)
        if is_last(count_ptr, tile):
            total = sum_of_parts(work_ptr, tile, acc)
            _finish(total, bias, y, m0, begin_n, M, N, has_bias, BIAS, BLOCK_M, BLOCK_N)
    else:
        _finish(acc, bias, y, m0, begin_n, M, N, has_bias, BIAS, BLOCK_M, BLOCK_N)


@triton.jit
def _finish(
    acc, bias, y, m0, n0, M, N, has_bias, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Adds the bias and stores a tile of y."""
    rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    if BIAS:
        # Not `(rn < N) & has_bias`: the interpreter of Triton 3.9 takes no mask that a scalar was combined with.
        acc += tl.load(bias + rn, mask=rn < tl.where(has_bias, N, 0), other=0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm.to(tl.int64)[:, None] * N + rn[None, :], acc.to(y.dtype.element_ty), mask=mask)


def wq_gemm_many(
    x: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
    biases: Sequence[torch.Tensor | None] | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    layout: str = "plain",
    small_float: str = "",
    codebook: torch.Tensor | None = None,
    stacked: bool = False,
    config: Config | None = None,
) -> list[torch.Tensor]:
    """`x @ W_i^T + bias_i` for up to four weights `[N_i, K]`: a list of `[..., N_i]` in x's dtype, each a tensor of its own.

    x: `[..., K]` fp16, bf16 or fp32 for all weights; or one for each, as a list of `[..., K]` with equal strides or, with
    stacked=True, as one `[weights, ..., K]`. weights: qdata, scale and shift of each, as in `wq_gemm`; they differ in N
    alone, and the memory of their scales and shifts is in the same order (row-major, or all by `group_major`). biases:
    `[N_i]` or None for each, of one dtype. Other arguments as in `wq_gemm`, and the same for all weights.
    """
    count = len(weights)
    if not 1 <= count <= MOST:
        check.fail("weights", f"{count} of them", f"1 to {MOST}")
    biases = [None] * count if biases is None else biases
    if len(biases) != count:
        check.fail("biases", f"{len(biases)} of them", f"one or None for each of {count} weights")
    lead, xs, stride_xp = _inputs(x, count, stacked)
    tensors = {f"x[{i}]": one for i, one in enumerate(xs)}
    for i, (parts, bias) in enumerate(zip(weights, biases)):
        tensors |= {f"{name}[{i}]": one for name, one in zip(("qdata", "scale", "shift"), parts)} | {f"bias[{i}]": bias}
    device = check.check_devices(codebook=codebook, **tensors)
    m, k = xs[0].shape
    check.check_rows("x", xs[0])
    found = [check.check_weight(*w, k, bits, group_size, layout, False, small_float, codebook) for w in weights]
    biases = [check.check_bias(bias, (w.n,)) for bias, w in zip(biases, found)]
    first = max(found, key=lambda w: w.n)  # the strides of a single row say nothing
    for i, w in enumerate(found):
        _check_like(i, w, first)
    dtypes = {bias.dtype for bias in biases if bias is not None}
    if len(dtypes) > 1:
        check.fail("bias.dtype", ", ".join(sorted(map(str, dtypes))), "one dtype")
    arch = arch_of(device)
    whole = replace(first, n=sum(w.n for w in found))
    config = config_for(whole, m, arch, xs[0].dtype) if config is None else config
    const = constants(whole, config, arch, xs[0].dtype, m) | {"PAIRS": all(w.has_pairs() for w in found)}
    outs = [torch.empty((*lead, w.n), dtype=xs[0].dtype, device=device) for w in found]
    given = next((bias for bias in biases if bias is not None), None)
    absent = first.scale if given is None else given
    splits, per_split = slices(k, const["BLOCK_K"], split_for(config, m, whole.n, k, processors(device)))
    grid = (sum(-(-w.n // config.block_n) for w in found), splits, -(-m // const["BLOCK_M"]))
    tiles = grid[0] * grid[2]
    size = tiles * const["BLOCK_M"] * config.block_n
    work, count_of_tile = workspace(tiles, splits, size, torch.float32, outs[0])
    slots = (
        xs,
        [w.q for w in found],
        [w.scale for w in found],
        [w.scale if w.shift is None else w.shift for w in found],
        [absent if bias is None else bias for bias in biases],
        outs,
        [w.n for w in found],
        [w.scale.stride(1) for w in found],
    )
    x4, q4, s4, z4, b4, y4, n4, g4 = ([*slot, *[None] * (MOST - count)] for slot in slots)
    with on_device(xs[0]):
        launch(
            wq_gemm_many_kernel, grid,
            *x4, *q4, *s4, *z4, first.table, *b4, *y4, *n4, *g4, work, count_of_tile, m, k,
            stride_xp, *xs[0].stride(), *first.strides()[:2], per_split,
            PARTS=count, SPLIT=splits > 1, BIAS=sum(1 << i for i, bias in enumerate(biases) if bias is not None), **const,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return outs


def _inputs(x: torch.Tensor | Sequence[torch.Tensor], count: int, stacked: bool) -> tuple[tuple, list, int]:
    """x's shape without K, `[M, K]` for each weight, and the elements from one weight's x to the next in one tensor."""
    xs = [x] if isinstance(x, torch.Tensor) else list(x)
    if len(xs) not in (1, count):
        check.fail("x", f"{len(xs)} tensors", f"one, or one for each of {count} weights")
    first = xs[0]
    check.check_devices(**{f"x[{i}]": one for i, one in enumerate(xs)})
    for i, one in enumerate(xs):
        check.check_dtype(f"x[{i}]", one, check.FLOATS)
        if (one.shape, one.stride(), one.dtype) != (first.shape, first.stride(), first.dtype):
            check.fail(f"x[{i}]", f"{one.dtype} {tuple(one.shape)}, strides {one.stride()}", "those of the first")
    if stacked:
        if len(xs) > 1 or first.dim() < 2 or first.shape[0] != count:
            check.fail("x.shape", tuple(first.shape), f"one tensor ({count}, ..., K), one x for each weight")
        if not first.is_contiguous():
            check.fail("x.stride", first.stride(), "a contiguous tensor if stacked")
        rows = rows_of(first, first.shape[-1])
        m = rows.shape[0] // count
        return first.shape[1:-1], [rows[:m]] * count, m * first.shape[-1]
    rows = [rows_of(one, one.shape[-1] if one.dim() else 0) for one in xs]
    return first.shape[:-1], rows * (count // len(rows)), 0


def _check_like(i: int, w: check.Weight, first: check.Weight) -> None:
    """Raises unless one program can read weight number i and the first."""
    tables = [(one.q.dtype, one.scale.dtype, one.shift is None or one.shift.dtype) for one in (w, first)]
    if tables[0] != tables[1] or (w.kind, w.exec, w.group) != (first.kind, first.exec, first.group):
        check.fail(f"weights[{i}]", f"{w.q.dtype}, scales {w.scale.dtype}", "the dtypes of the largest weight's parts")
    if w.n > 1 and w.strides()[:2] != first.strides()[:2]:
        found = f"strides {w.strides()[:2]} of codes and scales by row"
        check.fail(f"weights[{i}]", found, f"{first.strides()[:2]}, as the largest")
    if w.shift is not None and _order(w.shift) != _order(w.scale):
        check.fail(f"weights[{i}].shift.stride", w.shift.stride(), f"{w.scale.stride()}, as the scale")


def _order(scales: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(scales.stride(), scales.shape) if size > 1]
