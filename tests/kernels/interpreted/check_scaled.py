"""Products of two quantized operands and row quantization, in Triton's interpreter, against float64."""

from dataclasses import replace

import pytest
import torch
from reference import FP8, TOLERANCE, decode_fp8, error, weight

from requanto_kernels import Config, group_major, int_mm, quant_rows, round_rows, scaled_mm, to_exec_layout, w4a8_gemm
from requanto_kernels.scaled_mm import exact_every, shrunk
from requanto_kernels.w4a8_gemm import bytes_asm, unit_of

FULL = torch.float32
KINDS = (torch.int8, *FP8)


def operand(rows, k, dtype):
    if dtype == torch.int8:
        data = torch.randint(-128, 128, (rows, k), dtype=torch.int8)
        return data, data.double()
    data = torch.randn(rows, k).to(dtype)
    return data, decode_fp8(data)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 64), (17, 40, 100), (129, 20, 256)])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_mm(dtype, m, n, k, per_row):
    (x, x64), (w, w64) = operand(m, k, dtype), operand(n, k, dtype)
    xs, ws = (torch.rand(m, 1), torch.rand(n)) if per_row else (torch.rand(1), torch.rand(1, 1))
    bias = torch.randn(n)
    want = xs.double() * ws.double().reshape(1, -1) * (x64 @ w64.T) + bias.double()
    got = scaled_mm(x, w, xs, ws, bias, out_dtype=FULL)
    assert error(got, want) <= TOLERANCE[FULL]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
@pytest.mark.parametrize("config", [
    Config(16, 32, 32, left=False), Config(16, 32, 32, left=True),
    Config(32, 32, 64, left=False, persistent=True, group_m=2),
])  # fmt: skip
def test_forms(dtype, config):
    (x, x64), (w, w64) = operand(70, 144, dtype), operand(50, 144, dtype)
    xs, ws = torch.rand(70) * 1e-3, torch.rand(50)  # int8 sums leave the range of fp16
    got = scaled_mm(x, w, xs, ws, out_dtype=torch.float16, config=config)
    want = xs.double()[:, None] * ws.double() * (x64 @ w64.T)
    assert error(got, want) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_the_librarys_int8_gemm_agrees_bit_for_bit(per_row, bias):
    (x, x64), (w, w64) = operand(19, 72, torch.int8), operand(2056, 72, torch.int8)
    w = w.T.contiguous().T  # the launcher copies what the library would not take
    xs, ws = (torch.rand(19, 1), torch.rand(2056, 1)) if per_row else (torch.rand(1), torch.rand(1, 1))
    added = torch.randn(2056).half() if bias else None
    got = int_mm(x, w, xs, ws, added, out_dtype=FULL)
    assert torch.equal(got, scaled_mm(x, w, xs, ws, added, out_dtype=FULL))
    want = xs.double() * ws.double().reshape(1, -1) * (x64 @ w64.T) + (added.double() if bias else 0)
    assert error(got, want) <= TOLERANCE[FULL]


def test_large_tiles_shrink_until_they_fill_the_device():
    large = Config(128, 256, 128, num_warps=8, persistent=True, shrink=True)
    tile = lambda m, n: (lambda c: (c.block_m, c.block_n, c.num_warps))(shrunk(large, m, n, 132))  # noqa: E731
    assert tile(4096, 4096) == tile(1024, 14336) == (128, 256, 8)
    assert tile(1024, 4096) == (128, 128, 8)
    assert tile(256, 4096) == tile(129, 64) == (64, 128, 4)
    assert shrunk(Config(128, 256), 1, 1, 132) == Config(128, 256)  # a tuned tile stays
    (x, _), (w, _) = operand(131, 80, torch.int8), operand(272, 80, torch.int8)
    one = torch.ones(1)
    got, want = (scaled_mm(x, w, one, one, out_dtype=FULL, config=c) for c in (large, Config(32, 32, 32)))
    assert torch.equal(got, want)


def test_sums_of_float8_that_are_exact_every_so_often():
    (x, x64), (w, w64) = operand(33, 160, FP8[0]), operand(40, 160, FP8[0])
    for left in (False, True):
        config = Config(32, 32, 64, left=left, exact_every=32)
        got = scaled_mm(x, w, torch.ones(1), torch.ones(1), out_dtype=FULL, config=config)
        assert error(got, x64 @ w64.T) <= TOLERANCE[FULL]
    assert exact_every(config, True) is None
    for wrong in (16, 128):
        with pytest.raises(
            ValueError, match=r"exact_every: found .*, expected 0 or a multiple of 32 up to block_k = 64"
        ):
            exact_every(Config(32, 32, 64, exact_every=wrong), False)


