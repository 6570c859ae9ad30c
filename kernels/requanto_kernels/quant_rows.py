"""Per-token quantization: for each row `scale = max|x| / limit`, `code = round(x / scale)`, in one pass over memory.

int8 rounds half to even within -127..127; float8 is encoded in integer arithmetic (round to nearest even, saturating),
so the result is the same on devices with and without fp8 conversion. A row of zeros has scale 1 and codes 0. A row with
NaN or infinity has scale NaN and codes 0, so that its row of the GEMM is NaN rather than a plausible number.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._device import on_device
from ._launch import launch

#: The largest finite value of each code type.
LIMITS = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
}
#: Most columns that a program holds in registers; longer rows are read a second time, from L2.
MAX_BLOCK = 8192


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, for |x| < 2**22, by rounding of an fp32 addition."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode_fp8(x, KIND: tl.constexpr):
    """Rounds fp32 within the kind's range to float8 bit patterns (uint8), ties to even."""
    MANTISSA: tl.constexpr = 2 if KIND == "e5m2" else 3
    BIAS: tl.constexpr = 15 if KIND == "e5m2" else (8 if KIND == "e4m3fnuz" else 7)
    DROP: tl.constexpr = 23 - MANTISSA
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    # A carry out of the mantissa increments the exponent, which is correct.
    rounded = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number the step is constant.
    SMALL: tl.constexpr = 2.0 ** (1 - BIAS)
    STEPS: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)
    code = tl.where(magnitude < SMALL, round_even(magnitude * STEPS).to(tl.int32), normal)
    negative = x < 0
    if KIND == "e4m3fnuz":
        negative = negative & (code != 0)  # 0x80 is NaN there
    return (code | (negative.to(tl.int32) << 7)).to(tl.uint8)


@triton.jit
def quant_rows_kernel(
    x_ptr, q_ptr, s_ptr, K, stride_xm, stride_xk,
    KIND: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    peak = tl.zeros((), tl.float32)
    bad = tl.zeros((), tl.int32)
    x = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * stride_xm + (k0 + cols) * stride_xk, mask=k0 + cols < K, other=0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(x), axis=0))
        # NaN compares false, so this is nonzero for NaN and infinity, whatever max does with NaN.
        bad += tl.sum((tl.abs(x) <= 3.4028234e38).to(tl.int32), axis=0) - BLOCK
    # At least the smallest normal fp32, so that the division is defined for rows of subnormal numbers.
    scale = tl.where(peak == 0, 1.0, tl.maximum(peak / LIMIT, 1.1754944e-38))
    for k0 in range(0, K, BLOCK):
        if not ONE_PASS:
            x = tl.load(x_ptr + row * stride_xm + (k0 + cols) * stride_xk, mask=k0 + cols < K, other=0).to(tl.float32)
        y = tl.where(bad == 0, x / scale, 0.0)
        y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
        code = round_even(y).to(tl.int8) if KIND == "int8" else encode_fp8(y, KIND)
        tl.store(q_ptr + row * K + k0 + cols, code, mask=k0 + cols < K)
    tl.store(s_ptr + row, tl.where(bad == 0, scale, float("nan")))


def quant_rows(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of dtype (int8 or float8) with x's shape, and fp32 scales of shape `x.shape[:-1]`: `x ~ codes * scale`."""
    check.check_dtype("x", x, check.FLOATS)
    device = check.check_devices(x=x)
    if dtype not in LIMITS:
        check.fail("dtype", dtype, "one of " + ", ".join(str(d) for d in LIMITS))
    if x.dim() < 1 or x.shape[-1] == 0:
        check.fail("x.shape", tuple(x.shape), "a last dimension of at least 1")
    check.check_rows("x", x)
    kind = check.FP8_KINDS.get(dtype, "int8")
    codes = torch.empty(x.shape, dtype=torch.uint8 if kind != "int8" else torch.int8, device=device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=device)
    k = x.shape[-1]
    x2 = x.reshape(-1, k)
    block = min(triton.next_power_of_2(k), MAX_BLOCK)
    with on_device(x):
        launch(
            quant_rows_kernel, (x2.shape[0],),
            x2, codes, scales, k, x2.stride(0), x2.stride(1),
            KIND=kind, LIMIT=LIMITS[dtype], BLOCK=block, ONE_PASS=k <= block, num_warps=8 if block > 2048 else 4,
        )  # fmt: skip
    return (codes if kind == "int8" else codes.view(dtype)), scales
