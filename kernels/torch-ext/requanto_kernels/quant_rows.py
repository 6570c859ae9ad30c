"""Per-token quantization: for each row `scale = max|x| / limit`, `code = round(x * (1 / scale))`, in one pass over memory.

With a column scale, x is `x * column` first, rounded to its own dtype. A static scale takes the place of the row's.

int8 rounds half to even within -127..127 (-128..127 with a static scale). float8 rounds to nearest even and saturates, in
integer arithmetic where the device has no such conversion, so that all devices have the same codes.

A row of zeros has scale 1 and codes 0. A row with NaN or infinity has scale NaN and codes 0, so that its row of the GEMM is
NaN rather than a plausible number; with a static scale, an infinity is the largest code, like every value out of range. A
static scale of 0 gives codes of 0.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._device import arch_of, fp8_decoder, on_device
from ._fields import fp8_to_float
from ._launch import launch

#: The largest finite value of each code type.
LIMITS = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
}
#: Most columns that a program holds in registers; longer rows are read a second time, from L2.
MAX_BLOCK = 16384


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
def _load_row(x_ptr, c_ptr, k0, cols, K, stride_xk, COLUMN: tl.constexpr):
    """Part of a row in fp32. Offsets are 64 bits wide: the stride of a transposed x may be any number."""
    inside = k0 + cols < K
    x = tl.load(x_ptr + (k0 + cols).to(tl.int64) * stride_xk, mask=inside, other=0)
    if COLUMN:
        # Rounded as torch rounds x * column.to(x.dtype): a compiled graph, which multiplies first, has the same codes.
        column = tl.load(c_ptr + k0 + cols, mask=inside, other=0).to(x.dtype).to(tl.float32)
        return (x.to(tl.float32) * column).to(x.dtype).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def quant_rows_kernel(
    x_ptr, c_ptr, static_ptr, q_ptr, s_ptr, K, stride_xm, stride_xk,
    KIND: tl.constexpr, LOWEST: tl.constexpr, LIMIT: tl.constexpr, COLUMN: tl.constexpr, STATIC: tl.constexpr,
    ROUNDED: tl.constexpr, BLOCK: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """One row per program. ROUNDED: stores `code * scale` in x's dtype instead of codes and scales."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    q_ptr += row * K
    cols = tl.arange(0, BLOCK)
    peak = tl.zeros((), tl.float32)
    bad = tl.zeros((), tl.int32)
    x = tl.zeros((BLOCK,), tl.float32)
    for k0 in range(0, K, BLOCK):
        x = _load_row(x_ptr, c_ptr, k0, cols, K, stride_xk, COLUMN)
        # NaN compares false, so that this is nonzero for NaN (and infinity), whatever max does with NaN.
        if STATIC:
            bad += tl.sum((x == x).to(tl.int32), axis=0) - BLOCK
        else:
            peak = tl.maximum(peak, tl.max(tl.abs(x), axis=0))
            bad += tl.sum((tl.abs(x) <= 3.4028234e38).to(tl.int32), axis=0) - BLOCK
    if STATIC:
        scale = tl.load(static_ptr).to(tl.float32)
        inverse = tl.div_rn(1.0, scale)
        usable = (bad == 0) & (tl.abs(inverse) <= 3.4028234e38)  # not for scales of 0, or too small to invert
    else:
        # At least the smallest normal fp32, so that the division is defined for rows of subnormal numbers.
        scale = tl.where(peak == 0, 1.0, tl.maximum(tl.div_rn(peak, LIMIT), 1.1754944e-38))
        inverse = tl.div_rn(1.0, scale)
        usable = bad == 0
    for k0 in range(0, K, BLOCK):
        if not ONE_PASS:
            x = _load_row(x_ptr, c_ptr, k0, cols, K, stride_xk, COLUMN)
        y = tl.minimum(tl.maximum(tl.where(usable, x * inverse, 0.0), LOWEST), LIMIT)
        if KIND == "int8":
            value = round_even(y)
            code = value.to(tl.int8)
        else:
            if KIND == "native e4m3fn":
                code = y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
            else:
                code = encode_fp8(y, KIND)
            if ROUNDED:
                value = fp8_to_float(code[None, :], KIND, tl.float32).reshape(BLOCK)
        if ROUNDED:
            value = tl.where(bad == 0, value * scale, float("nan")).to(q_ptr.dtype.element_ty)
            tl.store(q_ptr + k0 + cols, value, mask=k0 + cols < K)
        else:
            tl.store(q_ptr + k0 + cols, code, mask=k0 + cols < K)
    if not ROUNDED:
        tl.store(s_ptr + row, tl.where(bad == 0, scale, float("nan")))


def quant_rows(
    x: torch.Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    column: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of dtype (int8 or float8) with x's shape, and fp32 scales of shape `x.shape[:-1]`: `x ~ codes * scale`.

    column: `[K]`, multiplied with every row first. static_scale: one element, the scale of every row.
    """
    device = _checked(x, dtype, column, static_scale)
    codes = torch.empty(x.shape, dtype=torch.int8 if dtype == torch.int8 else torch.uint8, device=device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=device)
    _launch(x, dtype, column, static_scale, codes, scales)
    return (codes if dtype == torch.int8 else codes.view(dtype)), scales


def round_rows(
    x: torch.Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    column: torch.Tensor | None = None,
    static_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`codes * scale` of `quant_rows`, in x's dtype: for GEMMs of float activations that take only certain values."""
    device = _checked(x, dtype, column, static_scale)
    out = torch.empty(x.shape, dtype=x.dtype, device=device)
    _launch(x, dtype, column, static_scale, out, None)
    return out


def _checked(
    x: torch.Tensor, dtype: torch.dtype, column: torch.Tensor | None, static_scale: torch.Tensor | None
) -> torch.device:
    check.check_dtype("x", x, check.FLOATS)
    device = check.check_devices(x=x, column=column, static_scale=static_scale)
    if dtype not in LIMITS:
        check.fail("dtype", dtype, "one of " + ", ".join(str(d) for d in LIMITS))
    if x.dim() < 1 or x.shape[-1] == 0:
        check.fail("x.shape", tuple(x.shape), "a last dimension of at least 1")
    check.check_rows("x", x)
    if column is not None:
        check.check_dtype("column", column, check.FLOATS)
        check.check_shape("column", column, (x.shape[-1],))
    if static_scale is not None:
        check.check_dtype("static_scale", static_scale, check.FLOATS)
        if static_scale.numel() != 1:
            check.fail("static_scale.shape", tuple(static_scale.shape), "one element")
    return device


def _launch(
    x: torch.Tensor,
    dtype: torch.dtype,
    column: torch.Tensor | None,
    static_scale: torch.Tensor | None,
    out: torch.Tensor,
    scales: torch.Tensor | None,
) -> None:
    """Fills `out` with codes, and `scales`; without scales, with rounded values."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    block = min(triton.next_power_of_2(k), MAX_BLOCK)
    kind = check.FP8_KINDS.get(dtype, "int8")
    with on_device(x):
        launch(
            quant_rows_kernel, (rows.shape[0],),
            rows, rows if column is None else column.contiguous(), rows if static_scale is None else static_scale,
            out, rows if scales is None else scales, k, rows.stride(0), rows.stride(1),
            KIND=fp8_decoder(kind, arch_of(x.device)), LOWEST=-128.0 if kind == "int8" else -LIMITS[dtype],
            LIMIT=LIMITS[dtype], COLUMN=column is not None, STATIC=static_scale is not None, ROUNDED=scales is None,
            BLOCK=block, ONE_PASS=k <= block, num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )  # fmt: skip