def test_mixed_float8_and_leading_dimensions():
    (x, x64), (w, w64) = operand(6, 64, FP8[2]), operand(10, 64, FP8[0])
    got = scaled_mm(x.view(2, 3, 64), w, torch.ones(2, 3), torch.ones(1), out_dtype=FULL)
    assert error(got, (x64 @ w64.T).view(2, 3, 10)) <= TOLERANCE[FULL]


def nearest_code(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to nearest even onto a float8 grid by looking at every code."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = decode_fp8(codes.view(dtype))
    limit = torch.finfo(dtype).max
    codes, values = codes[values <= limit], values[values <= limit]
    gap = (y.abs().double().reshape(-1, 1) - values).abs()
    best = gap.min(1, keepdim=True).values
    tied = torch.where(gap == best, (codes & 1).double(), 2.0)  # the even code wins
    return values[tied.argmin(1)].reshape(y.shape) * torch.sign(y.double())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("k", [1, 31, 300])
def test_quant_rows(dtype, k):
    x = torch.randn(5, k) * torch.tensor([1e-6, 1.0, 0.0, 1e4, 3.0])[:, None]
    codes, scale = quant_rows(x, dtype)
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    peak = x.abs().amax(1)
    assert torch.allclose(scale, torch.where(peak == 0, 1.0, peak / limit), rtol=1e-6)
    assert scale[2] == 1
    assert not codes[2].view(torch.uint8).any()
    y = x * scale[:, None].reciprocal()
    if dtype == torch.int8:
        assert torch.equal(codes, y.round().clamp(-127, 127).to(torch.int8))
    else:
        assert torch.equal(decode_fp8(codes), nearest_code(y.clamp(-limit, limit), dtype))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("k", [40, 17000])
def test_quant_rows_multiplies_columns_first(dtype, k):
    x, column = torch.randn(3, k).half(), (torch.rand(k) * 2).half()
    codes, scale = quant_rows(x, dtype, column=column)
    want, want_scale = quant_rows(x * column, dtype)  # rounded to half, as torch does
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scale, want_scale)
    wide, _ = quant_rows(x, dtype, column=column.float())
    assert torch.equal(wide.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_rounded_rows_are_codes_times_scale(dtype, static):
    x, column = torch.randn(2, 3, 100).half(), torch.rand(100)
    x[0, 1, 5] = float("nan")
    more = {"column": column, "static_scale": torch.tensor(0.01) if static else None}
    codes, scale = quant_rows(x, dtype, **more)
    values = codes.float() if dtype == torch.int8 else decode_fp8(codes).float()
    want = (values * scale[..., None]).half()
    got = round_rows(x, dtype, **more)
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert got.isnan().any(-1).tolist() == [[False, True, False], [False] * 3]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("step", [0.02, -0.02, 0.0, 1e-44, float("inf")])
def test_quant_rows_with_a_static_scale(dtype, step):
    x = torch.randn(3, 300)
    x[0, :3] = torch.tensor([float("inf"), 1e30, -1e30])
    x[1, 7] = float("nan")
    codes, scale = quant_rows(x, dtype, static_scale=torch.tensor([[step]]))
    assert scale[1].isnan()
    assert torch.equal(scale[[0, 2]], torch.full((2,), step))
    assert not codes[1].view(torch.uint8).any()
    if step in (0.0, 1e-44, float("inf")):
        assert not codes[1:].view(torch.uint8).any()
        return
    y = x[[0, 2]] * torch.tensor(step).reciprocal()
    if dtype == torch.int8:
        assert torch.equal(codes[[0, 2]], y.round().clamp(-128, 127).to(torch.int8))
    else:
        limit = torch.finfo(dtype).max
        found = decode_fp8(codes[[0, 2]].view(torch.uint8).view(dtype))
        assert torch.equal(found, nearest_code(y.clamp(-limit, limit), dtype))


def test_quant_rows_with_strides_past_32_bits():
    memory = torch.empty(2**32 + 64, dtype=torch.float16)  # pages that are not touched take no memory
    for strides in ((1, 2**31 + 5), (2**31 + 5, 1)):
        x = torch.as_strided(memory, (2, 3), strides)
        x.copy_(torch.randn(2, 3))
        (codes, scale), (want, want_scale) = quant_rows(x), quant_rows(x.contiguous())
        assert torch.equal(codes, want)
        assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("dtype", FP8)
def test_ties_go_to_the_even_code(dtype):
    grid = decode_fp8(torch.arange(128, dtype=torch.uint8).view(dtype))
    grid = grid[grid <= torch.finfo(dtype).max].float()
    halves = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([halves, grid, -halves])[None]  # the greatest value makes the scale exactly 1
    codes, scale = quant_rows(x, dtype)
    assert scale.item() == 1
    assert torch.equal(decode_fp8(codes), nearest_code(x, dtype))


def test_quant_rows_bad_rows_and_shapes():
    x = torch.ones(2, 3, 8)
    x[0, 1, 2], x[1, 0, 0], x[1, 2, 1] = float("nan"), float("inf"), 1e-45
    codes, scale = quant_rows(x)
    assert codes.shape == (2, 3, 8)
    assert scale.isnan().tolist() == [[False, True, False], [True, False, False]]
    assert not codes[0, 1].any()
    assert not codes[1, 0].any()
    tiny, tiny_scale = quant_rows(torch.full((1, 4), 1e-42))
    assert torch.isfinite(tiny_scale).all()
    assert tiny.abs().max() <= 127


def test_quant_rows_longer_than_a_block():
    x = torch.randn(2, 17000).to(torch.float16)
    codes, scale = quant_rows(x.T.contiguous().T)
    assert torch.equal(codes, (x.float() * scale[:, None].reciprocal()).round().to(torch.int8))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("bits", "group", "layout"), [
    (4, 128, "exec"), (4, 256, "exec"), (4, None, "exec"), (4, 32, "plain"), (4, 64, "plain"), (2, 256, "exec"),
    (2, 64, "plain"), (8, 128, "plain"), (8, None, "plain"), (4, 32, "exec"), (4, 64, "exec"), (2, 32, "exec"),
    (3, 64, "exec"), (3, None, "exec"), (1, 64, "plain"),
])  # fmt: skip
def test_int8_activations(bits, group, layout, affine):
    w = weight(40, 512, bits, group, affine, scale_dtype=torch.float16)
    scale, shift = group_major(w.scale), None if w.shift is None else group_major(w.shift)
    x = torch.randn(19, 512)
    codes, xs = quant_rows(x)
    bias = torch.randn(40)
    qdata = to_exec_layout(w.qdata, bits) if layout == "exec" else w.qdata
    got = w4a8_gemm(
        codes, xs, qdata, scale, shift, bias, bits=bits, group_size=group, layout=layout, out_dtype=FULL
    )  # fmt: skip
    want = (codes.double() * xs.double()[:, None]) @ w.meaning.T + bias.double()
    assert error(got, want) <= TOLERANCE[FULL]


