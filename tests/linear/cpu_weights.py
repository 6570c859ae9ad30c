"""Random weights for the CPU kernels, in strips and in plain rows, with the float32 numbers that they stand for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from requanto.dtypes.bit_packing import pack
from requanto.scales.blocks import decoded
from requanto_cpu import interface as c
from requanto_cpu import library

DTYPES = {torch.float32: c.F32, torch.float16: c.F16, torch.bfloat16: c.BF16, torch.uint8: c.U8}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz}
FLOAT8_CODES = {"e4m3": c.E4M3, "e5m2": c.E5M2, "e4m3fnuz": c.E4M3FNUZ}
#: kinds of codes: name, bits
KINDS = [
    *((f"int{bits}", bits) for bits in range(1, 9)),
    *((f"table{bits}", bits) for bits in range(1, 7)),
    *((name, 8) for name in FLOAT8),
]
#: kinds of scales, with those of shifts that go with them
SCALES = [("plain", "none"), ("plain", "plain"), ("plain", "zeros"), ("codes", "none"), ("codes", "zeros")]
SCALES += [("codes", "rows"), ("e8m0", "none"), ("e4m3s", "none")]


@dataclass
class Weight:
    """A weight as the library takes it (``strips``, ``plain``) and its numbers (``values``, float32 [N, K])."""

    strips: c.RqWeight
    plain: c.RqWeight
    values: torch.Tensor
    is_signed: bool
    kept: list[torch.Tensor] = field(default_factory=list)


def weight(
    kind: str,
    rows: int,
    length: int,
    group: int | None,
    scale: str = "plain",
    shift: str = "none",
    dtype: torch.dtype = torch.float16,
    scale_bits: int = 6,
    group_major: bool = True,
    nan: bool = False,
) -> Weight:
    """A random weight.

    Args:
        kind: of `KINDS`, or ``"table256"``, of plain rows only.
        group: columns that share a scale; None: one scale a row.
        scale, shift: of `SCALES`.
        dtype: of plain scales and shifts, and of the rows' scales.
        nan: True: codes of 8-bit floats may be NaN or infinity.
    """
    groups = length // (group or length) if length else 1
    kept: list[torch.Tensor] = []
    w = c.RqWeight()
    w.rows, w.length, w.group, w.groups, w.block = rows, length, group or length, groups, 8
    bits = 8 if kind in FLOAT8 or kind == "table256" else int(kind[-1])
    codes = torch.randint(0, 2**bits, (rows, length), dtype=torch.uint8)
    w.bits = bits
    is_signed = kind == "int8"
    if kind in FLOAT8:
        w.code = FLOAT8_CODES[kind]
        numbers = codes.view(FLOAT8[kind]).float()
        if not nan:
            codes = torch.where(torch.isfinite(numbers), codes, torch.zeros_like(codes))
            numbers = codes.view(FLOAT8[kind]).float()
    elif kind.startswith("table"):
        w.code = c.TABLE
        table = torch.randn(2**bits)
        kept.append(table)
        w.table = table.data_ptr()
        numbers = table[codes.long()]
    elif is_signed:
        w.zero_code = 128
        numbers = codes.view(torch.int8).float()
    else:
        w.zero_code = 0 if shift != "none" else 2 ** (bits - 1)
        numbers = codes.float() - w.zero_code
    scales, shifts = _scales(w, kept, scale, shift, dtype, scale_bits, group_major)
    values = numbers.unflatten(1, (groups, -1)) * scales.unsqueeze(-1) if length else numbers
    if shifts is not None:
        values = values - shifts.unsqueeze(-1)
    plain = codes.contiguous() if bits == 8 else pack(codes, bits)
    plain = torch.cat([plain.flatten(), torch.zeros(0, dtype=torch.uint8)])
    p = c.RqWeight.from_buffer_copy(w)
    p.codes = plain.data_ptr()
    kept.append(plain)
    if is_signed:
        p.zero_code = 0
    if kind != "table256":
        units, strips = -(-length // 32), -(-rows // 16)
        memory = torch.empty(strips * units * bits * 64 + 64, dtype=torch.uint8)
        start = -memory.data_ptr() % 64
        library().rq_pack(plain.data_ptr(), bits, rows, length, 128 if is_signed else 0, memory.data_ptr() + start)
        w.codes = memory.data_ptr() + start
        kept.append(memory)
    return Weight(w, p, values.reshape(rows, length), is_signed, kept)


def _scales(w, kept, scale, shift, dtype, scale_bits, group_major):
    """Fills the fields of scales and shifts; returns their numbers, float32 [N, G]."""
    rows, groups = w.rows, w.groups
    per = 2 if groups % 2 == 0 and scale == "codes" else groups
    w.scale_groups = per
    w.row_dtype = DTYPES[dtype]
    w.shift_factor = 0.25

    def put(part: torch.Tensor) -> tuple[int, int, int]:
        part = part.t().contiguous() if group_major else part.contiguous()
        kept.append(part)
        return part.data_ptr(), *((1, part.shape[1]) if group_major else (part.shape[1], 1))

    def of_rows() -> tuple[int, torch.Tensor]:
        numbers = (torch.rand(rows, -(-groups // per)) + 0.5).to(dtype)
        kept.append(numbers)
        return numbers.data_ptr(), numbers.float().repeat_interleave(per, 1)[:, :groups]

    def coded(bits: int, low: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.randint(low, 2**bits - 1, (rows, groups), dtype=torch.uint8)
        return codes, codes if bits == 8 else pack(codes, bits)

    if scale == "plain":
        part = (torch.rand(rows, groups) + 0.5).to(dtype)
        w.scale_kind, w.scale_dtype, scales = c.PLAIN, DTYPES[dtype], part.float()
    else:
        w.scale_dtype, w.scale_bits = c.U8, scale_bits if scale == "codes" else 8
        codes, part = coded(w.scale_bits)
        if scale == "codes":
            w.scale_kind, w.scale_zero = c.CODES, 3
            w.row_scale, numbers = of_rows()
            scales = (codes.float() - 3) * numbers
        elif scale == "e8m0":
            w.scale_kind = c.E8M0
            part.remainder_(16).add_(120)
            scales = decoded(part, "e8m0")
        else:
            w.scale_kind = c.E4M3S
            part.clamp_(max=0x7E)
            w.row_scale, numbers = of_rows()
            scales = decoded(part, "e4m3") * numbers
    w.scale, w.scale_stride_n, w.scale_stride_g = put(part)
    if shift == "none":
        return scales, None
    if shift == "plain":
        part = torch.randn(rows, groups).to(dtype)
        w.shift_kind, w.shift_dtype, shifts = c.PLAIN, DTYPES[dtype], part.float()
    else:
        w.shift_kind, w.shift_dtype, w.shift_bits = c.CODES, c.U8, 5
        codes, part = coded(5)
        if shift == "rows":
            w.row_shift, numbers = of_rows()
            shifts = codes.float() * numbers
        else:
            shifts = codes.float() * 0.25 * scales
    w.shift, w.shift_stride_n, w.shift_stride_g = put(part)
    return scales, shifts


def combinations(kinds=KINDS, scales=SCALES):
    """Kinds of codes with the kinds of scales that they can have: only integers have shifts."""
    for (kind, _), (scale, shift) in itertools.product(kinds, scales):
        if shift == "none" or (kind.startswith("int") and kind != "int8"):
            yield kind, scale, shift
