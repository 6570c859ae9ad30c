"""Device functions that read tiles of stored codes; all kernels of the package use them.

A tile is `[BLOCK_N, BLOCK_K]` with k in natural order, independent of the layout. `_fields.py` converts single codes and
explains KIND, `_scales.py` reads scales; its `code_form` selects the offset that is subtracted from codes of fewer than 8
bits: for symmetric weights the centre `2**(bits-1)`. With a shift that would be inaccurate: a group of equal weights has
codes 0 and any scale, and rounding `shift - centre * scale` to 16 bits loses a shift that is small compared to the scale.
"""

import triton
import triton.language as tl

from ._fields import field_to_float, field_to_int8, fp8_to_float, has_planes


@triton.jit
def _convert_field(
    words, table, FIELD: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    if tl.int8 == DTYPE:
        return field_to_int8(words, FIELD, BITS, PLANES, FORM)
    else:
        return field_to_float(words, table, FIELD, BITS, PLANES, KIND, FORM, DTYPE, PTX)


@triton.jit
def _pair(
    words, table, A: tl.constexpr, B: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    return tl.join(
        _convert_field(words, table, A, BITS, PLANES, KIND, FORM, DTYPE, PTX),
        _convert_field(words, table, B, BITS, PLANES, KIND, FORM, DTYPE, PTX),
    )


@triton.jit
def _interleave(
    words, table, FIELDS: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr,
    KIND: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """All fields of the words in DTYPE, on new last axes, in order."""
    if FIELDS == 2:
        return _pair(words, table, 0, 1, BITS, PLANES, KIND, FORM, DTYPE, PTX)
    elif FIELDS == 4:
        even = _pair(words, table, 0, 2, BITS, PLANES, KIND, FORM, DTYPE, PTX)
        odd = _pair(words, table, 1, 3, BITS, PLANES, KIND, FORM, DTYPE, PTX)
        return tl.join(even, odd)
    else:
        f0 = _pair(words, table, 0, 4, BITS, PLANES, KIND, FORM, DTYPE, PTX)
        f1 = _pair(words, table, 1, 5, BITS, PLANES, KIND, FORM, DTYPE, PTX)
        f2 = _pair(words, table, 2, 6, BITS, PLANES, KIND, FORM, DTYPE, PTX)
        f3 = _pair(words, table, 3, 7, BITS, PLANES, KIND, FORM, DTYPE, PTX)
        return tl.join(tl.join(f0, f2), tl.join(f1, f3))


@triton.jit
def row_starts(q_ptr, rn, N, stride_qn):
    """Pointers to rows; past the end to the last one, which costs less than a mask on every load."""
    return q_ptr + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * stride_qn


@triton.jit
def load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """The `[BLOCK_N, BLOCK_K / FIELDS]` stored words of k0 .. k0 + BLOCK_K."""
    rw = k0 // FIELDS + tl.arange(0, BLOCK_K // FIELDS)
    words = row_starts(q_ptr, rn, N, stride_qn) + rw[None, :]
    if EVEN_K:
        return tl.load(words)
    else:
        return tl.load(words, mask=(rw < (K + FIELDS - 1) // FIELDS)[None, :], other=0)


@triton.constexpr_function
def exec_fields(bits: int) -> int:
    """Fields of one block of the execution layout, each of 32 consecutive k."""
    return 4 if bits in (4, 6) else 8


@triton.jit
def _load_plane(base, mask, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(base).to(tl.int16)
    else:
        return tl.load(base, mask=mask, other=0).to(tl.int16)


@triton.jit
def load_exec(
    q_ptr, rn, k0, N, stride_qn, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """The int16 words of the execution layout; of several planes a tuple, words of the low bits first: see `layout.py`."""
    FIELDS: tl.constexpr = exec_fields(BITS)
    if not has_planes(BITS):
        return load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS, BLOCK_K, EVEN_K)
    else:
        BLOCK: tl.constexpr = 32 * FIELDS
        BYTES: tl.constexpr = BLOCK * BITS // 8
        rw = tl.arange(0, BLOCK_K // FIELDS)
        block = k0 // BLOCK + rw // 32
        mask = (block < K // BLOCK)[None, :]
        rows = row_starts(q_ptr, rn, N, stride_qn)
        words = rows + (block * (BYTES // 2) + rw % 32)[None, :]
        bytes_ = rows.to(tl.pointer_type(tl.uint8)) + (block * BYTES + rw % 32)[None, :]
        low = _load_plane(words, mask, EVEN_K)
        if BITS == 3 or BITS == 6:
            return low, _load_plane(bytes_ + 64, mask, EVEN_K)
        elif BITS == 5:
            return low, _load_plane(words + 32, mask, EVEN_K), _load_plane(bytes_ + 128, mask, EVEN_K)
        else:
            two = _load_plane(words + 64, mask, EVEN_K)
            return low, _load_plane(words + 32, mask, EVEN_K), two, _load_plane(bytes_ + 192, mask, EVEN_K)


@triton.jit
def load_quads(
    q_ptr, rn, k0, N, stride_qn, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """`[BLOCK_N, BLOCK_K / 4]` int32 words, each with 4 adjacent codes in its low bits. BITS: 3, 5, 6 or 7.

    4 codes of 6 bits are 3 bytes; of odd widths they begin and end within a byte for every second word.
    """
    BYTES: tl.constexpr = (4 * BITS + 4) // 8
    bit = (k0 // 4 + tl.arange(0, BLOCK_K // 4)) * (4 * BITS)
    first = bit >> 3
    rows = row_starts(q_ptr, rn, N, stride_qn)
    word = tl.zeros((1, 1), tl.int32)
    for i in tl.static_range(BYTES):
        if EVEN_K:
            byte = tl.load(rows + (first + i)[None, :])
        else:
            byte = tl.load(rows + (first + i)[None, :], mask=(first + i < (K * BITS + 7) // 8)[None, :], other=0)
        word = word | (byte.to(tl.int32) << (8 * i))
    return word >> (bit & 7)[None, :]


@triton.jit
def load_codes(
    q_ptr, table, rn, k0, N, K, stride_qn,
    BITS: tl.constexpr, KIND: tl.constexpr, EXEC: tl.constexpr, FORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A `[BLOCK_N, BLOCK_K]` tile of codes in DTYPE; rows and columns outside the weight are arbitrary but finite.

    EXEC: q_ptr points to int16 words in execution layout. FORM: see `code_form`. table: pointer to the values of a codebook.
    """
    if BITS == 8:
        raw = load_words(q_ptr, rn, k0, N, stride_qn, K, 1, BLOCK_K, EVEN_K)
        return raw.to(DTYPE) if KIND == "" or KIND == "u8" else fp8_to_float(raw, KIND, DTYPE)
    elif EXEC:
        FIELDS: tl.constexpr = exec_fields(BITS)
        words = load_exec(q_ptr, rn, k0, N, stride_qn, K, BITS, BLOCK_K, EVEN_K)
        tile = _interleave(words, table, FIELDS, BITS, has_planes(BITS), KIND, FORM, DTYPE, PTX)
        tile = tl.reshape(tile, [BLOCK_N, BLOCK_K // (32 * FIELDS), 32, FIELDS])
        return tl.reshape(tl.permute(tile, [0, 1, 3, 2]), [BLOCK_N, BLOCK_K])
    elif 8 % BITS == 0:
        PER_BYTE: tl.constexpr = 8 // BITS
        words = load_words(q_ptr, rn, k0, N, stride_qn, K, PER_BYTE, BLOCK_K, EVEN_K).to(tl.int16)
        tile = _interleave(words, table, PER_BYTE, BITS, False, KIND, FORM, DTYPE, PTX and KIND != "table")
        return tl.reshape(tile, [BLOCK_N, BLOCK_K])
    else:
        words = load_quads(q_ptr, rn, k0, N, stride_qn, K, BITS, BLOCK_K, EVEN_K)
        return tl.reshape(_interleave(words, table, 4, BITS, False, KIND, FORM, DTYPE, False), [BLOCK_N, BLOCK_K])
