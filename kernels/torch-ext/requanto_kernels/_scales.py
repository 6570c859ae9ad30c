"""Device functions that load scales and shifts, in fp32, and apply them to tiles of codes.

Group-major scales (`[G, N]` in memory) of two bytes are loaded as pairs of adjacent rows, PAIRS: one 32-bit word is the
least that is copied asynchronously to shared memory, and so in advance. Both halves should be needed by the same thread. In
the matrix instructions of NVIDIA's GPUs, a thread that has row r of the left operand and of the result also has row r + 8.
So with ORDER "paired" row t of a tile is not row t of the weight: in each 16 rows, rows t and t + 8 of the tile are 2 t and
2 t + 1 of the weight (`rows_of_tile`). `natural_rows` puts results back, which moves nothing between threads.
"""

import triton
import triton.language as tl

from ._fields import magic_number


@triton.constexpr_function
def code_form(bits: int, kind: str, affine: bool, group: int, dtype, scale_dtype, shift_dtype) -> str:
    """The offset of the codes that a kernel computes with; "float" for small floats and codebooks, which have none.

    group: 0 if scales are applied to a whole row's sum, otherwise to codes in dtype. "centred": the centre is subtracted,
    for symmetric weights. "plain": as stored, if dtype holds scale and shift exactly, so that `scale * code - shift` rounds
    once; also float8 and signed codes of 8 bits. "magic": the magic number is still added; the code that applies scale and
    shift subtracts it together with the offset of `from_zero`. Rounding scale or shift from fp32 then costs no more
    accuracy than with centred codes, if the weights are around zero.
    """
    if bits == 8 and kind != "u8":
        return "plain"
    if kind not in ("", "u8"):
        return "float"
    if not affine:
        return "centred"
    exact = dtype.is_fp32() or (scale_dtype == dtype and shift_dtype == dtype)
    return "plain" if group and exact else "magic"


@triton.jit
def rows_of_tile(n0, N, BLOCK_N: tl.constexpr, ORDER: tl.constexpr):
    """The rows of the weight in a tile at n0, "natural" or "paired"; its last row in place of those past the end.

    Reading a row twice is cheaper than a mask on every load.
    """
    i = tl.arange(0, BLOCK_N)
    rows = i if ORDER == "natural" else i // 16 * 16 + i % 8 * 2 + i // 8 % 2
    return tl.minimum(n0 + rows, N - 1)


