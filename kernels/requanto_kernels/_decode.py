"""Device functions that convert stored codes to numbers; all kernels of the package use them.

A tile is `[BLOCK_N, BLOCK_K]` with k in natural order, independent of the layout. Codes of 2, 4 and 8 bits are exact in
fp16 and bf16. `code_form` selects the offset that is subtracted from sub-byte codes: for symmetric weights the centre
`2**(bits-1)`. With a shift that would be inaccurate: a group of equal weights has codes 0 and any scale, and rounding
`shift - centre * scale` to 16 bits loses a shift that is small compared to the scale.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def code_form(bits: int, fp8: str, affine: bool, group: int, dtype, scale_dtype, shift_dtype) -> str:
    """The offset of the sub-byte codes that a kernel computes with; "e2m1" for small floats, which have none.

    "centred": the centre is subtracted, for symmetric weights. "plain": as stored, if dtype holds scale and shift exactly,
    so that `scale * code - shift` rounds once. "magic": the magic number is still added; the code that applies scale and
    shift subtracts it together with the offset of `from_zero`. Rounding scale or shift from fp32 then costs no more
    accuracy than with centred codes, if the weights are around zero.
    """
    if bits == 8:
        return "plain"
    if fp8 == "e2m1":
        return "e2m1"
    if not affine:
        return "centred"
    exact = dtype.is_fp32() or (scale_dtype == dtype and shift_dtype == dtype)
    return "plain" if group and exact else "magic"


@triton.constexpr_function
def magic_number(dtype) -> int:
    """The number that `field_to_float` adds to a code."""
    return 0 if dtype.is_fp32() else 128 if dtype.is_bf16() else 1024


@triton.constexpr_function
def lop3_asm(field: int, bits: int, bf16: bool, form: str) -> str:
    """PTX for two 16-bit words at once: a shift, one lop3 for mask and exponent, one fma to subtract the offset.

    `0xEA` is the truth table of `(a & b) | c`. The subtraction is an fma since bf16 has fma from sm_80 on, but a subtraction
    only from sm_90 on.
    """
    mask = (1 << bits) - 1
    magic, one = (0x4300, 0x3F80) if bf16 else (0x6400, 0x3C00)
    offset = (0xC300 if bf16 else 0xE400) | (1 << (bits - 1) if form == "centred" else 0)  # -(128 + centre), say
    if form == "magic":
        return f"""{{
    .reg .b32 t;
    shr.u32 t, $1, {field * bits};
    lop3.b32 $0, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xEA;
    }}"""
    kind = "bf16x2" if bf16 else "f16x2"
    return f"""{{
    .reg .b32 t, u, v;
    shr.u32 t, $1, {field * bits};
    lop3.b32 t, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xEA;
    mov.b32 u, {one * 0x10001:#x};
    mov.b32 v, {offset * 0x10001:#x};
    fma.rn.{kind} $0, t, u, v;
    }}"""


@triton.constexpr_function
def e2m1_asm(field: int, bf16: bool) -> str:
    """PTX for two 16-bit words at once: the sign, exponent and mantissa to their places, one fma to correct the exponent.

    `0xEA` is the truth table of `(a & b) | c`. The fma adds -0, which keeps the sign of a zero.
    """
    place, factor, kind = (6, 0x7E80, "bf16x2") if bf16 else (9, 0x7400, "f16x2")  # 2^126, 2^14
    signs, rest = 12 - 4 * field, place - 4 * field
    return f"""{{
    .reg .b32 s, t, u, v;
    shl.b32 s, $1, {signs};
    and.b32 s, s, 0x80008000;
    {"shl" if rest > 0 else "shr"}.b32 t, $1, {abs(rest)};
    lop3.b32 t, t, {(7 << place) * 0x10001:#x}, s, 0xEA;
    mov.b32 u, {factor * 0x10001:#x};
    mov.b32 v, 0x80008000;
    fma.rn.{kind} $0, t, u, v;
    }}"""


@triton.jit
def e2m1_to_float(codes, DTYPE: tl.constexpr):
    """The low 4 bits of int16 words, an e2m1 number each, as DTYPE, exactly.

    As in `fp8_to_float`, the bits become those of a wider format, and a power of two corrects the exponent's bias.
    """
    u = codes.to(tl.int16)
    sign = (u & 8) << 12
    if tl.bfloat16 == DTYPE:
        value = (sign | ((u & 7) << 6)).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return value * tl.full([1, 1], 2.0**126, tl.bfloat16)
    else:
        value = (sign | ((u & 7) << 9)).to(tl.int16).to(tl.float16, bitcast=True)
        return (value * tl.full([1, 1], 16384.0, tl.float16)).to(DTYPE)


@triton.jit
def field_to_float(
    words, FIELD: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Field number FIELD of each int16 word in DTYPE, without an integer-to-float cast. FORM: see `code_form`.

    `0x6400 | q` is 1024 + q in fp16 and `0x4300 | q` is 128 + q in bf16 (Kim et al. 2022, "Who says elephants can't
    run"), so the subtraction that follows is exact.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    CENTRE: tl.constexpr = 1 << (BITS - 1) if FORM == "centred" else 0
    if FORM == "e2m1":
        if PTX:
            if tl.bfloat16 == DTYPE:
                E2M1_BF16: tl.constexpr = e2m1_asm(FIELD, True)
                return tl.inline_asm_elementwise(E2M1_BF16, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
            else:
                E2M1_FP16: tl.constexpr = e2m1_asm(FIELD, False)
                return tl.inline_asm_elementwise(E2M1_FP16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        else:
            return e2m1_to_float(words >> (FIELD * BITS), DTYPE)
    elif tl.float32 == DTYPE:
        return (((words >> (FIELD * BITS)) & MASK) - CENTRE).to(tl.float32)
    elif PTX:
        # The builtin accepts a dtype, but not a constexpr of one.
        if tl.bfloat16 == DTYPE:
            BF16: tl.constexpr = lop3_asm(FIELD, BITS, True, FORM)
            return tl.inline_asm_elementwise(BF16, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            FP16: tl.constexpr = lop3_asm(FIELD, BITS, False, FORM)
            return tl.inline_asm_elementwise(FP16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        MAGIC: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        OFFSET: tl.constexpr = magic_number(DTYPE) + CENTRE
        bits = (((words >> (FIELD * BITS)) & MASK) | MAGIC).to(tl.int16)
        value = bits.to(DTYPE, bitcast=True)
        return value if FORM == "magic" else value - tl.full([1, 1], OFFSET, DTYPE)


@triton.jit
def field_to_int8(words, FIELD: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr):
    """Field number FIELD of each int16 word as int8, "centred" or "plain"."""
    CENTRE: tl.constexpr = 1 << (BITS - 1) if FORM == "centred" else 0
    return (((words >> (FIELD * BITS)) & ((1 << BITS) - 1)) - CENTRE).to(tl.int8)


@triton.jit
def fp8_to_float(codes, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 bit patterns of a float8 kind as DTYPE, exactly, including NaN.

    "native e4m3fn" uses the hardware conversion (sm_89 and newer). The others shift the bits into the fields of the wider
    format and correct the exponent bias by multiplying with a power of two, which also normalizes subnormal codes.
    """
    u = codes.to(tl.int16)
    if KIND == "native e4m3fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    elif KIND == "e5m2":
        return (u << 8).to(tl.float16, bitcast=True).to(tl.float32).to(DTYPE)
    else:
        magnitude = u & 0x7F
        sign = (u & 0x80) << 8
        if tl.bfloat16 == DTYPE:
            REPAIR: tl.constexpr = 2.0**119 if KIND == "e4m3fnuz" else 2.0**120
            value = (sign | (magnitude << 4)).to(tl.int16).to(tl.bfloat16, bitcast=True)
            value = value * tl.full([1, 1], REPAIR, tl.bfloat16)
        else:
            REPAIR16: tl.constexpr = 128.0 if KIND == "e4m3fnuz" else 256.0
            value = (sign | (magnitude << 7)).to(tl.int16).to(tl.float16, bitcast=True)
            value = (value * tl.full([1, 1], REPAIR16, tl.float16)).to(DTYPE)
        nan = (u & 0xFF) == 0x80 if KIND == "e4m3fnuz" else magnitude == 0x7F
        return tl.where(nan, tl.full([1, 1], float("nan"), DTYPE), value)


@triton.jit
def _convert_field(
    words, FIELD: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    if tl.int8 == DTYPE:
        return field_to_int8(words, FIELD, BITS, FORM)
    else:
        return field_to_float(words, FIELD, BITS, FORM, DTYPE, PTX)


@triton.jit
def _interleave(
    words, FIELDS: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """All fields of the words, on new last axes of size 2 that are in row-major order of the fields 0, 1, 2, ..."""
    if FIELDS == 2:
        return tl.join(
            _convert_field(words, 0, BITS, FORM, DTYPE, PTX), _convert_field(words, 1, BITS, FORM, DTYPE, PTX)
        )
    elif FIELDS == 4:
        even = tl.join(
            _convert_field(words, 0, BITS, FORM, DTYPE, PTX), _convert_field(words, 2, BITS, FORM, DTYPE, PTX)
        )
        odd = tl.join(
            _convert_field(words, 1, BITS, FORM, DTYPE, PTX), _convert_field(words, 3, BITS, FORM, DTYPE, PTX)
        )
        return tl.join(even, odd)
    else:
        f0 = tl.join(_convert_field(words, 0, BITS, FORM, DTYPE, PTX), _convert_field(words, 4, BITS, FORM, DTYPE, PTX))
        f1 = tl.join(_convert_field(words, 1, BITS, FORM, DTYPE, PTX), _convert_field(words, 5, BITS, FORM, DTYPE, PTX))
        f2 = tl.join(_convert_field(words, 2, BITS, FORM, DTYPE, PTX), _convert_field(words, 6, BITS, FORM, DTYPE, PTX))
        f3 = tl.join(_convert_field(words, 3, BITS, FORM, DTYPE, PTX), _convert_field(words, 7, BITS, FORM, DTYPE, PTX))
        return tl.join(tl.join(f0, f2), tl.join(f1, f3))


@triton.jit
def load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """The `[BLOCK_N, BLOCK_K / FIELDS]` stored words of k0 .. k0 + BLOCK_K."""
    rw = k0 // FIELDS + tl.arange(0, BLOCK_K // FIELDS)
    mask = (rn < N)[:, None]
    if not EVEN_K:
        mask = mask & (rw < (K + FIELDS - 1) // FIELDS)[None, :]
    return tl.load(q_ptr + rn.to(tl.int64)[:, None] * stride_qn + rw[None, :], mask=mask, other=0)


@triton.jit
def load_codes(
    q_ptr, rn, k0, N, K, stride_qn,
    BITS: tl.constexpr, FP8: tl.constexpr, EXEC: tl.constexpr, FORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A `[BLOCK_N, BLOCK_K]` tile of codes in DTYPE; rows and columns outside the weight are arbitrary but finite.

    FP8 is "" or the float8 kind, or "e2m1" for floats of 4 bits. EXEC: q_ptr points to int16 words in execution layout.
    FORM: see `code_form`.
    """
    if BITS == 8:
        raw = load_words(q_ptr, rn, k0, N, stride_qn, K, 1, BLOCK_K, EVEN_K)
        return raw.to(DTYPE) if FP8 == "" else fp8_to_float(raw, FP8, DTYPE)
    elif EXEC:
        FIELDS: tl.constexpr = 16 // BITS
        words = load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS, BLOCK_K, EVEN_K)
        tile = _interleave(words, FIELDS, BITS, FORM, DTYPE, PTX)
        tile = tl.reshape(tile, [BLOCK_N, BLOCK_K // (32 * FIELDS), 32, FIELDS])
        return tl.reshape(tl.permute(tile, [0, 1, 3, 2]), [BLOCK_N, BLOCK_K])
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        words = load_words(q_ptr, rn, k0, N, stride_qn, K, PER_BYTE, BLOCK_K, EVEN_K).to(tl.int16)
        return tl.reshape(_interleave(words, PER_BYTE, BITS, FORM, DTYPE, PTX), [BLOCK_N, BLOCK_K])


@triton.jit
def load_group(
    ptr, rn, k0, N, K, stride_n,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scale or shift of the tile at k0 in fp32: `[BLOCK_N, 1]` if the tile is in one group, else `[BLOCK_N, BLOCK_K]`.

    GROUP 0 means one group as long as K.
    """
    rows = ptr + rn.to(tl.int64)[:, None] * stride_n
    n_mask = (rn < N)[:, None]
    if GROUP == 0:
        return tl.load(rows, mask=n_mask, other=0).to(tl.float32)
    elif GROUP % BLOCK_K == 0:
        return tl.load(rows + k0 // GROUP, mask=n_mask, other=0).to(tl.float32)
    elif BLOCK_K % GROUP == 0:
        rg = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)
        mask = n_mask & (rg < (K + GROUP - 1) // GROUP)[None, :]
        few = tl.load(rows + rg[None, :], mask=mask, other=0).to(tl.float32)
        wide = tl.broadcast_to(few[:, :, None], [BLOCK_N, BLOCK_K // GROUP, GROUP])
        return tl.reshape(wide, [BLOCK_N, BLOCK_K])
    else:
        # The group size is not a power of two: one (cached) load per element, which is slower.
        rk = k0 + tl.arange(0, BLOCK_K)
        return tl.load(rows + (rk // GROUP)[None, :], mask=n_mask & (rk < K)[None, :], other=0).to(tl.float32)


@triton.jit
def from_zero(scale, shift, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """For codes in "magic" form: (offset to subtract from the codes, remaining shift).

    Besides the magic number, the offset contains 0 or the centre, whichever leaves the smaller shift. So the remaining shift
    is small if the weights are around zero, and is the stored one if all are equal and small compared to the scale.
    """
    MAGIC: tl.constexpr = magic_number(DTYPE)
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    centred = shift - scale * CENTRE
    stored = tl.abs(shift) < tl.abs(centred)
    offset = tl.where(stored, tl.full([1, 1], MAGIC, DTYPE), tl.full([1, 1], MAGIC + CENTRE, DTYPE))
    return offset, tl.where(stored, shift, centred)


@triton.jit
def scale_codes(
    codes, s_ptr, z_ptr, rn, k0, N, K, stride_sn, stride_zn,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`scale * code - shift` of a tile of codes, in DTYPE. FORM: that of the codes.

    An explicit fma: rounding the product before the subtraction would double the error.
    """
    scale = load_group(s_ptr, rn, k0, N, K, stride_sn, GROUP, BLOCK_N, BLOCK_K)
    if AFFINE:
        shift = load_group(z_ptr, rn, k0, N, K, stride_zn, GROUP, BLOCK_N, BLOCK_K)
        if FORM == "magic":
            offset, shift = from_zero(scale, shift, BITS, DTYPE)
            codes = codes - offset
        return tl.fma(codes, scale.to(DTYPE), -shift.to(DTYPE))
    else:
        return codes * scale.to(DTYPE)
