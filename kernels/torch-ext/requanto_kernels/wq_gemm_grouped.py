"""`wq_gemm` for the fused experts of a mixture: `y[t] = x[t] @ W[expert of t]^T + bias[expert of t]`.

Tokens must be sorted by expert; `offsets[e] .. offsets[e + 1]` are expert e's rows. The grid has one more tile per expert
than the tokens need, and each program finds its expert on the device. So nothing is copied to the host, and one captured
graph works for any routing.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._accumulate import accumulate
from ._device import arch_of, on_device
from ._launch import launch
from .config import Config
from .wq_gemm import config_for, constants
from .wq_gemm_dx import expert_tile


@triton.jit
def wq_gemm_grouped_kernel(
    x_ptr, q_ptr, s_ptr, z_ptr, t_ptr, bias_ptr, offsets_ptr, out_ptr, N, K, E,
    stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg, stride_qe, stride_se, stride_ze,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    BIAS: tl.constexpr, E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    SCALE: tl.constexpr, LEFT: tl.constexpr, BY_FIELD: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile of one expert; programs past the last tile do nothing."""
    expert, m0, m_end = expert_tile(offsets_ptr, tl.program_id(0), E, E_BLOCK, BLOCK_M)
    if m0 < m_end:
        n0 = tl.program_id(1) * BLOCK_N
        acc = accumulate(
            x_ptr, q_ptr + expert * stride_qe, s_ptr + expert * stride_se, z_ptr + expert * stride_ze, t_ptr,
            m0, m_end, n0, 0, tl.cdiv(K, BLOCK_K), N, K,
            stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
            BITS, KIND, GROUP, AFFINE, EXEC, BLOCK_M, BLOCK_N, BLOCK_K, DEPTH, SLOTS, SCALE, LEFT, BY_FIELD, PAIRS, EVEN_K,
            STAGES, PTX,
        )  # fmt: skip
        rm, rn = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        if BIAS:
            acc += tl.load(bias_ptr + expert * N + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
        mask = (rm < m_end)[:, None] & (rn < N)[None, :]
        tl.store(out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def wq_gemm_grouped(
    x: torch.Tensor,
    offsets: torch.Tensor,
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
    """`[tokens, N]` from x `[tokens, K]` sorted by expert and a weight of `[E, N, ...]`.

    offsets: int32 or int64 `[E + 1]`, ascending from 0 to the number of tokens (not checked, since that would copy them to
    the host). bias: `[E, N]`. Other arguments as in `wq_gemm`, with a leading E. Rows of `out` without an expert are not
    written.
    """
    check.check_dtype("x", x, check.FLOATS)
    device = check.check_devices(
        x=x, offsets=offsets, qdata=qdata, scale=scale, shift=shift, codebook=codebook, bias=bias, out=out
    )
    if x.dim() != 2:
        check.fail("x.shape", tuple(x.shape), "(tokens, K)")
    check.check_rows("x", x)
    m, k = x.shape
    w = check.check_weight(qdata, scale, shift, k, bits, group_size, layout, True, small_float, codebook)
    check.check_offsets(offsets, w.experts)
    bias = check.check_bias(bias, (w.experts, w.n))
    result = check.check_out(out, (m, w.n), x.dtype, device)
    if result.numel() == 0 or w.experts == 0:
        return result
    arch = arch_of(device)
    if config is None:
        config = config_for(w, -(-m // w.experts), arch, x.dtype)
    # Tiles for the mean number of rows; an expert with more has more tiles, which share its weight in L2.
    const = constants(w, config, arch, x.dtype, -(-m // w.experts))
    with on_device(x):
        launch(
            wq_gemm_grouped_kernel, (-(-m // const["BLOCK_M"]) + w.experts, -(-w.n // config.block_n)),
            x, w.q, w.scale, w.shift if w.shift is not None else w.scale, w.table, bias if bias is not None else w.scale,
            offsets, result, w.n, k, w.experts, x.stride(0), x.stride(1), *w.strides(),
            BIAS=bias is not None, E_BLOCK=triton.next_power_of_2(w.experts), **const,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result
