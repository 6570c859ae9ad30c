"""GEMM of sub-byte weights and int8 activations: codes are converted to int8 in registers, for the int8 tensor cores.

    y[m, n] = x_scale[m] * sum over groups g of (scale[n, g] * sum_k x[m, k] * c[n, k] - z[n, g] * sum_k x[m, k])

c is the code, centred if there is no shift z. Sums within a group are exact int32; one fp32 fma per group and output adds
them. So one multiplication must not extend over several groups: its depth is at most a group, and a tile of K in the
execution layout, whose fields are 32 consecutive k, is multiplied in several parts.

On NVIDIA GPUs four codes are extracted from a 32-bit word at once, as bytes. Centred ones are left in the high bits of each
byte, which takes one instruction less: the sums are `2**(8 - bits)` times as large, a power of two that x_scale takes back.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import _check as check
from ._decode import load_codes, load_exec, load_words
from ._device import arch_of, is_cuda, on_device, processors
from ._fields import field_to_int8, has_planes
from ._launch import launch
from ._scales import load_scales, natural_rows, rows_of_tile
from ._split import grid_of, is_last, range_of_part, store_part, sum_of_parts, workspace
from .config import Config, select, split_for


@triton.constexpr_function
def bytes_asm(field: int, bits: int, wide: bool, form: str) -> str:
    """PTX for one field of four words, as four bytes. wide: of 16 bits, $1 and $2 have two each; else of 8 bits, in $1.

    `0x6A` is the truth table of `(a & b) ^ c`: the highest bit of a byte is its sign, and flipping it subtracts the centre.
    """
    place, mask = bits * field % 8, (1 << bits) - 1
    lines = [f"prmt.b32 t, $1, $2, {'0x7531' if bits * field >= 8 else '0x6420'};" if wide else "mov.b32 t, $1;"]
    if form == "centred":
        lines += [f"shl.b32 t, t, {8 - bits - place};"] if place + bits < 8 else []
        lines.append(f"lop3.b32 $0, t, {(mask << (8 - bits)) * 0x01010101:#x}, 0x80808080, 0x6A;")
    else:
        lines += [f"shr.u32 t, t, {place};"] if place else []
        lines.append(f"and.b32 $0, t, {mask * 0x01010101:#x};")
    return "{\n.reg .b32 t;\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def unit_of(bits: int, form: str, ptx: bool) -> float:
    """What a sum of products with `_field` is to be multiplied by."""
    return 2.0 ** (bits - 8) if ptx and form == "centred" and bits in (1, 2, 4) else 1.0


@triton.jit
def _field(words, FIELD: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, FORM: tl.constexpr, PTX: tl.constexpr):
    """One field of each word as int8, divided by `unit_of`. WIDE: words of the execution layout, else bytes."""
    if PTX and not (WIDE and has_planes(BITS)):
        ASM: tl.constexpr = bytes_asm(FIELD, BITS, WIDE, FORM)
        REGISTERS: tl.constexpr = "=r,r,r" if WIDE else "=r,r"
        return tl.inline_asm_elementwise(ASM, REGISTERS, [words], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return field_to_int8(words, FIELD, BITS, WIDE and has_planes(BITS), FORM)


@triton.jit
def _joined(
    words, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr, FORM: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """COUNT fields of each word, in order, on a new last axis."""
    if COUNT == 1:
        return _field(words, FIRST, BITS, WIDE, FORM, PTX)[:, :, None]
    else:
        HALF: tl.constexpr = COUNT // 2
        low = _joined(words, FIRST, HALF, BITS, WIDE, FORM, PTX)
        high = _joined(words, FIRST + HALF, HALF, BITS, WIDE, FORM, PTX)
        ROWS: tl.constexpr = low.shape[0]
        WORDS: tl.constexpr = low.shape[1]
        return tl.reshape(tl.permute(tl.join(low, high), [0, 1, 3, 2]), [ROWS, WORDS, COUNT])


@triton.jit
def _exec_tile(
    words, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, 32 * COUNT]` codes of the fields from FIRST on, of one block of the execution layout."""
    tile = _joined(words, FIRST, COUNT, BITS, True, FORM, PTX)
    return tl.reshape(tl.permute(tile, [0, 2, 1]), [BLOCK_N, 32 * COUNT])