@pytest.mark.parametrize("splits", [2, 3, 16])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, FP8[0]])
def test_split_sums_of_two_operands(dtype, left, splits):
    (x, x64), (w, w64) = operand(19, 300, dtype), operand(70, 300, dtype)
    xs, ws, bias = torch.rand(19), torch.rand(70), torch.randn(70)
    config = Config(16, 32, 32, left=left)
    want = xs.double()[:, None] * ws.double() * (x64 @ w64.T) + bias.double()
    whole = scaled_mm(x, w, xs, ws, bias, out_dtype=FULL, config=replace(config, split_k=1))
    for _ in range(2):  # the counters are zeros again
        got = scaled_mm(x, w, xs, ws, bias, out_dtype=FULL, config=replace(config, split_k=splits))
        assert error(got, want) <= TOLERANCE[FULL]
        assert dtype != torch.int8 or torch.equal(got, whole)


@pytest.mark.parametrize("splits", [2, 3, 16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("bits", "group", "layout"), [(4, 64, "exec"), (4, None, "exec"), (2, None, "plain")])
def test_split_sums_of_int8_activations(bits, group, layout, affine, splits):
    w = weight(40, 256, bits, group, affine)
    codes, xs = quant_rows(torch.randn(19, 256))
    qdata = to_exec_layout(w.qdata, bits) if layout == "exec" else w.qdata
    config = Config(16, 32, 64)
    run = lambda k: w4a8_gemm(  # noqa: E731
        codes, xs, qdata, w.scale, w.shift, bits=bits, group_size=group, layout=layout, out_dtype=FULL,
        config=replace(config, split_k=k),
    )  # fmt: skip
    want = (codes.double() * xs.double()[:, None]) @ w.meaning.T
    whole = run(1)
    for _ in range(2):
        got = run(splits)
        assert error(got, want) <= TOLERANCE[FULL]
        assert group or torch.equal(got, whole)


def test_int8_activations_ragged():
    w = weight(21, 100, 4, 32, affine=True)
    codes, xs = quant_rows(torch.randn(3, 100))
    got = w4a8_gemm(codes, xs, w.qdata, w.scale, w.shift, group_size=32, out_dtype=FULL)
    assert error(got, (codes.double() * xs.double()[:, None]) @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("form", ["centred", "plain"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_that_ptx_extracts(bits, wide, form):
    """What the instructions of `bytes_asm` compute, one after the other."""
    size = 16 if wide else 8
    words = torch.randint(0, 1 << size, (64, 4)).tolist()
    for field in range(size // bits):
        for four in words:
            found = run_ptx(bytes_asm(field, bits, wide, form), four, size)
            codes = [word >> (field * bits) & ((1 << bits) - 1) for word in four]
            if form == "centred":
                assert [byte * unit_of(bits, form, True) for byte in found] == [
                    code - (1 << (bits - 1)) for code in codes
                ]
            else:
                assert found == codes


def run_ptx(text, words, size):
    """Interprets shifts, and, lop3 and prmt on 32-bit registers. Returns the four signed bytes of $0."""
    packed = sum(word << (size * i) for i, word in enumerate(words))
    registers = {"$1": packed & 0xFFFFFFFF, "$2": packed >> 32}
    for line in text.splitlines():
        name, *operands = line.strip().rstrip(";").replace(",", "").split()
        if name in ("{", "}", ".reg"):
            continue
        target, *values = operands
        a, *rest = (registers[v] if v in registers else int(v, 0) for v in values)
        if name == "mov.b32":
            found = a
        elif name == "shl.b32":
            found = a << rest[0] & 0xFFFFFFFF
        elif name == "shr.u32":
            found = a >> rest[0]
        elif name == "and.b32":
            found = a & rest[0]
        elif name == "lop3.b32":
            b, c, table = rest
            found = sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))
        else:
            assert name == "prmt.b32"
            both = (a | rest[0] << 32).to_bytes(8, "little")
            found = int.from_bytes(bytes(both[rest[1] >> (4 * i) & 7] for i in range(4)), "little")
        registers[target] = found
    return [byte - 256 if byte > 127 else byte for byte in registers["$0"].to_bytes(4, "little")]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, s: scaled_mm(x.float(), w, s, s), "x.dtype"),
        (lambda x, w, s: scaled_mm(x, w.to(FP8[0]), s, s), "w.dtype"),
        (lambda x, w, s: scaled_mm(x, w[:, :4], s, s), r"w.shape: found \(5, 4\), expected \(N, 8\)"),
        (lambda x, w, s: scaled_mm(x, w, torch.ones(3), s), "x_scale.shape"),
        (lambda x, w, s: scaled_mm(x, w, s, s, out_dtype=torch.int32), "out_dtype"),
        (lambda x, w, s: scaled_mm(x[:0], w, s, s), r"x.shape: found \(0, 8\), expected at least one row"),
        (lambda x, w, s: scaled_mm(x, w, s.to("meta"), s), "x_scale.device: found meta, expected cpu"),
        (lambda x, w, s: w4a8_gemm(x[:0], s[:0], w, torch.ones(5, 1), bits=8), "x.shape: .* at least one row"),
        (lambda x, w, s: quant_rows(x.float()[:0]), "x.shape: .* at least one row"),
        (lambda x, w, s: quant_rows(x), "x.dtype"),
        (lambda x, w, s: quant_rows(x.float(), torch.int16), "dtype"),
        (lambda x, w, s: quant_rows(x.float(), column=torch.ones(7)), r"column.shape: found \(7,\), expected \(8,\)"),
        (lambda x, w, s: quant_rows(x.float(), static_scale=torch.ones(2)), "static_scale.shape: .* one element"),
        (lambda x, w, s: int_mm(x, w, s, s), r"x.shape: found \(2, 8\), expected \(M, K\), M at least 17"),
        (lambda x, w, s: int_mm(x.repeat(9, 1), w, s, s), r"w.shape: found \(5, 8\), .* N a multiple of 8"),
        (lambda x, w, s: w4a8_gemm(x, torch.ones(2), w, torch.ones(5, 1), bits=4), "qdata.dtype"),
        (lambda x, w, s: w4a8_gemm(x, torch.ones(3), w, torch.ones(5, 1), bits=8), "x_scale.shape"),
        (lambda x, w, s: w4a8_gemm(x, torch.ones(2), w, torch.ones(5, 2), bits=8), "group_size: found 4"),
    ],
)
def test_bad_input_is_named(call, message):
    x, w = torch.ones(2, 8, dtype=torch.int8), torch.ones(5, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        call(x, w, torch.ones(1))
