"""GEMM of two quantized operands: `y[m, n] = x_scale[m] * w_scale[n] * (x[m] . w[n]) + bias[n]`.

int8 x int8 accumulates in int32, exactly. float8 x float8 accumulates in fp32, except on sm_89 and sm_90: the accumulator of
their float8 instructions keeps about 14 bits. On sm_90 `Config.exact_every` adds it to a sum in fp32 after so many products;
0 never does, as `torch._scaled_mm(use_fast_accum=True)`. What this costs in accuracy is in benchmarks/NOTES.md.

A scale is one number or one per row. The kernel with pointers runs everywhere. With few rows it splits K (`_split.py`); sums
of integers are the same for any split. Large GEMMs on sm_90 use the persistent kernel: it loads tiles through tensor
descriptors (bulk copies), with `Config.per_processor` programs on each multiprocessor that loop over tiles, so that a tile's
stores overlap the next one's loads.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _check as check
from ._device import arch_of, capability, on_device, processors
from ._fields import fp8_to_float
from ._launch import launch
from ._split import grid_of, is_last, range_of_part, store_part, sum_of_parts, workspace
from .config import Config, select, split_for


@triton.jit
def _tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    local = tile % (GROUP_M * tiles_n)
    return (first + local % height) * BLOCK_M, local // height * BLOCK_N


@triton.jit
def _finish(
    acc, xs_ptr, ws_ptr, bias_ptr, out_ptr, rm, rn, M, N,
    X_ROWS: tl.constexpr, W_ROWS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Applies scales and bias to a `[BLOCK_M, BLOCK_N]` tile of sums, and stores it."""
    y = acc.to(tl.float32)
    if X_ROWS:
        y *= tl.load(xs_ptr + rm, mask=rm < M, other=0).to(tl.float32)[:, None]
    else:
        y *= tl.load(xs_ptr).to(tl.float32)
    if W_ROWS:
        y *= tl.load(ws_ptr + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    else:
        y *= tl.load(ws_ptr).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled_mm_kernel(
    x_ptr, w_ptr, xs_ptr, ws_ptr, bias_ptr, out_ptr, work_ptr, count_ptr, M, N, K, stride_xm, stride_wn,
    X_KIND: tl.constexpr, W_KIND: tl.constexpr, X_ROWS: tl.constexpr, W_ROWS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    LEFT: tl.constexpr, EVEN_K: tl.constexpr, DECODE: tl.constexpr, EXACT_EVERY: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile, or a part of one, loaded through pointers. DECODE: float8 as uint8, converted to fp16 (for older GPUs)."""
    INT8: tl.constexpr = X_KIND == "int8"
    m0, n0 = _tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    if LEFT:
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * stride_xm
    w_rows = w_ptr + rn.to(tl.int64)[:, None] * stride_wn
    first, end = range_of_part(K, BLOCK_K, SPLIT)
    for k0 in range(first, end, BLOCK_K):
        rk = k0 + tl.arange(0, BLOCK_K)
        x_mask, w_mask = (rm < M)[:, None], (rn < N)[:, None]
        if not EVEN_K:
            x_mask = x_mask & (rk < K)[None, :]
            w_mask = w_mask & (rk < K)[None, :]
        x = tl.load(x_rows + rk[None, :], mask=x_mask, other=0.0)
        w = tl.load(w_rows + rk[None, :], mask=w_mask, other=0.0)
        if DECODE:
            x = fp8_to_float(x, X_KIND, tl.float16)
            w = fp8_to_float(w, W_KIND, tl.float16)
        if LEFT:
            acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=EXACT_EVERY, out_dtype=ACC)
        else:
            acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=EXACT_EVERY, out_dtype=ACC)
    if SPLIT:
        tile = tl.program_id(0)
        store_part(work_ptr, tile, acc)
        if is_last(count_ptr, tile):
            total = sum_of_parts(work_ptr, tile, acc)
            if LEFT:
                total = tl.trans(total)
            _finish(total, xs_ptr, ws_ptr, bias_ptr, out_ptr, rm, rn, M, N, X_ROWS, W_ROWS, BIAS)
    else:
        if LEFT:
            acc = tl.trans(acc)
        _finish(acc, xs_ptr, ws_ptr, bias_ptr, out_ptr, rm, rn, M, N, X_ROWS, W_ROWS, BIAS)


@triton.jit
def scaled_mm_persistent_kernel(
    x_desc, w_desc, xs_ptr, ws_ptr, bias_ptr, out_ptr, M, N, K,
    INT8: tl.constexpr, X_ROWS: tl.constexpr, W_ROWS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EXACT_EVERY: tl.constexpr,
):  # fmt: skip
    """Program p of P computes the tiles p, p + P, ... Descriptors load zeros past the edge."""
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m0, n0 = _tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k0 in range(0, K, BLOCK_K):
            x, w = x_desc.load([m0, k0]), w_desc.load([n0, k0])
            acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=EXACT_EVERY, out_dtype=ACC)
        rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        _finish(acc, xs_ptr, ws_ptr, bias_ptr, out_ptr, rm, rn, M, N, X_ROWS, W_ROWS, BIAS)


def flat_scale(name: str, scale: torch.Tensor, rows: int) -> tuple[torch.Tensor, bool]:
    """The flat scale, and whether it has one number per row."""
    check.check_dtype(name, scale, check.FLOATS)
    if scale.numel() not in (1, rows):
        check.fail(f"{name}.shape", tuple(scale.shape), f"1 or {rows} elements")
    return scale.reshape(-1).contiguous(), scale.numel() == rows and rows > 1


def _multiplies(arch: str, *kinds: torch.dtype) -> bool:
    """Whether the matrix units of the architecture support these float8 kinds; gfx94x supports only fnuz."""
    fnuz = [kind == torch.float8_e4m3fnuz for kind in kinds]
    if arch.startswith("gfx94"):
        return all(fnuz)
    return not any(fnuz) and (capability(arch) >= 89 or arch.startswith("gfx95"))


def _persistent(config: Config, arch: str, *operands: torch.Tensor) -> bool:
    """Whether to use the persistent kernel; descriptors need sm_90 or newer, and 16-byte aligned base and rows."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 for t in operands)
    return config.persistent and aligned and (capability(arch) >= 90 or arch == "interpreter")


def shrunk(config: Config, m: int, n: int, programs: int) -> Config:
    """The config with the greatest tile of which there are as many as programs run at once: half as wide, then half as high.

    A tile of 128 x 256 keeps the matrix units busiest, but 256 rows and 4096 columns are only 32 of them.
    """
    while config.shrink and _tiles(config, m, n) < programs and config.block_m * config.block_n > 64 * 128:
        if config.block_n > 128:
            config = replace(config, block_n=config.block_n // 2)
        else:
            config = replace(config, block_m=config.block_m // 2, num_warps=4)
    return config


def _tiles(config: Config, m: int, n: int) -> int:
    return -(-m // config.block_m) * -(-n // config.block_n)


def exact_every(config: Config, int8: bool) -> int | None:
    """The kernels' EXACT_EVERY; None leaves it to Triton: never on sm_90. Only there does it change the program."""
    if int8 or not config.exact_every:
        return None
    if config.exact_every % 32 or config.exact_every > config.block_k:
        check.fail("config.exact_every", config.exact_every, f"0 or a multiple of 32 up to block_k = {config.block_k}")
    return config.exact_every


def scaled_mm(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`(x * x_scale) @ (w * w_scale)^T + bias` in out_dtype.

    x: `[..., K]`, w: `[N, K]`, both int8 or both float8 (e4m3fn, e4m3fnuz or e5m2). x_scale: one number or one for each
    row of x; w_scale: one number or `[N]` (any shape with that many elements). bias: `[N]`.
    """
    kinds = (torch.int8, *check.FP8_KINDS)
    check.check_dtype("x", x, kinds)
    check.check_dtype("w", w, (torch.int8,) if x.dtype == torch.int8 else tuple(check.FP8_KINDS))
    device = check.check_devices(x=x, w=w, x_scale=x_scale, w_scale=w_scale, bias=bias, out=out)
    if out_dtype not in check.FLOATS:
        check.fail("out_dtype", out_dtype, "torch.float16, torch.bfloat16 or torch.float32")
    if x.dim() < 1 or x.shape[-1] == 0:
        check.fail("x.shape", tuple(x.shape), "a last dimension of at least 1")
    check.check_rows("x", x)
    k = x.shape[-1]
    if w.dim() != 2 or w.shape[1] != k:
        check.fail("w.shape", tuple(w.shape), f"(N, {k})")
    n = w.shape[0]
    bias = check.check_bias(bias, (n,))
    result = check.check_out(out, (*x.shape[:-1], n), out_dtype, device)
    x2 = check._inner_contiguous(x.reshape(-1, k))
    m = x2.shape[0]
    if result.numel() == 0:
        return result
    w = check._inner_contiguous(w)
    xs, x_rows = flat_scale("x_scale", x_scale, m)
    ws, w_rows = flat_scale("w_scale", w_scale, n)
    int8 = x.dtype == torch.int8
    arch = arch_of(device)
    if config is None:
        config = select(arch, "scaled_mm", 8, 0, m, n, k, "int8" if int8 else "float8")
    config = shrunk(config, m, n, processors(device))
    tiles = _tiles(config, m, n)
    common = {
        "X_ROWS": x_rows, "W_ROWS": w_rows, "BIAS": bias is not None,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        "EXACT_EVERY": exact_every(config, int8), "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    b = bias if bias is not None else ws
    native = int8 or _multiplies(arch, x.dtype, w.dtype)
    with on_device(x):
        if native and _persistent(config, arch, x2, w):
            from triton.tools.tensor_descriptor import TensorDescriptor

            x_desc = TensorDescriptor.from_tensor(x2, [config.block_m, config.block_k])
            w_desc = TensorDescriptor.from_tensor(w, [config.block_n, config.block_k])
            programs = min(processors(device) * config.per_processor, tiles)
            launch(
                scaled_mm_persistent_kernel, (programs,),
                x_desc, w_desc, xs, ws, b, result, m, n, k, INT8=int8, **common,
            )  # fmt: skip
        else:
            decode = not native
            splits = split_for(config, m, n, k, processors(device))
            cells = config.block_m * config.block_n
            work, count = workspace(tiles, splits, tiles * cells, torch.int32 if int8 else torch.float32, ws)
            launch(
                scaled_mm_kernel, grid_of(tiles, splits),
                x2.view(torch.uint8) if decode else x2, w.view(torch.uint8) if decode else w,
                xs, ws, b, result, work, count, m, n, k, x2.stride(0), w.stride(0), SPLIT=splits > 1,
                X_KIND=check.FP8_KINDS.get(x.dtype, "int8"), W_KIND=check.FP8_KINDS.get(w.dtype, "int8"),
                LEFT=config.left, EVEN_K=k % config.block_k == 0, DECODE=decode, **common,
            )  # fmt: skip
    return result