@triton.jit
def _plain_tile(
    q_ptr, rn, k0, N, K, stride_qn, BITS: tl.constexpr, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_N, BLOCK_K]` codes of the plain layout."""
    if BITS != 8 and 8 % BITS == 0:
        FIELDS: tl.constexpr = 8 // BITS
        words = load_words(q_ptr, rn, k0, N, stride_qn, K, FIELDS, BLOCK_K, EVEN_K)
        if not PTX:
            words = words.to(tl.int16)
        return tl.reshape(_joined(words, 0, FIELDS, BITS, False, FORM, PTX), [BLOCK_N, BLOCK_K])
    else:
        return load_codes(
            q_ptr, q_ptr, rn, k0, N, K, stride_qn, BITS, "", False, FORM, BLOCK_N, BLOCK_K, tl.int8, EVEN_K, False
        )  # fmt: skip


@triton.jit
def _finish(
    y, xs_ptr, bias_ptr, out_ptr, rm, n0, M, N, UNIT: tl.constexpr, BIAS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Applies the scales of x and the bias to a `[BLOCK_N, BLOCK_M]` tile of paired rows, and stores it."""
    y = tl.trans(natural_rows(y)) * (tl.load(xs_ptr + rm, mask=rm < M, other=0).to(tl.float32) * UNIT)[:, None]
    rn = n0 + tl.arange(0, BLOCK_N)
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(out_ptr + rm.to(tl.int64)[:, None] * N + rn[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_row(
    total, x_total, s_ptr, z_ptr, n0, N, stride_sn, stride_sg, stride_zn, stride_zg,
    AFFINE: tl.constexpr, BLOCK_N: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The sums of whole rows in fp32, with one scale (and shift) a row."""
    scale = load_scales(s_ptr, n0, N, 0, 1, stride_sn, stride_sg, 1, BLOCK_N, PAIRS, "paired")
    y = total.to(tl.float32) * scale
    if AFFINE:
        shift = load_scales(z_ptr, n0, N, 0, 1, stride_zn, stride_zg, 1, BLOCK_N, PAIRS, "paired")
        y -= shift * x_total.to(tl.float32)
    return y


@triton.jit
def w4a8_gemm_kernel(
    x_ptr, xs_ptr, q_ptr, s_ptr, z_ptr, bias_ptr, out_ptr, work_ptr, count_ptr, M, N, K,
    stride_xm, stride_qn, stride_sn, stride_sg, stride_zn, stride_zg,
    BITS: tl.constexpr, GROUP: tl.constexpr, AFFINE: tl.constexpr, EXEC: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, PAIRS: tl.constexpr,
    EVEN_K: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One `[BLOCK_M, BLOCK_N]` tile, or a part of one, weight as left operand. GROUP 0: one group a row, scaled at the end.

    DEPTH: of one multiplication, at most a group. PAIRS: see `_scales.py`.
    """
    FORM: tl.constexpr = "plain" if AFFINE else "centred"
    tiles_m = tl.cdiv(M, BLOCK_M)
    rm = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n0 = tl.program_id(0) // tiles_m * BLOCK_N
    rn = rows_of_tile(n0, N, BLOCK_N, "paired")
    x_rows = x_ptr + rm.to(tl.int64)[:, None] * stride_xm
    groups = (K + GROUP - 1) // GROUP if GROUP > 0 else 1
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    x_total = tl.zeros((BLOCK_M,), tl.int32)
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first, end = range_of_part(K, BLOCK_K, SPLIT)
    for k0 in range(first, end, BLOCK_K):
        if EXEC:
            words = load_exec(q_ptr, rn, k0, N, stride_qn, K, BITS, BLOCK_K, EVEN_K)
        for i in tl.static_range(BLOCK_K // DEPTH):
            k = k0 + i * DEPTH
            rk = k + tl.arange(0, DEPTH)
            x_mask = (rm < M)[:, None] if EVEN_K else (rm < M)[:, None] & (rk < K)[None, :]
            x = tl.load(x_rows + rk[None, :], mask=x_mask, other=0)
            if EXEC:
                c = _exec_tile(words, i * (DEPTH // 32), DEPTH // 32, BITS, FORM, BLOCK_N, PTX)
            else:
                c = _plain_tile(q_ptr, rn, k, N, K, stride_qn, BITS, FORM, BLOCK_N, DEPTH, EVEN_K, PTX)
            if GROUP == 0:
                total = tl.dot(c, tl.trans(x), total, out_dtype=tl.int32)
                if AFFINE:
                    x_total += tl.sum(x.to(tl.int32), axis=1)
            else:
                part = tl.dot(c, tl.trans(x), out_dtype=tl.int32).to(tl.float32)
                y += part * load_scales(
                    s_ptr, n0, N, k // GROUP, groups, stride_sn, stride_sg, 1, BLOCK_N, PAIRS, "paired"
                )  # fmt: skip
                if AFFINE:
                    z = load_scales(z_ptr, n0, N, k // GROUP, groups, stride_zn, stride_zg, 1, BLOCK_N, PAIRS, "paired")
                    y -= z * tl.sum(x.to(tl.int32), axis=1).to(tl.float32)[None, :]
    UNIT: tl.constexpr = unit_of(BITS, FORM, PTX)
    x_row = x_total[None, :]
    if SPLIT:
        tile = tl.program_id(0)
        x_work = work_ptr + tl.num_programs(0) * tl.num_programs(1) * (BLOCK_N * BLOCK_M)
        if GROUP == 0:
            store_part(work_ptr, tile, total)
            if AFFINE:
                store_part(x_work, tile, x_row)
        else:
            store_part(work_ptr, tile, y)
        if is_last(count_ptr, tile):
            if GROUP == 0:
                total = sum_of_parts(work_ptr, tile, total)
                if AFFINE:
                    x_row = sum_of_parts(x_work, tile, x_row)
                y = _scaled_row(
                    total, x_row, s_ptr, z_ptr, n0, N, stride_sn, stride_sg, stride_zn, stride_zg, AFFINE, BLOCK_N, PAIRS
                )  # fmt: skip
            else:
                y = sum_of_parts(work_ptr, tile, y)
            _finish(y, xs_ptr, bias_ptr, out_ptr, rm, n0, M, N, UNIT, BIAS, BLOCK_N)
    else:
        if GROUP == 0:
            y = _scaled_row(
                total, x_row, s_ptr, z_ptr, n0, N, stride_sn, stride_sg, stride_zn, stride_zg, AFFINE, BLOCK_N, PAIRS
            )  # fmt: skip
        _finish(y, xs_ptr, bias_ptr, out_ptr, rm, n0, M, N, UNIT, BIAS, BLOCK_N)


def depths(weight: check.Weight, block_k: int) -> tuple[int, int]:
    """(BLOCK_K, DEPTH). Raises if no multiplication of 32 or more fits into a group."""
    group = weight.group
    if group and (group < 32 or group & (group - 1)):
        check.fail("group_size", group, "a power of two of at least 32, or K, for int8 activations")
    if weight.exec:
        block_k = check.exec_block(weight.bits)
        return block_k, min(group or block_k, block_k)
    block_k = min(group or block_k, block_k)
    return block_k, block_k


def w4a8_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group_size: int | None = None,
    layout: str = "plain",
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`(x * x_scale) @ W^T + bias` in out_dtype, x int8 `[..., K]` from `quant_rows`, x_scale one for each row.

    The weight is passed as in `wq_gemm`, integers of up to 7 bits or int8. Groups are powers of two of at least 32, or K.
    """
    check.check_dtype("x", x, (torch.int8,))
    device = check.check_devices(x=x, x_scale=x_scale, qdata=qdata, scale=scale, shift=shift, bias=bias, out=out)
    if out_dtype not in check.FLOATS:
        check.fail("out_dtype", out_dtype, "torch.float16, torch.bfloat16 or torch.float32")
    check.check_dtype("x_scale", x_scale, check.FLOATS)
    k = x.shape[-1] if x.dim() else 0
    check.check_rows("x", x)
    w = check.check_weight(qdata, scale, shift, k, bits, group_size, layout)
    if w.kind:
        check.fail("qdata.dtype", qdata.dtype, f"torch.{'int8' if bits == 8 else 'uint8'} for int8 activations")
    bias = check.check_bias(bias, (w.n,))
    result = check.check_out(out, (*x.shape[:-1], w.n), out_dtype, device)
    x2 = check._inner_contiguous(x.reshape(-1, k))
    m = x2.shape[0]
    if x_scale.numel() != m:
        check.fail("x_scale.shape", tuple(x_scale.shape), f"{m} elements, one for each row of x")
    arch = arch_of(device)
    if config is None:
        config = select(arch, "w4a8_gemm", bits, w.group, m, w.n, k, "int8", w.form())
    block_k, depth = depths(w, config.block_k)
    if result.numel() == 0:
        return result
    xs = x_scale.reshape(-1).contiguous()
    z = w.shift if w.shift is not None else w.scale
    tiles = -(-m // config.block_m) * -(-w.n // config.block_n)
    splits = split_for(replace(config, block_k=block_k), m, w.n, k, processors(device))
    cells = config.block_m * (config.block_n + 1)  # a row for the sums of x
    with on_device(x):
        work, count = workspace(tiles, splits, tiles * cells, torch.float32 if w.group else torch.int32, xs)
        launch(
            w4a8_gemm_kernel, grid_of(tiles, splits),
            x2, xs, w.q, w.scale, z, bias if bias is not None else w.scale, result, work, count, m, w.n, k,
            x2.stride(0), *w.strides()[:5],
            BITS=bits, GROUP=w.group, AFFINE=w.shift is not None, EXEC=w.exec, BIAS=bias is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=block_k, DEPTH=depth, PAIRS=w.has_pairs(),
            EVEN_K=k % block_k == 0, SPLIT=splits > 1, PTX=is_cuda(arch),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return result
