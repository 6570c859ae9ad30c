"""Device functions that turn stored codes into numbers; every kernel of the package goes through these.

A tile comes out as `[BLOCK_N, BLOCK_K]` with k in its natural order and sub-byte codes centred (`code - 2**(bits-1)`),
so that no caller needs to know in which order the bytes lie. Centred codes of 2, 4 and 8 bits are exact in fp16 and bf16.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def lop3_asm(field: int, bits: int, bf16: bool) -> str:
    """PTX for two 16-bit words at once: shift, mask and exponent in one lop3, then one fma removes the offset.

    `0xEA` is the truth table of `(a & b) | c`. The fma form of the subtraction exists for bf16 from sm_80 on, a plain
    subtraction only from sm_90 on.
    """
    mask = (1 << bits) - 1
    magic, one = (0x4300, 0x3F80) if bf16 else (0x6400, 0x3C00)
    offset = (0xC300 if bf16 else 0xE400) | (1 << (bits - 1))  # -(128 + centre) or -(1024 + centre)
    kind = "bf16x2" if bf16 else "f16x2"
    return f"""{{
    .reg .b32 t, u, v;
    shr.u32 t, $1, {field * bits};
    lop3.b32 t, t, {mask * 0x10001:#x}, {magic * 0x10001:#x}, 0xEA;
    mov.b32 u, {one * 0x10001:#x};
    mov.b32 v, {offset * 0x10001:#x};
    fma.rn.{kind} $0, t, u, v;
    }}"""


@triton.jit
def field_to_float(words, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Field number FIELD of each int16 word as `code - 2**(BITS-1)` in DTYPE, without an integer-to-float cast.

    `0x6400 | q` is 1024 + q in fp16 and `0x4300 | q` is 128 + q in bf16 (Kim et al. 2022, "Who says elephants can't
    run"): the subtraction that follows is exact.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    if tl.float32 == DTYPE:
        return (((words >> (FIELD * BITS)) & MASK) - CENTRE).to(tl.float32)
    elif PTX:
        # The builtin takes a plain dtype only, not a constexpr that holds one.
        if tl.bfloat16 == DTYPE:
            BF16: tl.constexpr = lop3_asm(FIELD, BITS, True)
            return tl.inline_asm_elementwise(BF16, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            FP16: tl.constexpr = lop3_asm(FIELD, BITS, False)
            return tl.inline_asm_elementwise(FP16, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        MAGIC: tl.constexpr = 0x4300 if tl.bfloat16 == DTYPE else 0x6400
        OFFSET: tl.constexpr = (128 if tl.bfloat16 == DTYPE else 1024) + CENTRE
        bits = (((words >> (FIELD * BITS)) & MASK) | MAGIC).to(tl.int16)
        return bits.to(DTYPE, bitcast=True) - tl.full([1, 1], OFFSET, DTYPE)


@triton.jit
def field_to_int8(words, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Field number FIELD of each int16 word as a centred int8."""
    return (((words >> (FIELD * BITS)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))).to(tl.int8)


@triton.jit
def fp8_to_float(codes, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 bit patterns of a float8 kind as DTYPE, exactly, NaN kept.

    "native e4m3fn" leaves it to the hardware (sm_89 and newer). The others need none: the bits are moved into the
    wider format's fields and the exponent bias is repaired by one multiplication with a power of two, which also
    normalizes the subnormal codes.
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
def _convert_field(words, FIELD: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    if tl.int8 == DTYPE:
        return field_to_int8(words, FIELD, BITS)
    else:
        return field_to_float(words, FIELD, BITS, DTYPE, PTX)


@triton.jit
def _interleave(words, FIELDS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """All fields of the words on new trailing axes of two, which read in row-major order give field 0, 1, 2, ..."""
    if FIELDS == 2:
        return tl.join(_convert_field(words, 0, BITS, DTYPE, PTX), _convert_field(words, 1, BITS, DTYPE, PTX))
    elif FIELDS == 4:
        even = tl.join(_convert_field(words, 0, BITS, DTYPE, PTX), _convert_field(words, 2, BITS, DTYPE, PTX))
        odd = tl.join(_convert_field(words, 1, BITS, DTYPE, PTX), _convert_field(words, 3, BITS, DTYPE, PTX))
        return tl.join(even, odd)
    else:
        f0 = tl.join(_convert_field(words, 0, BITS, DTYPE, PTX), _convert_field(words, 4, BITS, DTYPE, PTX))
        f1 = tl.join(_convert_field(words, 1, BITS, DTYPE, PTX), _convert_field(words, 5, BITS, DTYPE, PTX))
        f2 = tl.join(_convert_field(words, 2, BITS, DTYPE, PTX), _convert_field(words, 6, BITS, DTYPE, PTX))
        f3 = tl.join(_convert_field(words, 3, BITS, DTYPE, PTX), _convert_field(words, 7, BITS, DTYPE, PTX))
        return tl.join(tl.join(f0, f2), tl.join(f1, f3))


@triton.jit
def load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """The `[BLOCK_N, BLOCK_K / FIELDS]` storage elements that hold k0 .. k0 + BLOCK_K."""
    rw = k0 // FIELDS + tl.arange(0, BLOCK_K // FIELDS)
    mask = (rn < N)[:, None]
    if not EVEN_K:
        mask = mask & (rw < (K + FIELDS - 1) // FIELDS)[None, :]
    return tl.load(q_ptr + rn.to(tl.int64)[:, None] * stride_qn + rw[None, :], mask=mask, other=0)


@triton.jit
def load_codes(
    q_ptr, rn, k0, N, K, stride_qn,
    BITS: tl.constexpr, FP8: tl.constexpr, EXEC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A `[BLOCK_N, BLOCK_K]` tile of centred codes in DTYPE; rows and columns outside the weight are arbitrary but finite.

    FP8 is "" or the float8 kind. EXEC says that q_ptr points to int16 words in execution layout.
    """
    if BITS == 8:
        raw = load_words(q_ptr, rn, k0, N, stride_qn, K, 1, BLOCK_K, EVEN_K)
        return raw.to(DTYPE) if FP8 == "" else fp8_to_float(raw, FP8, DTYPE)
    elif EXEC:
        FIELDS: tl.constexpr = 16 // BITS
        words = load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS, BLOCK_K, EVEN_K)
        tile = _interleave(words, FIELDS, BITS, DTYPE, PTX)
        tile = tl.reshape(tile, [BLOCK_N, BLOCK_K // (32 * FIELDS), 32, FIELDS])
        return tl.reshape(tl.permute(tile, [0, 1, 3, 2]), [BLOCK_N, BLOCK_K])
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        words = load_words(q_ptr, rn, k0, N, stride_qn, K, PER_BYTE, BLOCK_K, EVEN_K).to(tl.int16)
        return tl.reshape(_interleave(words, PER_BYTE, BITS, DTYPE, PTX), [BLOCK_N, BLOCK_K])


@triton.jit
def load_group(
    ptr, rn, k0, N, K, stride_n,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scale or shift of the tile at k0 in fp32: `[BLOCK_N, 1]` if it lies in one group, else `[BLOCK_N, BLOCK_K]`.

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
        # A group that is no power of two: right, and slower by one cached load per element.
        rk = k0 + tl.arange(0, BLOCK_K)
        return tl.load(rows + (rk // GROUP)[None, :], mask=n_mask & (rk < K)[None, :], other=0).to(tl.float32)


@triton.jit
def scale_codes(
    codes, s_ptr, z_ptr, rn, k0, N, K, stride_sn, stride_zn,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`scale * code - shift` of a tile of centred codes, in DTYPE.

    The centre is folded into the shift in fp32 before anything is rounded: one fma a weight remains.
    """
    scale = load_group(s_ptr, rn, k0, N, K, stride_sn, GROUP, BLOCK_N, BLOCK_K)
    if AFFINE:
        shift = load_group(z_ptr, rn, k0, N, K, stride_zn, GROUP, BLOCK_N, BLOCK_K)
        if BITS < 8:
            shift = shift - scale * (1 << (BITS - 1))
        return codes * scale.to(DTYPE) - shift.to(DTYPE)
    else:
        return codes * scale.to(DTYPE)
