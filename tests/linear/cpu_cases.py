"""Random cases for the C interface of the CPU kernels, with what they must give, for `kernels/tests/cpu_main.cpp`.

The expected values are computed here, in float64 or by the documented float32 operations, and from the documentation of
`requanto_cpu.h` alone: codes are packed by this file too. So the kernels of other processors (under qemu) and builds with
AddressSanitizer are tested without Python inside of the process.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from requanto_cpu.interface import RqGemm, RqWeight

GEMM, SCRATCH, LEAST_SCRATCH, DEQUANTIZE, DEQUANTIZE_PLAIN, PACK, UNPACK, CODES, ROWS_TO_INT8, FLOAT_LINEAR = range(10)
INTEGER, TABLE, E4M3, E5M2, E4M3FNUZ = range(5)
NO_SHIFT, PLAIN, SCALE_CODES, E8M0, E4M3S = range(5)
BLOCKS8, BLOCKS16, FLOAT, CODED, PARTS = range(5)
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, E4M3FNUZ: torch.float8_e4m3fnuz}
#: Half of the distance between neighbours, relative to the value, of each dtype.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass
class Case:
    """One call: buffers 1 and 2 hold the weight and the GEMM (or nothing), the rest is numbered as it is added."""

    name: str
    function: int
    arguments: list[int] = field(default_factory=list)
    buffers: list[tuple[bytes, bool]] = field(default_factory=lambda: [(b"", False), (b"", False)])
    #: Raises AssertionError unless the buffers that belong to the results are right; gets them in their order.
    check: Callable[..., None] = lambda *results: None
    #: Values of 5 and 6 bits are looked up in memory by AVX2's gather instruction.
    gathers: bool = False

    def add(self, data: torch.Tensor | np.ndarray | None, result: bool = False) -> int:
        """Number of a new buffer with these contents; 0 (null) for None."""
        if data is None:
            return 0
        if isinstance(data, torch.Tensor):
            data = data.contiguous().view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)
        self.buffers.append((data.tobytes(), result))
        return len(self.buffers)


def write(cases: list[Case], path: Path) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<q", len(cases)))
        for case in cases:
            numbers = [case.function, len(case.arguments), *case.arguments, len(case.buffers)]
            file.write(struct.pack(f"<{len(numbers)}q", *numbers))
            for data, result in case.buffers:
                file.write(struct.pack("<qq", len(data), result) + data)


def check(cases: list[Case], path: Path) -> None:
    """Compares all results; the first wrong one raises with the name of its case."""
    data, place = path.read_bytes(), 0
    for number, case in enumerate(cases):
        (code,) = struct.unpack_from("<q", data, place)
        place += 8
        results = []
        for contents, result in case.buffers:
            if result:
                results.append(data[place : place + len(contents)])
                place += len(contents)
        try:
            assert code == 0, f"error code {code}"
            case.check(*results)
        except AssertionError as error:
            raise AssertionError(f"case {number}, {case.name}: {error}") from None
    assert place == len(data), "more results than cases"


def strips_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[N, K]`` (uint8) in the order that requanto_cpu.h describes."""
    rows, length = codes.shape
    padded = np.zeros((-(-rows // 16) * 16, -(-length // 32) * 32), np.uint8)
    padded[:rows, :length] = codes
    # [strip, row, unit, q, j]: column 4 * q + j of the unit.
    units = padded.reshape(padded.shape[0] // 16, 16, padded.shape[1] // 32, 8, 4)
    planes, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            part, each = units >> low & (1 << width) - 1, 8 // width
            part = part.reshape(*units.shape[:3], 8 // each, each, 4)  # [strip, row, unit, v, t, j]
            vectors = sum(part[..., t, :].astype(np.uint16) << width * t for t in range(each))
            planes.append(
                vectors.astype(np.uint8).transpose(0, 2, 3, 1, 4).reshape(*units.shape[:1], units.shape[2], -1)
            )
            low += width
    return np.ascontiguousarray(np.concatenate(planes, -1)).reshape(-1)


def plain_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of ceil(K * bits / 8) bytes, low bits first."""
    stream = (codes[:, :, None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(len(codes), -1)
    return np.packbits(stream, axis=1, bitorder="little")


def _random(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")


def _integers(low: int, high: int, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=random, dtype=torch.int64, device="cpu")


@dataclass
class Weight:
    """A random weight: the struct's fields, its arrays, and its values."""

    fields: dict
    codes: np.ndarray  #: [N, K], as stored in strips
    values: np.ndarray  #: [N, K] float32, what each code stands for
    level_error: np.ndarray  #: [N, K]: distance between a table's value and the one that integer arithmetic uses
    scale: torch.Tensor
    shift: torch.Tensor | None
    row_scale: torch.Tensor | None
    row_shift: torch.Tensor | None
    scales: np.ndarray  #: [N, K] float32
    shifts: np.ndarray | None

    def dequantized(self) -> np.ndarray:
        """float32, by the operations that requanto_cpu.h documents."""
        product = self.values * self.scales
        return product if self.shifts is None else product - self.shifts

    def struct(self, case: Case, codes: np.ndarray) -> bytes:
        weight = RqWeight(**self.fields)
        arrays = {"codes": codes, "scale": self.scale, "shift": self.shift}
        arrays |= {"row_scale": self.row_scale, "row_shift": self.row_shift}
        if self.fields["code"] == TABLE:
            arrays |= {"table": self.table, "levels": self.levels}
        for name, array in arrays.items():
            kind = dict(RqWeight._fields_)[name]
            setattr(weight, name, ctypes.cast(case.add(array) or None, kind))
        return bytes(weight)

    table: np.ndarray | None = None
    levels: np.ndarray | None = None


def _repeated(groups: np.ndarray, group: int) -> np.ndarray:
    return np.repeat(groups, group, axis=1)


def random_weight(
    random: torch.Generator,
    rows: int,
    length: int,
    group: int,
    bits: int,
    *,
    code: int = INTEGER,
    dtype: torch.dtype = torch.float32,
    scale_kind: int = PLAIN,
    shift_kind: int = NO_SHIFT,
    whole_shift: bool = True,
    scale_bits: int = 8,
    shift_bits: int = 8,
    row_dtype: torch.dtype = torch.float32,
    scale_groups: int = 0,
    block: int = 32,
    zero_code: int | None = None,
) -> Weight:
    """A weight whose scales and shifts are stored group by group.

    `whole_shift`: of `SCALE_CODES`, zero points relative to the scale; else shifts have a row_shift of their own.
    """
    groups = length // group
    scale_groups = scale_groups or groups
    codes = _integers(0, 2**bits, (rows, length), random).numpy().astype(np.uint8)
    zero = (2 ** (bits - 1) if bits > 1 else 0) if zero_code is None else zero_code
    table = levels = None
    level_scale, level_error = 1.0, np.zeros((rows, length), np.float64)
    if code == INTEGER:
        values = codes.astype(np.float32) - np.float32(zero)
    elif code == TABLE:
        table = np.sort(_random((2**bits,), random).numpy())
        level_scale = float(np.abs(table).max() / 127)
        levels = (np.rint(table / level_scale) + 128).astype(np.uint8)
        values = table[codes]
        level_error = np.abs(table - level_scale * (levels.astype(np.float64) - 128))[codes]
    else:
        if code != E5M2:  # few NaN: a row of them would hide all else
            codes[(codes & 0x7F) == 0x7F] = 0x31
        codes[codes == 0x80] = 0x12
        if code == E5M2:
            codes[(codes & 0x7C) == 0x7C] = 0x21
        values = torch.from_numpy(codes).view(_FLOAT8[code]).float().numpy()
    shape = (groups, rows)  # group-major, as the execution layout stores them
    scale_zero, shift_factor, row_scale, row_shift, shift = 0, 1.0, None, None, None
    blocks = -(-groups // scale_groups)
    if scale_kind == PLAIN:
        scale = (_random(shape, random).abs() * 0.02 + 0.001).to(dtype)
        scales = scale.float().numpy().T
    elif scale_kind == E8M0:
        scale = _integers(110, 123, shape, random).to(torch.uint8)
        scales = np.exp2(scale.numpy().astype(np.float32) - 127).T
    elif scale_kind == E4M3S:
        scale = _integers(0x20, 0x60, shape, random).to(torch.uint8)
        row_scale = (_random((rows, blocks), random).abs() * 0.02 + 0.001).to(row_dtype)
        spread = np.repeat(row_scale.float().numpy(), scale_groups, axis=1)[:, :groups]
        scales = scale.view(torch.float8_e4m3fn).float().numpy().T * spread
    else:
        parts = _integers(0, 2**scale_bits, (rows, groups), random).numpy().astype(np.uint8)
        scale = torch.from_numpy(np.ascontiguousarray(plain_of(parts, scale_bits).T))
        row_scale, scale_zero = (_random((rows, blocks), random).abs() * 0.01 + 0.001).to(row_dtype), 3
        spread = np.repeat(row_scale.float().numpy(), scale_groups, axis=1)[:, :groups]
        scales = spread * (parts.astype(np.float32) - np.float32(scale_zero))
    shifts, shift_dtype = None, 0
    if shift_kind == PLAIN:
        shift, shift_dtype = (_random(shape, random) * 0.05).to(dtype), DTYPES[dtype]
        shifts = shift.float().numpy().T
    elif shift_kind == SCALE_CODES:
        parts = _integers(0, 2**shift_bits, (rows, groups), random).numpy().astype(np.uint8)
        shift = torch.from_numpy(np.ascontiguousarray(plain_of(parts, shift_bits).T))
        shift_dtype, part = DTYPES[torch.uint8], parts.astype(np.float32)
        if whole_shift:
            shift_factor = 0.0625
            shifts = scales * (part * np.float32(shift_factor))
        else:
            row_shift = (_random((rows, blocks), random) * 0.002).to(row_dtype)
            shifts = np.repeat(row_shift.float().numpy(), scale_groups, axis=1)[:, :groups] * part
    fields = dict(
        rows=rows, length=length, group=group, groups=groups, bits=bits, code=code, zero_code=zero, block=block,
        level_scale=level_scale, scale_kind=scale_kind, scale_dtype=DTYPES[scale.dtype], shift_kind=shift_kind,
        shift_dtype=shift_dtype, scale_stride_n=1, scale_stride_g=rows, shift_stride_n=1, shift_stride_g=rows,
        row_dtype=DTYPES[row_dtype],
        scale_bits=scale_bits, shift_bits=shift_bits, scale_groups=scale_groups, scale_zero=scale_zero,
        shift_factor=shift_factor,
    )  # fmt: skip
    spread_shifts = None if shifts is None else _repeated(shifts, group)
    return Weight(fields, codes, values, level_error, scale, shift, row_scale, row_shift,
                  _repeated(scales, group), spread_shifts, table, levels)  # fmt: skip


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")


def _same(got: bytes, expected: torch.Tensor, what: str) -> None:
    """Equal bit for bit; NaN may be any NaN."""
    result = _tensor(got, expected.dtype).view(expected.shape)
    wrong = ~(
        (result == expected) | (result.isnan() & expected.isnan() if result.is_floating_point() else result == expected)
    )
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, at {wrong.nonzero()[:4].tolist()}"


def _canvas(rows: int, columns: int, stride: int, dtype: torch.dtype, random: torch.Generator) -> torch.Tensor:
    """Flat memory of a matrix with gaps between its rows, filled with noise: what is not written must stay."""
    size = (rows - 1) * stride + columns if rows else 0
    return _integers(-30000, 30000, (size * dtype.itemsize // 2,), random).to(torch.int16).view(dtype)


def _matrix(flat: torch.Tensor, rows: int, columns: int, stride: int) -> torch.Tensor:
    return torch.as_strided(flat, (rows, columns), (stride, 1))


def dequantize_case(weight: Weight, random: torch.Generator, dtype: torch.dtype, *, plain: bool, indexed: bool) -> Case:
    rows, length = weight.codes.shape
    case = Case(f"dequantize {weight.fields} to {dtype}, plain {plain}, index {indexed}", DEQUANTIZE)
    case.gathers = weight.fields["code"] == TABLE and weight.fields["bits"] > 4
    signed = plain and weight.fields["code"] == INTEGER and weight.fields["bits"] == 8
    codes = plain_of(weight.codes ^ 0x80 if signed else weight.codes, weight.fields["bits"]) if plain else None
    fields, weight.fields = weight.fields, weight.fields | ({"zero_code": 0} if signed else {})
    case.buffers[0] = (weight.struct(case, codes if plain else strips_of(weight.codes, fields["bits"])), False)
    weight.fields = fields
    start = int(_integers(0, rows, (), random))
    stop = int(_integers(start, rows + 1, (), random))
    index = _integers(0, rows, (stop - start,), random) if indexed else None
    stride = length + int(_integers(0, 3, (), random)) * 5
    out = _canvas(stop - start, length, stride, dtype, random)
    number = case.add(index)
    arguments = [start, stop, number, case.add(out, result=True), DTYPES[dtype], stride]
    case.function = DEQUANTIZE_PLAIN if plain else DEQUANTIZE
    case.arguments = [*arguments, int(signed)] if plain else arguments
    values = torch.from_numpy(weight.dequantized())
    expected = out.clone()
    if stop > start:
        _matrix(expected, stop - start, length, stride).copy_(values[start:stop] if index is None else values[index])
    case.check = lambda got: _same(got, expected, "dequantized rows")
    return case


def packing_cases(random: torch.Generator, rows: int, length: int, bits: int) -> list[Case]:
    codes = _integers(0, 2**bits, (rows, length), random).numpy().astype(np.uint8)
    flip = 128 if bits == 8 and rows % 2 else 0
    plain, strips = plain_of(codes ^ flip, bits), strips_of(codes, bits)
    what = f"{bits} bits, {rows} x {length}"
    pack = Case(f"pack {what}", PACK)
    noise = _integers(0, 256, (strips.size,), random).to(torch.uint8)
    pack.arguments = [pack.add(plain), bits, rows, length, flip, pack.add(noise, result=True)]
    pack.check = lambda got: _same(got, torch.from_numpy(strips), "strips")
    start = int(_integers(0, rows, (), random))
    stop = int(_integers(start, rows + 1, (), random))
    unpack = Case(f"unpack {what}, {start} to {stop}", UNPACK)
    expected = torch.from_numpy(plain[start:stop].copy())
    out = unpack.add(strips), unpack.add(torch.full_like(expected, 0x5A), result=True)
    unpack.arguments = [out[0], bits, rows, length, flip, start, stop, out[1]]
    unpack.check = lambda got: _same(got, expected, "plain codes")
    cases = [pack, unpack]
    for indexed in (False, True):
        index = _integers(0, rows, (stop - start,), random) if indexed else None
        rows_of = torch.from_numpy(codes ^ np.uint8(flip))
        wanted = rows_of[start:stop] if index is None else rows_of[index]
        case = Case(f"codes {what}, {start} to {stop}, index {indexed}", CODES)
        case.arguments = [case.add(strips), bits, rows, length, flip, start, stop, case.add(index)]
        case.arguments.append(case.add(torch.full_like(wanted, 0x5A), result=True))
        case.check = lambda got, wanted=wanted: _same(got, wanted, "codes")
        cases.append(case)
    return cases


def random_x(
    random: torch.Generator, rows: int, length: int, dtype: torch.dtype, block: int, exact: bool
) -> torch.Tensor:
    """`exact`: every block's largest element is 127 * 2^e, others are multiples of 2^e, so rounding x changes nothing."""
    if not exact:
        return _random((rows, length), random).to(dtype)
    blocks = -(-length // block)
    whole = _integers(-127, 128, (rows, blocks, block), random).float()
    whole[:, :, 0] = 127.0
    x = whole * torch.exp2(_integers(-4, 3, (rows, blocks, 1), random).float())
    return x.reshape(rows, -1)[:, :length].to(dtype)


def gemm_case(
    weight: Weight,
    random: torch.Generator,
    rows: int,
    dtype: torch.dtype,
    arithmetic: int,
    *,
    exact: bool = True,
    bias_dtype: torch.dtype | None = None,
    least: bool = False,
    x: torch.Tensor | None = None,
    column_dtype: torch.dtype | None = None,
) -> Case:
    """`x`: instead of a random one; where float64 gives NaN or infinity because of it, so must the kernel."""
    outputs, length = weight.codes.shape
    case = Case(
        f"gemm {weight.fields}, {rows} rows of {dtype}, arithmetic {arithmetic}, exact {exact}, least {least}", GEMM
    )
    case.buffers[0] = (weight.struct(case, strips_of(weight.codes, weight.fields["bits"])), False)
    case.gathers = weight.fields["code"] == TABLE and weight.fields["bits"] > 4
    block, steps, column = weight.fields["block"], None, None
    stride = length + int(_integers(0, 3, (), random)) * 3
    if arithmetic == CODED:
        numbers = _integers(-128, 128, (rows, length), random).to(torch.int8)
        steps = _random((rows,), random).abs() * 0.05
        memory = _integers(-128, 128, ((rows - 1) * stride + length,), random).to(torch.int8)
        _matrix(memory, rows, length, stride).copy_(numbers)
        wide = numbers.double() * steps.double()[:, None]
        accumulated = wide
    else:
        numbers = random_x(random, rows, length, dtype, block, exact) if x is None else x
        memory = _canvas(rows, length, stride, dtype, random)
        _matrix(memory, rows, length, stride).copy_(numbers)
        if column_dtype is not None:
            column, exact = _random((length,), random).to(column_dtype), False
            numbers = numbers * column.to(dtype)
        wide = accumulated = numbers.double()
    bias = None if bias_dtype is None else _random((outputs,), random).to(bias_dtype)
    out_stride = outputs + int(_integers(0, 3, (), random)) * 7
    out = _canvas(rows, outputs, out_stride, dtype, random)
    gemm = RqGemm(
        rows=rows, x_stride=stride, out_stride=out_stride, x_dtype=0 if arithmetic == CODED else DTYPES[dtype],
        out_dtype=DTYPES[dtype], arithmetic=arithmetic, bias_dtype=0 if bias is None else DTYPES[bias_dtype],
        column_dtype=0 if column is None else DTYPES[column_dtype],
    )  # fmt: skip
    for name, array in {"bias": bias, "steps": steps, "column": column}.items():
        setattr(gemm, name, ctypes.cast(case.add(array) or None, dict(RqGemm._fields_)[name]))
    case.buffers[1] = (bytes(gemm), False)
    case.arguments = [case.add(memory), case.add(out, result=True), int(least)]

    w = torch.from_numpy(weight.dequantized()).double()
    expected = wide @ w.T
    parts = torch.from_numpy((np.abs(weight.values * weight.scales)).astype(np.float64))
    if weight.shifts is not None:
        parts += torch.from_numpy(np.abs(weight.shifts).astype(np.float64))
    if weight.fields["code"] == INTEGER:  # code and zero_code may be multiplied one by one
        parts += torch.from_numpy(np.abs(weight.scales).astype(np.float64)) * abs(weight.fields["zero_code"])
    size = accumulated.abs() @ parts.T
    allowed = size * 2.0**-19
    rounds = arithmetic in (BLOCKS8, BLOCKS16)
    if weight.fields["code"] == TABLE and arithmetic not in (FLOAT, PARTS):
        allowed += wide.abs() @ torch.from_numpy(np.abs(weight.scales) * weight.level_error).T
    if arithmetic == PARTS:
        allowed += size * 2.0**-16  # x may be two bfloat16 numbers
    if arithmetic in (FLOAT, PARTS) and dtype == torch.bfloat16:
        allowed += size * 2.0**-8  # weights are rounded to bfloat16 where the processor multiplies those
    if rounds and not (exact and x is None):
        finite = wide.nan_to_num(0, 0, 0)
        padded = torch.nn.functional.pad(finite.abs(), (0, -length % block)).view(rows, -1, block)
        step = (padded.amax(2) / (127 if arithmetic == BLOCKS8 else 32512)).repeat_interleave(block, 1)[:, :length]
        allowed += 6 * (step.square() @ w.square().T / 12).sqrt()
    if bias is not None:
        expected = expected + bias.double()
        allowed += bias.double().abs() * 2.0**-22
    small = torch.finfo(dtype).tiny * (4 + weight.fields["groups"] + length)  # fewer bits below, each product too
    allowed += (expected.abs() * 1.01 + small) * _ROUNDING[dtype]

    def verify(got: bytes) -> None:
        flat = _tensor(got, dtype)
        result = _matrix(flat, rows, outputs, out_stride).double()
        largest = torch.finfo(dtype).max
        finite = expected.abs() + allowed <= largest
        error = (result - expected).abs()
        too_large = ~(expected.abs() - allowed <= 1.001 * largest)  # in between, rounding errors decide
        wrong = torch.where(finite, ~(error <= allowed), too_large & result.isfinite())
        share = (error / allowed)[finite].max().item() if finite.any() else 0.0
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.numel()} are wrong, at {wrong.nonzero()[:4].tolist()}; the largest error is "
            f"{share:.3g} of what is allowed"
        )
        untouched = out.clone()
        _matrix(untouched, rows, outputs, out_stride).copy_(_matrix(flat, rows, outputs, out_stride))
        assert untouched.view(torch.uint8).equal(flat.view(torch.uint8)), (
            "memory between the rows of the result was written"
        )

    case.check = verify
    return case


def float_linear_case(
    random: torch.Generator, rows: int, outputs: int, length: int, dtype: torch.dtype, bias: bool
) -> Case:
    case = Case(f"float_linear, {rows} rows by {outputs} x {length}, {dtype}, bias {bias}", FLOAT_LINEAR)
    strides = [size + int(_integers(0, 2, (), random)) * 3 for size in (length, length, outputs)]
    weight, x = (_canvas(count, length, stride, dtype, random) for count, stride in zip((outputs, rows), strides))
    out = _canvas(rows, outputs, strides[2], dtype, random)
    w, inputs = (
        _matrix(flat, count, length, stride) for flat, count, stride in zip((weight, x), (outputs, rows), strides)
    )
    w.copy_(_random((outputs, length), random))
    inputs.copy_(_random((rows, length), random))
    added = _random((outputs,), random).to(dtype) if bias else None
    case.arguments = [case.add(weight), DTYPES[dtype], outputs, length, strides[0], case.add(x), rows, strides[1]]
    case.arguments += [case.add(added), case.add(out, result=True), strides[2]]
    expected = inputs.double() @ w.double().T + (0 if added is None else added.double())
    allowed = inputs.double().abs() @ w.double().abs().T * 2.0**-19 + expected.abs() * _ROUNDING[dtype] * 1.01

    def verify(got: bytes) -> None:
        flat = _tensor(got, dtype)
        share = ((_matrix(flat, rows, outputs, strides[2]).double() - expected).abs() / allowed).max().item()
        assert share <= 1, f"the largest error is {share:.3g} of what is allowed"
        untouched = out.clone()
        _matrix(untouched, rows, outputs, strides[2]).copy_(_matrix(flat, rows, outputs, strides[2]))
        assert untouched.view(torch.uint8).equal(flat.view(torch.uint8)), (
            "memory between the rows of the result was written"
        )

    case.check = verify
    return case


def rows_to_int8_case(random: torch.Generator, rows: int, length: int, dtype: torch.dtype, fixed: float | None) -> Case:
    """Row 1, if there is one, has a NaN, row 2 an infinite element, row 3 only zeros."""
    case = Case(f"rows_to_int8, {rows} x {length}, {dtype}, fixed {fixed}", ROWS_TO_INT8)
    stride = length + int(_integers(0, 2, (), random)) * 3
    memory = _canvas(rows, length, stride, dtype, random)
    x = _matrix(memory, rows, length, stride)
    x.copy_(_random((rows, length), random))
    for row, value in ((1, float("nan")), (2, float("inf"))):
        if row < rows:
            x[row, int(_integers(0, length, (), random))] = value
    if rows > 3:
        x[3] = 0
    given = None if fixed is None else torch.tensor([fixed], dtype=torch.float32, device="cpu")
    case.arguments = [case.add(memory), DTYPES[dtype], rows, length, stride, case.add(given)]
    case.arguments += [case.add(np.full((rows, length), 99, np.int8), result=True)]
    case.arguments += [case.add(np.full(rows, 7, np.float32), result=True)]
    steps = (
        (x.float().abs().amax(1).clamp_min(1e-30) / 127) if fixed is None else torch.full_like(x[:, 0].float(), fixed)
    )
    bad = x.isnan().any(1) | (x.isinf().any(1) if fixed is None else False)
    steps = torch.where(bad, float("nan"), steps)

    def verify(codes: bytes, scales: bytes) -> None:
        _same(scales, steps, "scales of rows")
        got = _tensor(codes, torch.int8).view(rows, length).double()
        exact = (x.double() / steps.double()[:, None]).clamp(-127 if fixed is None else -128, 127)
        error = torch.where(bad[:, None], 0.0, (got - exact).abs())
        assert error.max() <= 0.5001, f"a code is {error.max():.4f} from x / scale"

    case.check = verify
    return case


def packing_of_all_widths(seed: int) -> list[Case]:
    random = torch.Generator("cpu").manual_seed(seed)
    shapes = ((1, 8), (2, 1), (5, 33), (16, 32), (17, 40), (33, 104))
    return [case for bits in range(1, 9) for shape in shapes for case in packing_cases(random, *shape, bits)]


def kernels_of_x(seed: int) -> list[Case]:
    """rq_rows_to_int8 and rq_float_linear."""
    random = torch.Generator("cpu").manual_seed(seed)
    cases = []
    for dtype in FLOATS:
        for fixed in (None, 0.01):
            cases += [rows_to_int8_case(random, *shape, dtype, fixed) for shape in ((1, 5), (2, 32), (4, 100), (5, 33))]
        shapes = ((1, 1, 1), (2, 17, 8), (3, 33, 40), (4, 5, 129), (1, 40, 200))
        cases += [float_linear_case(random, *shape, dtype, bias) for shape in shapes for bias in (False, True)]
    return cases


class _Choices:
    def __init__(self, seed: int):
        self.random = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, *choices):
        return choices[int(_integers(0, len(choices), (), self.random))]

    def weight(self, bits: int, code: int, plain: bool = False) -> Weight:
        """`plain`: also with groups that strips do not have."""
        groups = (8, 16, 24, 32, 40, 64, 96, 128, 0)
        group, rows = self(*groups, *((1, 5, 12, 36) if plain else ())), self(1, 5, 16, 17, 33, 48)
        length = self(1, 2, 3, 5) * group or self(8, 32, 33, 40, 100, 104, 130, 520)
        group, grouped = group or length, group > 0
        block = next((size for size in (32, 16) if group % size == 0), 8) if grouped else self(32, 32, 16, 8)
        scale_kind = self(PLAIN, PLAIN, SCALE_CODES, E8M0, E4M3S)
        shift_kind = NO_SHIFT if scale_kind in (E8M0, E4M3S) or code > TABLE else self(NO_SHIFT, PLAIN, SCALE_CODES)
        return random_weight(
            self.random, rows, length, group, bits, code=code, dtype=self(*FLOATS), scale_kind=scale_kind,
            shift_kind=shift_kind, whole_shift=scale_kind != SCALE_CODES or self(True, False), scale_bits=self(4, 5, 6, 8),
            shift_bits=self(2, 4, 6, 8), row_dtype=self(*FLOATS), scale_groups=self(0, 2) if length > group else 0,
            block=block,
        )  # fmt: skip


def _types(arithmetic: int) -> list[tuple[int, int]]:
    """Bits and RqCode of all weights that are multiplied this way."""
    if arithmetic == PARTS:  # others are multiplied as with FLOAT
        return [(bits, INTEGER) for bits in (4, 6, 7, 8)] + [(4, TABLE), (8, E4M3)]
    types = [(bits, INTEGER) for bits in range(1, 9)]
    if arithmetic != CODED:
        types += [(bits, TABLE) for bits in range(1, 7)]
    return types + [(8, E4M3), (8, E5M2), (8, E4M3FNUZ)] if arithmetic == FLOAT else types


def gemms(seed: int, arithmetics: tuple[int, ...] = (BLOCKS8, BLOCKS16, FLOAT, CODED, PARTS)) -> list[Case]:
    """Every type of weight in every arithmetic; all else is chosen at random."""
    choose = _Choices(seed)
    cases = []
    for arithmetic in arithmetics:
        for bits, code in _types(arithmetic):
            cases.append(
                gemm_case(
                    choose.weight(bits, code), choose.random, choose(1, 1, 2, 3, 4, 5, 6, 7, 9, 20), choose(*FLOATS),
                    arithmetic, exact=choose(True, False), bias_dtype=choose(None, *FLOATS), least=choose(True, False),
                    column_dtype=None if arithmetic == CODED else choose(None, None, None, *FLOATS),
                )
            )  # fmt: skip
    return cases


def special_gemms(seed: int) -> list[Case]:
    """x with NaN, infinity, zeros, tiny numbers, and with one large element among small ones."""
    choose = _Choices(seed)
    cases = []
    types = ((4, INTEGER), (8, INTEGER), (4, TABLE))
    every = [(*kind, how) for kind in types for how in (BLOCKS8, BLOCKS16, FLOAT)]
    for bits, code, arithmetic in (*every, (8, E4M3, FLOAT), (8, INTEGER, PARTS)):
        weight = choose.weight(bits, code)
        x = _random((9, weight.codes.shape[1]), choose.random)
        x[1, 0], x[2, -1], x[4] = float("nan"), float("inf"), 0.0
        x[5] *= 1e-36
        x[6, 3], x[7, ::2] = 1e4, 0.0
        cases.append(gemm_case(weight, choose.random, 9, torch.float32, arithmetic, exact=False, x=x))
    return cases


def large_gemms(seed: int) -> list[Case]:
    """More columns and rows than kernels compute at a time: chunks, panels, parts that fit into the scratch buffer."""
    choose = _Choices(seed)
    random, cases = choose.random, []
    for arithmetic in (BLOCKS8, BLOCKS16, FLOAT, CODED, PARTS):
        for bits, code in ((4, INTEGER), (3, INTEGER), (8, INTEGER), (4, TABLE), (8, E4M3)):
            if (bits, code) not in _types(arithmetic):
                continue
            for rows, length, group in (
                (choose(1, 2, 4), 4608, choose(96, 24, 4608)),
                (choose(5, 20), 2600, choose(2600, 8)),
            ):
                weight = random_weight(random, 17, length, group, bits, code=code, shift_kind=choose(NO_SHIFT, PLAIN),
                                       block=32 if group % 32 == 0 else 8)  # fmt: skip
                cases.append(gemm_case(weight, random, rows, choose(*FLOATS), arithmetic, least=choose(True, False)))
            weight = random_weight(random, 40, 544, choose(32, 544), bits, code=code)
            cases.append(
                gemm_case(weight, random, choose(145, 260), choose(*FLOATS), arithmetic, least=choose(True, False))
            )
    for rows in (2, 7):  # sums of more products than 32 bits have room for
        cases.append(gemm_case(random_weight(random, 3, 66000, 66000, 8), random, rows, torch.float32, CODED))
    return cases


def dequantizations(seed: int) -> list[Case]:
    choose = _Choices(seed)
    cases = []
    for bits, code in _types(FLOAT):
        for plain in (False, True):
            for indexed in (False, True):
                weight = choose.weight(bits, code, plain)
                cases.append(dequantize_case(weight, choose.random, choose(*FLOATS), plain=plain, indexed=indexed))
    return cases


def float8_weights(seed: int) -> list[Case]:
    """Weights of 8-bit floats of every size, those included whose codes are subnormal float32 numbers on the way."""
    choose = _Choices(seed)
    cases = []
    for code in (E4M3, E5M2, E4M3FNUZ):
        for rows in (1, 2, 4, 20):
            weight = choose.weight(8, code)
            cases.append(gemm_case(weight, choose.random, rows, torch.float32, FLOAT))
        cases.append(dequantize_case(choose.weight(8, code), choose.random, torch.float32, plain=False, indexed=False))
    return cases
