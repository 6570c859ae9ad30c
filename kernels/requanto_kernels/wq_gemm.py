"""Weight-quantized matrix multiplication: `y[M, N] = x[M, K] @ W[N, K]^T + bias`, W of 1 to 8 bits.

    W[n, k] = scale[n, k // group] * code[n, k] - shift[n, k // group]

With one group per row the exact codes are multiplied, and `y = scale * (x . code) - shift * sum(x)` is computed in fp32; the
offset of the codes is that of `from_zero`. With more groups the weight is dequantized in x's dtype, one fma each, before the
dot.

Ideas: weight as the left operand so that dequantized values stay in registers on wgmma; magic numbers for codes (see
`_decode.py`); split-K through an fp32 scratch buffer that a second kernel sums in a fixed order (the "split-K" of Osama et
al. 2023, "Stream-K", without atomics), so that the same input always gives the same bits.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _check as check
from ._decode import code_form, exec_fields, from_zero, load_codes, load_exec, load_group, scale_codes
from ._device import arch_of, fp8_decoder, is_cuda, on_device, processors
from ._fields import field_to_float, open_table
from ._launch import launch
from .config import Config, select, split_for


@triton.jit
def accumulate(
    x_ptr, q_ptr, s_ptr, z_ptr, t_ptr, rm, m_end, rn, k_begin, k_end, N, K,
    stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    LEFT: tl.constexpr, BY_FIELD: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The `[BLOCK_M, BLOCK_N]` tile of `x @ W^T` over k_begin .. k_end, in fp32."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FORM: tl.constexpr = code_form(BITS, KIND, AFFINE, GROUP, DTYPE, s_ptr.dtype.element_ty, z_ptr.dtype.element_ty)
    table = open_table(t_ptr, BITS, KIND, EXEC, DTYPE, PTX)
    if LEFT:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_sum = tl.zeros((BLOCK_M,), tl.float32)
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * stride_xm
    m_mask = (rm < m_end)[:, None]
    # One dot for the joined tile, or one for each field of 32 consecutive k; which is faster depends on the hardware.
    FIELDS: tl.constexpr = exec_fields(BITS) if BY_FIELD else 1
    STEP: tl.constexpr = BLOCK_K // FIELDS
    if GROUP == 0 and AFFINE:
        scale = load_group(s_ptr, rn, 0, N, K, stride_sn, stride_sg, 0, BLOCK_N, BLOCK_K)
        shift = load_group(z_ptr, rn, 0, N, K, stride_zn, stride_zg, 0, BLOCK_N, BLOCK_K)
        if FORM == "magic":
            offset, shift = from_zero(scale, shift, BITS, DTYPE)
    for k0 in range(k_begin, k_end, BLOCK_K):
        if BY_FIELD:
            words = load_exec(q_ptr, rn, k0, N, stride_qn, K, BITS, BLOCK_K, EVEN_K)
        for i in tl.static_range(FIELDS):
            k = k0 + i * STEP
            rk = k + tl.arange(0, STEP)
            x_mask = m_mask if EVEN_K else m_mask & (rk < K)[None, :]
            x = tl.load(x_rows + rk[None, :] * stride_xk, mask=x_mask, other=0)
            if BY_FIELD:
                w = field_to_float(words, table, i, BITS, BITS == 3, KIND, FORM, DTYPE, PTX)
            else:
                w = load_codes(
                    q_ptr, table, rn, k0, N, K, stride_qn, BITS, KIND, EXEC, FORM, BLOCK_N, BLOCK_K, DTYPE, EVEN_K, PTX
                )  # fmt: skip
            if GROUP > 0:
                w = scale_codes(
                    w, s_ptr, z_ptr, rn, k, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
                    BITS, GROUP, AFFINE, FORM, BLOCK_N, STEP, DTYPE,
                )  # fmt: skip
            elif AFFINE:
                if FORM == "magic":
                    w = w - offset
                x_sum += tl.sum(x.to(tl.float32), axis=1)
            if LEFT:
                acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
            else:
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if LEFT:
        acc = tl.trans(acc)
    if GROUP == 0:
        if not AFFINE:
            scale = load_group(s_ptr, rn, 0, N, K, stride_sn, stride_sg, 0, BLOCK_N, BLOCK_K)
        acc = acc * tl.reshape(scale, [BLOCK_N])[None, :]
        if AFFINE:
            acc = acc - x_sum[:, None] * tl.reshape(shift, [BLOCK_N])[None, :]
    return acc


@triton.jit
def wq_gemm_kernel(
    x_ptr, q_ptr, s_ptr, z_ptr, t_ptr, bias_ptr, out_ptr, M, N, K,
    stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg, k_per_split,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, LEFT: tl.constexpr, BY_FIELD: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One tile of y; with SPLIT, one tile of the fp32 scratch buffer `[splits, M, N]` for the K slice of this program."""
    pid, split = tl.program_id(0), tl.program_id(1)
    # GROUP_M tiles down a column before the next column, so that they share the weight in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    local = pid % (GROUP_M * tiles_n)
    rm = (first + local % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = local // height * BLOCK_N + tl.arange(0, BLOCK_N)
    k_begin = split * k_per_split
    acc = accumulate(
        x_ptr, q_ptr, s_ptr, z_ptr, t_ptr, rm, M, rn, k_begin, min(k_begin + k_per_split, K), N, K,
        stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
        BITS, KIND, GROUP, AFFINE, EXEC, BLOCK_M, BLOCK_N, BLOCK_K, LEFT, BY_FIELD, EVEN_K, PTX,
    )  # fmt: skip
    if BIAS and not SPLIT:
        acc += tl.load(bias_ptr + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    row = rm.to(tl.int64)
    if SPLIT:
        row += split.to(tl.int64) * M
    tl.store(
        out_ptr + row[:, None] * N + rn[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rm < M)[:, None] & (rn < N)[None, :],
    )


@triton.jit
def reduce_kernel(work_ptr, bias_ptr, out_ptr, total, N, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """`out = sum over splits of work[splits, M * N] + bias`, always in the same order."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < total
    acc = tl.load(work_ptr + offsets, mask=mask, other=0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(work_ptr + split * total + offsets, mask=mask, other=0)
    if BIAS:
        acc += tl.load(bias_ptr + offsets % N, mask=mask, other=0).to(tl.float32)
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def fit(config: Config, weight: check.Weight) -> tuple[int, bool]:
    """The config's (block_k, fields), adjusted to this weight: execution-layout tiles must consist of whole blocks."""
    block_k, fields = config.block_k, config.fields
    if not weight.exec:
        # Joining bytes needs a tile's codes in registers twice; half the depth avoids spills.
        return (min(block_k, 64) if weight.bits < 8 else block_k), False
    block = check.exec_block(weight.bits)
    if fields and (weight.group == 0 or weight.group % 32 == 0 or weight.group in (16, 8)):
        return block, True
    return max(block_k, block), False


def constants(weight: check.Weight, config: Config, arch: str, dtype: torch.dtype) -> dict:
    """The constexpr arguments that every weight-quantized kernel shares."""
    block_k, fields = fit(config, weight)
    return {
        "BITS": weight.bits,
        "KIND": fp8_decoder(weight.kind, arch),
        "GROUP": weight.group,
        "AFFINE": weight.shift is not None,
        "EXEC": weight.exec,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "LEFT": config.left,
        "BY_FIELD": fields,
        "EVEN_K": weight.k % block_k == 0,
        "PTX": is_cuda(arch) and dtype != torch.float32,
    }


def config_for(weight: check.Weight, m: int, arch: str, dtype: torch.dtype) -> Config:
    """The tile for m rows of x."""
    config = select(arch, "wq_gemm", weight.bits, weight.group, m, weight.n, weight.k, str(dtype)[6:])
    return of_codebook(config) if weight.kind == "table" else config


def of_codebook(config: Config) -> Config:
    """The config for a codebook, whose values take registers: larger tiles would spill."""
    if config.fields:
        return replace(config, block_m=min(config.block_m, 32), block_n=min(config.block_n, 64))
    return replace(config, block_m=min(config.block_m, 128))


def rows_of(x: torch.Tensor, k: int) -> torch.Tensor:
    """x as `[M, K]`; a view wherever its strides allow."""
    if x.dim() < 1:
        check.fail("x.shape", tuple(x.shape), "at least one dimension")
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
    const = constants(w, config, arch, x.dtype)
    block_k = const["BLOCK_K"]
    splits = split_for(config, m, w.n, k, processors(device))
    k_per_split = -(-k // (splits * block_k)) * block_k
    splits = -(-k // k_per_split)
    target = result if splits == 1 else torch.empty(splits * m * w.n, dtype=torch.float32, device=device)
    grid = (-(-m // config.block_m) * -(-w.n // config.block_n), splits)
    z = w.shift if w.shift is not None else w.scale
    b = bias if bias is not None else w.scale
    with on_device(x):
        launch(
            wq_gemm_kernel, grid,
            x2, w.q, w.scale, z, w.table, b, target, m, w.n, k, x2.stride(0), x2.stride(1), *w.strides()[:5], k_per_split,
            BIAS=bias is not None, SPLIT=splits > 1, GROUP_M=config.group_m, **const,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if splits > 1:
            total = m * w.n
            launch(
                reduce_kernel, (-(-total // 1024),),
                target, b, result, total, w.n, SPLITS=splits, BIAS=bias is not None, BLOCK=1024,
            )  # fmt: skip
    return result
