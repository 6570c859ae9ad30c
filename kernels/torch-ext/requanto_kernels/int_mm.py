"""GEMM of int8 operands by the vendor's library (`torch._int_mm`), with scales and bias: what `scaled_mm` computes.

The library's result is int32. Scaling it takes one more launch: 10 bytes of traffic for each element of the result, where a
GEMM that scales its own tiles writes 2.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._device import on_device
from ._launch import launch
from .scaled_mm import flat_scale

#: Fewest rows, and what N and K are multiples of, on a GPU.
LEAST_ROWS, MULTIPLE = 17, 8


@triton.jit
def rescale_kernel(
    acc_ptr, xs_ptr, ws_ptr, bias_ptr, out_ptr, N,
    X_ROWS: tl.constexpr, W_ROWS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Part of a row: `out = acc * x_scale * w_scale + bias`, in the order of `scaled_mm`, so that both agree bit for bit."""
    row = tl.program_id(0).to(tl.int64)
    rn = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = rn < N
    y = tl.load(acc_ptr + row * N + rn, mask=inside, other=0).to(tl.float32)
    y *= tl.load(xs_ptr + (row if X_ROWS else 0)).to(tl.float32)
    if W_ROWS:
        y *= tl.load(ws_ptr + rn, mask=inside, other=0).to(tl.float32)
    else:
        y *= tl.load(ws_ptr).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * N + rn, y.to(out_ptr.dtype.element_ty), mask=inside)


def int_mm(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`(x * x_scale) @ (w * w_scale)^T + bias` in out_dtype, in two launches.

    x: int8 `[M, K]`, M at least 17; w: int8 `[N, K]`; N and K multiples of 8 (what the library takes). Scales and bias as
    in `scaled_mm`.
    """
    check.check_dtype("x", x, (torch.int8,))
    check.check_dtype("w", w, (torch.int8,))
    device = check.check_devices(x=x, w=w, x_scale=x_scale, w_scale=w_scale, bias=bias)
    if out_dtype not in check.FLOATS:
        check.fail("out_dtype", out_dtype, "torch.float16, torch.bfloat16 or torch.float32")
    if x.dim() != 2 or x.shape[0] < LEAST_ROWS or not x.shape[1] or x.shape[1] % MULTIPLE:
        check.fail("x.shape", tuple(x.shape), f"(M, K), M at least {LEAST_ROWS}, K a multiple of {MULTIPLE}")
    if w.dim() != 2 or w.shape[1] != x.shape[1] or not w.shape[0] or w.shape[0] % MULTIPLE:
        check.fail("w.shape", tuple(w.shape), f"(N, {x.shape[1]}), N a multiple of {MULTIPLE}")
    m, n = x.shape[0], w.shape[0]
    bias = check.check_bias(bias, (n,))
    xs, x_rows = flat_scale("x_scale", x_scale, m)
    ws, w_rows = flat_scale("w_scale", w_scale, n)
    acc = torch._int_mm(x.contiguous(), w.contiguous().t())
    out = torch.empty((m, n), dtype=out_dtype, device=device)
    block = min(triton.next_power_of_2(n), 2048)
    with on_device(x):
        launch(
            rescale_kernel, (m, triton.cdiv(n, block)),
            acc, xs, ws, bias if bias is not None else ws, out, n,
            X_ROWS=x_rows, W_ROWS=w_rows, BIAS=bias is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
