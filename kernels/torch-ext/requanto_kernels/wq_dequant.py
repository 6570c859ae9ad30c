"""Dequantizes a weight: `W[n, k] = scale[n, k // group] * code[n, k] - shift[n, k // group]`.

Used for large M (dequantize into a scratch buffer, then the vendor's matmul) and as reference for the other kernels. The
arithmetic is in fp32 and rounds once, so the result is the correctly rounded fp16 or bf16 weight up to one fp32 ulp.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._decode import load_codes
from ._device import arch_of, fp8_decoder, on_device
from ._launch import launch
from ._scales import code_form, scale_codes, scales_of_codes


@triton.jit
def wq_dequant_kernel(
    q_ptr, s_ptr, z_ptr, t_ptr, out_ptr, N, K, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_N, BLOCK_K]` tile. It is memory bound, so the conversion without PTX is fast enough."""
    n0 = tl.program_id(0) * BLOCK_N
    rn = n0 + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(1) * BLOCK_K
    FORM: tl.constexpr = code_form(BITS, KIND, AFFINE, 1, tl.float32, s_ptr.dtype.element_ty, z_ptr.dtype.element_ty)
    codes = load_codes(
        q_ptr, t_ptr, rn, k0, N, K, stride_qn, BITS, KIND, EXEC, FORM, BLOCK_N, BLOCK_K, tl.float32, EVEN_K, False
    )  # fmt: skip
    scales = scales_of_codes(
        s_ptr, z_ptr, n0, k0, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
        BITS, GROUP, AFFINE, FORM, BLOCK_N, BLOCK_K, tl.float32, PAIRS, "natural",
    )  # fmt: skip
    w = scale_codes(codes, scales, AFFINE, FORM)
    rk = k0 + tl.arange(0, BLOCK_K)
    mask = (rn < N)[:, None] & (rk < K)[None, :]
    tl.store(out_ptr + rn.to(tl.int64)[:, None] * K + rk[None, :], w.to(out_ptr.dtype.element_ty), mask=mask)


def wq_dequant(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    *,
    bits: int,
    k: int | None = None,
    group_size: int | None = None,
    layout: str = "plain",
    small_float: str = "",
    codebook: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight `[N, K]` in dtype (fp16, bf16 or fp32), into `out` if given.

    k: K, needed only if the last byte of a row is not full. Other arguments as in `wq_gemm`; values of a codebook are not
    rounded before they are scaled.
    """
    device = check.check_devices(qdata=qdata, scale=scale, shift=shift, codebook=codebook, out=out)
    if dtype not in check.FLOATS:
        check.fail("dtype", dtype, "torch.float16, torch.bfloat16 or torch.float32")
    if qdata.dim() != 2:
        check.fail("qdata.shape", tuple(qdata.shape), "2 dimensions")
    check.check_bits(bits)
    k = qdata.shape[1] * 8 // bits if k is None else k
    w = check.check_weight(qdata, scale, shift, k, bits, group_size, layout, False, small_float, codebook)
    result = check.check_out(out, (w.n, k), dtype, device)
    if result.numel() == 0:
        return result
    block_k = max(128, check.exec_block(bits)) if bits < 8 else 128
    block_n = 4096 // block_k
    z = w.shift if w.shift is not None else w.scale
    with on_device(qdata):
        launch(
            wq_dequant_kernel, (-(-w.n // block_n), -(-k // block_k)),
            w.q, w.scale, z, w.table, result, w.n, k, *w.strides()[:5],
            BITS=bits, KIND=fp8_decoder(w.kind, arch_of(device)), GROUP=w.group, AFFINE=w.shift is not None, EXEC=w.exec,
            BLOCK_N=block_n, BLOCK_K=block_k, PAIRS=w.has_pairs(), EVEN_K=k % block_k == 0, num_warps=4,
        )  # fmt: skip
    return result
