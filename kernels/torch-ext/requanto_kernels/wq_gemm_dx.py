"""Gradient of the activations of a quantized layer: `dx[M, K] = dy[M, N] @ W[N, K]`, W as in `wq_gemm`.

The sum is over N, along which the scale varies, so the weight is dequantized in dy's dtype, tile by tile, and not stored.
There is no gradient of codes, scale and shift.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._decode import load_codes
from ._device import arch_of, fp8_decoder, is_cuda, on_device
from ._fields import open_table
from ._launch import launch
from ._scales import code_form, scale_codes, scales_of_codes
from .config import Config, select


@triton.jit
def wq_gemm_dx_kernel(
    dy_ptr, q_ptr, s_ptr, z_ptr, t_ptr, dx_ptr, offsets_ptr, M, N, K, E,
    stride_ym, stride_yn, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg, stride_qe, stride_se, stride_ze,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    GROUPED: tl.constexpr, E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_K]` tile of dx, computed transposed, so that W^T is the left operand."""
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    # The weight is dequantized even with one group per row: group=1 selects the form for that.
    FORM: tl.constexpr = code_form(BITS, KIND, AFFINE, 1, DTYPE, s_ptr.dtype.element_ty, z_ptr.dtype.element_ty)
    if GROUPED:
        expert, m0, m_end = expert_tile(offsets_ptr, tl.program_id(0), E, E_BLOCK, BLOCK_M)
        q_ptr += expert * stride_qe
        s_ptr += expert * stride_se
        z_ptr += expert * stride_ze
    else:
        m0, m_end = tl.program_id(0) * BLOCK_M, M
    rm = m0 + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_K
    table = open_table(t_ptr, BITS, KIND, EXEC, DTYPE, PTX)
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if m0 < m_end:
        for n0 in range(0, N, BLOCK_N):
            rn = n0 + tl.arange(0, BLOCK_N)
            mask = (rm < m_end)[:, None] & (rn < N)[None, :]
            dy = tl.load(
                dy_ptr + rm.to(tl.int64)[:, None] * stride_ym + rn.to(tl.int64)[None, :] * stride_yn, mask=mask, other=0
            )
            w = load_codes(
                q_ptr, table, rn, k0, N, K, stride_qn, BITS, KIND, EXEC, FORM, BLOCK_N, BLOCK_K, DTYPE, EVEN_K, PTX
            )  # fmt: skip
            scales = scales_of_codes(
                s_ptr, z_ptr, n0, k0, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
                BITS, GROUP, AFFINE, FORM, BLOCK_N, BLOCK_K, DTYPE, PAIRS, "natural",
            )  # fmt: skip
            w = scale_codes(w, scales, AFFINE, FORM)
            acc = tl.dot(tl.trans(w), tl.trans(dy), acc, input_precision="ieee")
    rk = k0 + tl.arange(0, BLOCK_K)
    mask = (rm < m_end)[:, None] & (rk < K)[None, :]
    dx = tl.trans(acc).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + rm.to(tl.int64)[:, None] * K + rk[None, :], dx, mask=mask)


@triton.jit
def expert_tile(offsets_ptr, tile, E, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end row) of a tile among tokens sorted by expert; an empty range past the last tile.

    offsets has E + 1 row numbers. Each program searches them on the device, so the host does not wait for the routing.
    """
    e = tl.arange(0, E_BLOCK)
    begin = tl.load(offsets_ptr + e, mask=e < E, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + e + 1, mask=e < E, other=0).to(tl.int32)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, axis=0)
    mine = (tile >= last - tiles) & (tile < last)
    expert = tl.sum(tl.where(mine, e, 0), axis=0)
    m0 = tl.sum(tl.where(mine, begin + (tile - (last - tiles)) * BLOCK_M, 0), axis=0)
    return expert.to(tl.int64), m0, tl.sum(tl.where(mine, end, 0), axis=0)


def wq_gemm_dx(
    dy: torch.Tensor,
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
    offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`dy @ W` for dy `[..., N]`; with `offsets` (int32 or int64 `[E + 1]`), the backward of `wq_gemm_grouped`.

    The weight is passed as in the forward; k is needed only if the last byte of a row is not full.
    """
    check.check_dtype("dy", dy, check.FLOATS)
    device = check.check_devices(
        dy=dy, qdata=qdata, scale=scale, shift=shift, codebook=codebook, offsets=offsets, out=out
    )
    if qdata.dim() not in (2, 3) or (qdata.dim() == 3) != (offsets is not None):
        check.fail("qdata.shape", tuple(qdata.shape), "(N, bytes), or (E, N, bytes) together with offsets")
    check.check_bits(bits)
    k = qdata.shape[-1] * 8 // bits if k is None else k
    w = check.check_weight(qdata, scale, shift, k, bits, group_size, layout, offsets is not None, small_float, codebook)
    if dy.dim() < 1 or dy.shape[-1] != w.n:
        check.fail("dy.shape", tuple(dy.shape), f"(..., {w.n})")
    check.check_rows("dy", dy)
    if offsets is not None:
        check.check_offsets(offsets, w.experts)
        if dy.dim() != 2:
            check.fail("dy.shape", tuple(dy.shape), f"(tokens, {w.n})")
    result = check.check_out(out, (*dy.shape[:-1], k), dy.dtype, device)
    if result.numel() == 0:
        return result
    dy2 = dy.reshape(-1, w.n) if w.n else dy.new_zeros((result.numel() // k, 0))
    m = dy2.shape[0]
    arch = arch_of(device)
    if config is None:
        config = select(arch, "wq_gemm_dx", bits, w.group, m, w.n, k, str(dy.dtype)[6:])
    block_k = max(config.block_k, check.exec_block(bits)) if w.exec else config.block_k
    tiles_m = -(-m // config.block_m) + w.experts
    with on_device(dy):
        launch(
            wq_gemm_dx_kernel, (tiles_m, -(-k // block_k)),
            dy2, w.q, w.scale, w.shift if w.shift is not None else w.scale, w.table, result,
            offsets if offsets is not None else w.q, m, w.n, k, w.experts, dy2.stride(0), dy2.stride(1), *w.strides(),
            BITS=bits, KIND=fp8_decoder(w.kind, arch), GROUP=w.group, AFFINE=w.shift is not None, EXEC=w.exec,
            GROUPED=offsets is not None, E_BLOCK=triton.next_power_of_2(max(w.experts, 1)),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, PAIRS=w.has_pairs(),
            EVEN_K=k % block_k == 0,
            PTX=is_cuda(arch) and dy.dtype != torch.float32,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result
