"""The main loop of the weight-quantized GEMMs: a tile of `x @ W^T` in fp32.

    W[n, k] = scale[n, g] * code[n, k] - shift[n, g],   g = k // group

Decoding is bound by instructions, not by memory: an H200 has about 4 for each 4-bit weight that it loads. Where scale and
shift are applied (SCALE) decides most of them:

"end"     one group a row: `y = scale * (x . code) - shift * sum(x)`, once after the loop.
"after"   the exact codes are multiplied, and each group's sums in fp32: `y += scale * (x . code) - shift * sum(x)`. This is
          one fma for each *result* and group instead of one for each weight, and it does not round weights to x's dtype.
"before"  `scale * code - shift` is rounded to x's dtype, then multiplied. For many columns, whose sums would need twice the
          registers, and for groups that a tile does not fit.

"after" needs the sums of each group by themselves, but a matrix instruction that sums 128 or 256 products is fastest. With
few rows there is a way to have both: the instruction multiplies 16 columns at least, while x has, say, one row. So x is laid
out in SLOTS, columns for each group: column `slot * BLOCK_M + m` has row m of x where k is in group number `slot` of the
tile, and zeros elsewhere. One instruction then leaves the sums of each group in columns of their own, and they are added
once at the end. The zeros are not read from memory.

The sums of x, for the shift, are computed from a second, small tile of x: in the first each row is there many times.
"""

import triton
import triton.language as tl

from ._decode import load_codes, load_exec
from ._fields import field_to_float, has_planes, open_table
from ._scales import code_form, from_zero, load_scales, natural_rows, rows_of_tile, scale_codes, scales_of_codes


@triton.constexpr_function
def span_of(group: int, block_k: int, depth: int, by_field: bool) -> int:
    """Number of k for which scales are loaded together: a whole tile, or the fields of one group."""
    if not by_field or not group:
        return block_k
    return min(group, block_k) if group % depth == 0 and (group % block_k == 0 or block_k % group == 0) else depth


@triton.jit
def _load_x(x_rows, k, K, mask, stride_xk, STEP: tl.constexpr, EVEN_K: tl.constexpr):
    rk = k + tl.arange(0, STEP)
    if not EVEN_K:
        mask = mask & (rk < K)[None, :]
    return tl.load(x_rows + rk.to(tl.int64)[None, :] * stride_xk, mask=mask, other=0)


@triton.jit
def _multiply(w, x, acc, LEFT: tl.constexpr):
    """`w @ x^T + acc`, `[BLOCK_N, COLUMNS]`."""
    if LEFT:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.trans(tl.dot(x, tl.trans(w), tl.trans(acc), input_precision="ieee"))


@triton.jit
def _over_slots(scales, BLOCK_M: tl.constexpr):
    """`[BLOCK_N, SLOTS]` repeated for the columns of each slot; `[BLOCK_N, 1]` stays as it is."""
    ROWS: tl.constexpr = scales.shape[0]
    SLOTS: tl.constexpr = scales.shape[1]
    if SLOTS > 1:
        return tl.reshape(tl.broadcast_to(scales[:, :, None], [ROWS, SLOTS, BLOCK_M]), [ROWS, SLOTS * BLOCK_M])
    else:
        return scales


