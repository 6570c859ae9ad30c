"""Weight-quantized matrix multiplication: `y[M, N] = x[M, K] @ W[N, K]^T + bias`, W of 1 to 8 bits.

    W[n, k] = scale[n, k // group] * code[n, k] - shift[n, k // group]

Ideas: weight as the left operand, so that the tile is `[N, M]` and decoded weights stay in registers on wgmma; magic numbers
for codes (see `_decode.py`); scales applied to sums, not to weights, and few rows of x in slots (see `_accumulate.py`);
slices of K by several programs, whose sums the last of them adds in a fixed order (see `_split.py`).
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _check as check
from . import config as tables
from ._accumulate import accumulate
from ._device import arch_of, fp8_decoder, is_cuda, on_device, processors
from ._launch import launch
from ._split import add_rows, slices, workspace
from .config import Config, select, split_for
from .forms import form_of


@triton.jit
def wq_gemm_kernel(
    x_ptr, q_ptr, s_ptr, z_ptr, t_ptr, bias_ptr, out_ptr, work_ptr, count_ptr, M, N, K,
    stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg, steps_per_split,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    SCALE: tl.constexpr, LEFT: tl.constexpr, BY_FIELD: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of y; with SPLIT, the sum over the K slice of this program, or the sum of all slices if it is the last."""
    pid, split = tl.program_id(0), tl.program_id(1)
    # GROUP_M tiles down a column before the next column, so that they share the weight in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    local = pid % (GROUP_M * tiles_n)
    m0, n0 = (first + local % height) * BLOCK_M, local // height * BLOCK_N
    first_step = split * steps_per_split
    acc = accumulate(
        x_ptr, q_ptr, s_ptr, z_ptr, t_ptr,
        m0, M, n0, first_step, min(first_step + steps_per_split, tl.cdiv(K, BLOCK_K)), N, K,
        stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
        BITS, KIND, GROUP, AFFINE, EXEC, BLOCK_M, BLOCK_N, BLOCK_K, DEPTH, SLOTS, SCALE, LEFT, BY_FIELD, PAIRS, EVEN_K,
        STAGES, PTX,
    )  # fmt: skip
    end = M
    if SPLIT:
        tile = m0 // BLOCK_M * tiles_n + n0 // BLOCK_N
        last, acc = add_rows(acc, work_ptr, count_ptr, tile, m0, M, n0, N, BLOCK_M, BLOCK_N)
        end = tl.where(last, M, 0)
    rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    if BIAS:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rm < end)[:, None] & (rn < N)[None, :],
    )


def constants(weight: check.Weight, config: Config, arch: str, dtype: torch.dtype, m: int | None = None) -> dict:
    """The constexpr arguments of `accumulate`. BLOCK_M can be less than the config's for m rows of x; None: unknown."""
    form = form_of(weight, config, m)
    return {
        "BITS": weight.bits,
        "KIND": fp8_decoder(weight.kind, arch),
        "GROUP": weight.group,
        "AFFINE": weight.shift is not None,
        "EXEC": weight.exec,
        "BLOCK_M": form.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": form.block_k,
        "DEPTH": form.depth,
        "SLOTS": form.slots,
        "SCALE": form.scale,
        "LEFT": config.left,
        "BY_FIELD": form.fields,
        "PAIRS": weight.has_pairs(),
        "EVEN_K": weight.k % form.block_k == 0,
        "STAGES": config.num_stages,
        "PTX": is_cuda(arch) and dtype != torch.float32,
    }


def config_for(weight: check.Weight, m: int, arch: str, dtype: torch.dtype) -> Config:
    """The tile for m rows of x."""
    config = select(arch, "wq_gemm", weight.bits, weight.group, m, weight.n, weight.k, str(dtype)[6:], weight.form())
    return of_codebook(config) if weight.kind == "table" else config


def of_codebook(config: Config) -> Config:
    """The config for a codebook, whose values take registers: larger tiles would spill."""
    if config.fields and config.block_m > 16:
        # Triton 3.6 spills with the two stages that the others have room for, and not with three.
        return replace(
            config, block_m=32, block_n=64, num_warps=4, num_stages=3 if tables.served_triton() == "3.6" else 2
        )
    if config.fields:
        return replace(config, block_n=min(config.block_n, 64))
    return replace(config, block_m=min(config.block_m, 128))


def rows_of(x: torch.Tensor, k: int) -> torch.Tensor:
    """x as `[M, K]`; a view wherever its strides allow."""
    if x.dim() < 1 or not x.shape[-1]:
        check.fail("x.shape", tuple(x.shape), "a last dimension of at least 1")
    return x.reshape(-1, k)


def wq_gemm(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    layout: str = "plain",
    small_float: str = "",
    codebook: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`x @ W^T + bias` for a quantized `W[N, K]`, in x's dtype.

    x: `[..., K]` fp16, bf16 or fp32, any strides. qdata: `[N, ceil(K * bits / 8)]` uint8 codes, or `[N, K]` int8, uint8
    (with a shift) or float8. scale, shift: `[N, ceil(K / group_size)]`, fp32, bf16 or fp16. bias: `[N]`. layout: "plain",
    or "exec" for the result of `to_exec_layout`. group_size: None for K divided by the number of scales. small_float:
    "e2m1", "e3m2" ... if codes of 3 to 7 bits are such floats (NVFP4, MXFP4, MXFP6) instead of integers. codebook:
    `[2**bits]`, fp32, bf16 or fp16, the value of each code (NF4), rounded to x's dtype before it is scaled. With either
    there is no shift.
    """
    check.check_dtype("x", x, check.FLOATS)
    device = check.check_devices(x=x, qdata=qdata, scale=scale, shift=shift, codebook=codebook, bias=bias, out=out)
    k = x.shape[-1] if x.dim() else 0
    check.check_rows("x", x)
    w = check.check_weight(qdata, scale, shift, k, bits, group_size, layout, False, small_float, codebook)
    bias = check.check_bias(bias, (w.n,))
    shape = (*x.shape[:-1], w.n)
    result = check.check_out(out, shape, x.dtype, device)
    if result.numel() == 0:
        return result
    x2 = rows_of(x, k)
    m = x2.shape[0]
    arch = arch_of(device)
    if config is None:
        config = config_for(w, m, arch, x.dtype)
    const = constants(w, config, arch, x.dtype, m)
    splits, per_split = slices(k, const["BLOCK_K"], split_for(config, m, w.n, k, processors(device)))
    tiles = -(-m // const["BLOCK_M"]) * -(-w.n // config.block_n)
    work, count = workspace(tiles, splits, m * w.n, torch.float32, result)
    z = w.shift if w.shift is not None else w.scale
    b = bias if bias is not None else w.scale
    with on_device(x):
        launch(
            wq_gemm_kernel, (tiles, splits),
            x2, w.q, w.scale, z, w.table, b, result, work, count, m, w.n, k,
            x2.stride(0), x2.stride(1), *w.strides()[:5], per_split,
            BIAS=bias is not None, SPLIT=splits > 1, GROUP_M=config.group_m, **const,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result