@triton.jit
def natural_rows(tile):
    """A tile `[BLOCK_N, COLUMNS]` of paired rows in natural order."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    return tl.reshape(tl.permute(tl.reshape(tile, [ROWS // 16, 2, 8, COLUMNS]), [0, 2, 1, 3]), [ROWS, COLUMNS])


@triton.jit
def _half(words, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """The high or the low half of int32 words, values of DTYPE, in fp32."""
    if tl.bfloat16 == DTYPE:
        return (words & -65536 if HIGH else words << 16).to(tl.float32, bitcast=True)
    else:
        return (words >> 16 if HIGH else words).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_scales(
    ptr, n0, N, group, groups, stride_n, stride_g,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr, ORDER: tl.constexpr,
    JOIN: tl.constexpr = True,
):  # fmt: skip
    """`[BLOCK_N, COUNT]` scales or shifts in fp32, of COUNT groups from `group` on, at most the last of `groups`.

    JOIN: False for scales of an operand of a matrix instruction.
    """
    rg = group + tl.arange(0, COUNT)
    if COUNT > 1:
        rg = tl.minimum(rg, groups - 1)
    if PAIRS:
        DTYPE: tl.constexpr = ptr.dtype.element_ty
        words = ptr.to(tl.pointer_type(tl.int32)) + rg.to(tl.int64)[None, :] * (stride_g // 2)
        last = N // 2 - 1
        if JOIN and ORDER == "paired":
            words = tl.load(words + tl.minimum(n0 // 2 + tl.arange(0, BLOCK_N // 2), last)[:, None])
            both = tl.join(_half(words, False, DTYPE), _half(words, True, DTYPE))
            both = tl.permute(tl.reshape(both, [BLOCK_N // 16, 8, COUNT, 2]), [0, 3, 1, 2])
            return tl.reshape(both, [BLOCK_N, COUNT])
        else:
            # Both rows of a pair read its word. In the operand of a matrix instruction a join would change how Triton
            # loads x on sm_80: without ldmatrix.
            i = tl.arange(0, BLOCK_N)
            word = i // 2 if ORDER == "natural" else i // 16 * 8 + i % 8
            high = i % 2 if ORDER == "natural" else i // 8 % 2
            words = tl.load(words + tl.minimum(n0 // 2 + word, last)[:, None])
            return tl.where((high == 1)[:, None], _half(words, True, DTYPE), _half(words, False, DTYPE))
    else:
        rows = rows_of_tile(n0, N, BLOCK_N, ORDER).to(tl.int64)[:, None] * stride_n
        return tl.load(ptr + rows + rg.to(tl.int64)[None, :] * stride_g).to(tl.float32)


@triton.jit
def from_zero(scale, shift, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """For codes in "magic" form: (offset to subtract from the codes, remaining shift).

    Besides the magic number, the offset contains 0 or the centre, whichever leaves the smaller shift. So the remaining shift
    is small if the weights are around zero, and is the stored one if all are equal and small compared to the scale.
    """
    MAGIC: tl.constexpr = magic_number(DTYPE, BITS)
    CENTRE: tl.constexpr = 1 << (BITS - 1)
    centred = shift - scale * CENTRE
    stored = tl.abs(shift) < tl.abs(centred)
    offset = tl.where(stored, tl.full([1, 1], MAGIC, DTYPE), tl.full([1, 1], MAGIC + CENTRE, DTYPE))
    return offset, tl.where(stored, shift, centred)


@triton.jit
def _over_groups(scales, BLOCK_K: tl.constexpr):
    """`[BLOCK_N, GROUPS]` repeated along K to `[BLOCK_N, BLOCK_K]`; one group stays as it is."""
    ROWS: tl.constexpr = scales.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    if GROUPS > 1:
        wide = tl.broadcast_to(scales[:, :, None], [ROWS, GROUPS, BLOCK_K // GROUPS])
        return tl.reshape(wide, [ROWS, BLOCK_K])
    else:
        return scales


@triton.jit
def _scales_of_tile(
    ptr, n0, k0, N, K, stride_n, stride_g,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """Scales or shifts of the tile at k0 in fp32, `[BLOCK_N, groups in the tile]`, or `[BLOCK_N, BLOCK_K]`."""
    if GROUP == 0:
        return load_scales(ptr, n0, N, 0, 1, stride_n, stride_g, 1, BLOCK_N, PAIRS, ORDER, False)
    elif GROUP % BLOCK_K == 0:
        return load_scales(ptr, n0, N, k0 // GROUP, 1, stride_n, stride_g, 1, BLOCK_N, PAIRS, ORDER, False)
    elif BLOCK_K % GROUP == 0:
        COUNT: tl.constexpr = BLOCK_K // GROUP
        groups = (K + GROUP - 1) // GROUP
        return load_scales(ptr, n0, N, k0 // GROUP, groups, stride_n, stride_g, COUNT, BLOCK_N, PAIRS, ORDER, False)
    else:
        # The group size is not a power of two: one (cached) load per element, which is slower.
        rows = rows_of_tile(n0, N, BLOCK_N, ORDER).to(tl.int64)[:, None] * stride_n
        groups = (tl.minimum(k0 + tl.arange(0, BLOCK_K), K - 1) // GROUP).to(tl.int64)[None, :] * stride_g
        return tl.load(ptr + rows + groups).to(tl.float32)


@triton.jit
def scales_of_codes(
    s_ptr, z_ptr, n0, k0, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, FORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PAIRS: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """What `scale_codes` takes for the tile at k0: scale, negative shift, and the offset of codes in "magic" form."""
    scale = _scales_of_tile(s_ptr, n0, k0, N, K, stride_sn, stride_sg, GROUP, BLOCK_N, BLOCK_K, PAIRS, ORDER)
    shift = scale
    offset = tl.zeros([1, 1], DTYPE)
    if AFFINE:
        shift = _scales_of_tile(z_ptr, n0, k0, N, K, stride_zn, stride_zg, GROUP, BLOCK_N, BLOCK_K, PAIRS, ORDER)
        if FORM == "magic":
            offset, shift = from_zero(scale, shift, BITS, DTYPE)
    return scale.to(DTYPE), -shift.to(DTYPE), offset


@triton.jit
def scale_codes(codes, scales, AFFINE: tl.constexpr, FORM: tl.constexpr):
    """`scale * code - shift` of a tile of codes, in their dtype. FORM: that of the codes. scales: from `scales_of_codes`.

    An explicit fma: rounding the product before the subtraction would double the error.
    """
    DEPTH: tl.constexpr = codes.shape[1]
    if AFFINE:
        if FORM == "magic":
            codes = codes - _over_groups(scales[2], DEPTH)
        return tl.fma(codes, _over_groups(scales[0], DEPTH), _over_groups(scales[1], DEPTH))
    else:
        return codes * _over_groups(scales[0], DEPTH)