@triton.jit
def accumulate(
    x_ptr, q_ptr, s_ptr, z_ptr, t_ptr, m0, m_end, n0, first_step, end_step, N, K,
    stride_xm, stride_xk, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
    SCALE: tl.constexpr, LEFT: tl.constexpr, BY_FIELD: tl.constexpr, PAIRS: tl.constexpr, EVEN_K: tl.constexpr,
    STAGES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The `[BLOCK_M, BLOCK_N]` tile at (m0, n0) of `x @ W^T` in fp32, over the steps of BLOCK_K from first_step on.

    DEPTH: of one matrix multiplication; BY_FIELD: that of a field of 32 consecutive k. STAGES: tiles that are loaded in
    advance, also of scales. Other arguments: see the head of this file.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    DECODED: tl.constexpr = code_form(BITS, KIND, AFFINE, GROUP, DTYPE, s_ptr.dtype.element_ty, z_ptr.dtype.element_ty)
    # fp32 holds scale and shift of codes as stored.
    FORM: tl.constexpr = "plain" if SCALE == "after" and DECODED == "magic" else DECODED
    SPAN: tl.constexpr = span_of(GROUP, BLOCK_K, DEPTH, BY_FIELD)
    COLUMNS: tl.constexpr = BLOCK_M * SLOTS
    ORDER: tl.constexpr = "paired"
    table = open_table(t_ptr, BITS, KIND, EXEC, DTYPE, PTX)
    rn = rows_of_tile(n0, N, BLOCK_N, ORDER)
    groups = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    columns = tl.arange(0, COLUMNS)
    rm = m0 + columns % BLOCK_M
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * stride_xm
    m_mask = (rm < m_end)[:, None]
    few_m = m0 + tl.arange(0, BLOCK_M)
    few_rows, few_mask = x_ptr + few_m.to(tl.int64)[:, None] * stride_xm, (few_m < m_end)[:, None]
    acc = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
    x_sum = tl.zeros((COLUMNS,), tl.float32)
    if SCALE == "end" and AFFINE:
        scale = load_scales(s_ptr, n0, N, 0, 1, stride_sn, stride_sg, 1, BLOCK_N, PAIRS, ORDER)
        shift = load_scales(z_ptr, n0, N, 0, 1, stride_zn, stride_zg, 1, BLOCK_N, PAIRS, ORDER)
        if FORM == "magic":
            offset, shift = from_zero(scale, shift, BITS, DTYPE)
    for step in tl.range(first_step, end_step, num_stages=STAGES):
        k0 = step * BLOCK_K
        if BY_FIELD:
            words = load_exec(q_ptr, rn, k0, N, stride_qn, K, BITS, BLOCK_K, EVEN_K)
        part = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
        for i in tl.static_range(BLOCK_K // DEPTH):
            k = k0 + i * DEPTH
            x_mask = m_mask
            if SLOTS > 1:
                slot = (i * DEPTH + tl.arange(0, DEPTH)) // GROUP
                x_mask = m_mask & (slot[None, :] == (columns // BLOCK_M)[:, None])
            x = _load_x(x_rows, k, K, x_mask, stride_xk, DEPTH, EVEN_K)
            if BY_FIELD:
                w = field_to_float(words, table, i, BITS, has_planes(BITS), KIND, FORM, DTYPE, PTX)
            else:
                w = load_codes(
                    q_ptr, table, rn, k, N, K, stride_qn, BITS, KIND, EXEC, FORM, BLOCK_N, DEPTH, DTYPE, EVEN_K, PTX
                )  # fmt: skip
            if SCALE == "before":
                if i * DEPTH % SPAN == 0:
                    scales = scales_of_codes(
                        s_ptr, z_ptr, n0, k, N, K, stride_sn, stride_sg, stride_zn, stride_zg,
                        BITS, GROUP, AFFINE, FORM, BLOCK_N, SPAN, DTYPE, PAIRS, ORDER,
                    )  # fmt: skip
                w = scale_codes(w, scales, AFFINE, FORM)
            elif SCALE == "end" and AFFINE:
                if FORM == "magic":
                    w = w - offset
                x_sum += tl.sum(x.to(tl.float32), axis=1)
            if SCALE == "after":
                part = _multiply(w, x, part, LEFT)
                if (i + 1) * DEPTH % SPAN == 0:
                    begin = k0 + (i + 1) * DEPTH - SPAN
                    group = begin // GROUP
                    scale = load_scales(s_ptr, n0, N, group, groups, stride_sn, stride_sg, SLOTS, BLOCK_N, PAIRS, ORDER)
                    acc += part * _over_slots(scale, BLOCK_M)
                    if AFFINE:
                        shift = load_scales(
                            z_ptr, n0, N, group, groups, stride_zn, stride_zg, SLOTS, BLOCK_N, PAIRS, ORDER
                        )  # fmt: skip
                        few = _load_x(few_rows, begin, K, few_mask, stride_xk, SPAN, EVEN_K).to(tl.float32)
                        sums = tl.sum(tl.reshape(few, [BLOCK_M, SLOTS, SPAN // SLOTS]), axis=2)
                        acc -= _over_slots(shift, BLOCK_M) * tl.reshape(tl.trans(sums), [COLUMNS])[None, :]
                    part = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
            else:
                acc = _multiply(w, x, acc, LEFT)
    if SCALE == "end":
        if not AFFINE:
            scale = load_scales(s_ptr, n0, N, 0, 1, stride_sn, stride_sg, 1, BLOCK_N, PAIRS, ORDER)
        acc = acc * scale
        if AFFINE:
            acc = acc - shift * x_sum[None, :]
    acc = natural_rows(acc)
    if SLOTS > 1:
        acc = tl.sum(tl.reshape(acc, [BLOCK_N, SLOTS, BLOCK_M]), axis=1)
    return tl.trans(acc)
