"""GEMM of sub-byte weights and int8 activations: codes are converted to int8 in registers, for the int8 tensor cores.

    y[m, n] = x_scale[m] * sum over groups g of (scale[n, g] * sum_k x[m, k] * c[n, k] - z[n, g] * sum_k x[m, k])

c is the code, centred if there is no shift z. Sums within a group are exact int32; one fp32 fma per group and output adds
them. So a tile of K must not extend over several groups.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._decode import load_codes, load_group
from ._device import arch_of, on_device
from ._launch import launch
from .config import Config, select


@triton.jit
def w4a8_gemm_kernel(
    x_ptr, xs_ptr, q_ptr, s_ptr, z_ptr, bias_ptr, out_ptr, M, N, K,
    stride_xm, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile, weight as left operand. GROUP 0: one group per row, scaled once at the end."""
    FORM: tl.constexpr = "plain" if AFFINE else "centred"
    tiles_m = tl.cdiv(M, BLOCK_M)
    rm = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = tl.program_id(0) // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * stride_xm
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    x_total = tl.zeros((BLOCK_M,), tl.int32)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        rk = k0 + tl.arange(0, BLOCK_K)
        x_mask = (rm < M)[:, None] if EVEN_K else (rm < M)[:, None] & (rk < K)[None, :]
        x = tl.load(x_rows + rk[None, :], mask=x_mask, other=0)
        c = load_codes(
            q_ptr, q_ptr, rn, k0, N, K, stride_qn, BITS, "", EXEC, FORM, BLOCK_N, BLOCK_K, tl.int8, EVEN_K, False
        )  # fmt: skip
        if GROUP == 0:
            total = tl.dot(c, tl.trans(x), total, out_dtype=tl.int32)
            if AFFINE:
                x_total += tl.sum(x.to(tl.int32), axis=1)
        else:
            part = tl.dot(c, tl.trans(x), out_dtype=tl.int32).to(tl.float32)
            scale = load_group(s_ptr, rn, k0, N, K, stride_sn, stride_sg, GROUP, BLOCK_N, BLOCK_K)
            y += part * scale
            if AFFINE:
                z = load_group(z_ptr, rn, k0, N, K, stride_zn, stride_zg, GROUP, BLOCK_N, BLOCK_K)
                y -= z * tl.sum(x.to(tl.int32), axis=1).to(tl.float32)[None, :]
    if GROUP == 0:
        scale = load_group(s_ptr, rn, 0, N, K, stride_sn, stride_sg, 0, BLOCK_N, BLOCK_K)
        y = total.to(tl.float32) * scale
        if AFFINE:
            z = load_group(z_ptr, rn, 0, N, K, stride_zn, stride_zg, 0, BLOCK_N, BLOCK_K)
            y -= z * x_total.to(tl.float32)[None, :]
    y = tl.trans(y) * tl.load(xs_ptr + rm, mask=rm < M, other=0).to(tl.float32)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


def tile_k(weight: check.Weight, block_k: int) -> tuple[int, bool]:
    """(block_k, whether to read the execution layout). Raises if no tile of 32 or more fits into a group."""
    group = weight.group
    if group:
        if group < 32 or group & (group - 1):
            check.fail("group_size", group, "a power of two of at least 32, or K, for int8 activations")
        block_k = min(group, block_k)
    if weight.exec:
        block = check.exec_block(weight.bits)
        if group == 0 or group % block == 0:
            return max(block, block_k), True
        check.fail(
            "layout", "'exec'", f"'plain' for int8 activations with group_size {group} (not a multiple of {block})"
        )
    return block_k, False


def w4a8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    layout: str = "plain",
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`(x * x_scale) @ W^T + bias` in out_dtype, x int8 `[..., K]` from `quant_rows`, x_scale one for each row.

    The weight is passed as in `wq_gemm`, integers of up to 7 bits or int8. Groups are powers of two of at least 32, or K.
    """
    check.check_dtype("x", x, (torch.int8,))
    device = check.check_devices(x=x, x_scale=x_scale, qdata=qdata, scale=scale, shift=shift, bias=bias, out=out)
    if out_dtype not in check.FLOATS:
        check.fail("out_dtype", out_dtype, "torch.float16, torch.bfloat16 or torch.float32")
    check.check_dtype("x_scale", x_scale, check.FLOATS)
    k = x.shape[-1] if x.dim() else 0
    check.check_rows("x", x)
    w = check.check_weight(qdata, scale, shift, k, bits, group_size, layout)
    if w.kind:
        check.fail("qdata.dtype", qdata.dtype, f"torch.{'int8' if bits == 8 else 'uint8'} for int8 activations")
    bias = check.check_bias(bias, (w.n,))
    result = check.check_out(out, (*x.shape[:-1], w.n), out_dtype, device)
    x2 = check._inner_contiguous(x.reshape(-1, k))
    m = x2.shape[0]
    if x_scale.numel() != m:
        check.fail("x_scale.shape", tuple(x_scale.shape), f"{m} elements, one for each row of x")
    if config is None:
        config = select(arch_of(device), "w4a8_gemm", bits, w.group, m, w.n, k, "int8", w.form())
    block_k, is_exec = tile_k(w, config.block_k)
    if result.numel() == 0:
        return result
    xs = x_scale.reshape(-1).contiguous()
    z = w.shift if w.shift is not None else w.scale
    with on_device(x):
        launch(
            w4a8_gemm_kernel, (-(-m // config.block_m) * -(-w.n // config.block_n),),
            x2, xs, w.q, w.scale, z, bias if bias is not None else w.scale, result, m, w.n, k,
            x2.stride(0), *w.strides()[:5],
            BITS=bits, GROUP=w.group, AFFINE=w.shift is not None, EXEC=is_exec, BIAS=bias is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, EVEN_K=k % block_k == 0,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result
