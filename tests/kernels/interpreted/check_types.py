"""Every width, codebook and small float in Triton's interpreter against float64. No bf16: the interpreter's is wrong."""

import random

import pytest
import torch
import triton
import triton.language as tl
from reference import TOLERANCE, check_equal_groups, draw, error, pack, small_float_values, weight

from requanto_kernels import (
    Config,
    has_exec_layout,
    to_exec_layout,
    w4a8_gemm,
    wq_dequant,
    wq_gemm,
    wq_gemm_dx,
    wq_gemm_grouped,
)
from requanto_kernels._fields import open_table

HALF, FULL = torch.float16, torch.float32
#: Integers by bits and whether there is a shift; "u8" are unsigned codes of a whole byte.
INTEGERS = [*((str(bits), affine) for bits in (1, 3, 5, 6, 7) for affine in (False, True)), ("u8", True)]
FLOATS = [f"e{e}m{bits - 1 - e}" for bits in range(3, 8) for e in range(1, min(bits - 1, 4) + 1)]
TABLES = ["table2", "table3", "table4", "table6"]
KINDS = [*INTEGERS, *((form, False) for form in (*FLOATS, *TABLES))]


def layouts(w, k):
    """The codes as stored, and those in execution layout where it is another one."""
    yield "plain", w.qdata
    if has_exec_layout(w.bits, k):
        yield "exec", to_exec_layout(w.qdata, w.bits)


@pytest.mark.parametrize(("kind", "affine"), KINDS)
def test_dequantized(kind, affine):
    """Odd rows; without a shift the one product is rounded once, so equal to the bit."""
    for n, k, group, dtype in ((3, 1, None, FULL), (7, 203, 29, HALF), (5, 256, 32, FULL), (18, 129, None, HALF)):
        w = draw(kind, affine, n, k, group)
        for layout, qdata in layouts(w, k):
            got = wq_dequant(qdata, w.scale, w.shift, k=k, layout=layout, dtype=dtype, **w.what)
            if affine:  # the interpreter rounds an fma twice
                assert error(got, w.meaning) <= (1e-6 if dtype == FULL else 5e-4)
            else:
                assert torch.equal(got, w.meaning.float().to(dtype))


@triton.jit
def _open(values, out, DTYPE: tl.constexpr):
    table = open_table(values, 4, "table", True, DTYPE, True)
    for i in tl.static_range(8):
        tl.store(out + i + tl.zeros([1, 1], tl.int32), table[i])


def test_the_registers_of_a_codebook():
    """Low, then high bytes of the values in the dtype of x, 4 in each word; test_decode.py looks codes up in them."""
    values, out = torch.randn(16), torch.zeros(8, dtype=torch.int32)
    _open[(1,)](values, out, tl.float16)
    parts = values.to(HALF).view(torch.uint8).view(16, 2)
    assert torch.equal(out, parts.T.contiguous().view(torch.int32).flatten())


@pytest.mark.parametrize("form", FLOATS)
def test_every_code_of_a_small_float(form):
    values = small_float_values(form)
    codes, bits = torch.arange(len(values)), 1 + int(form[1]) + int(form[3])
    for dtype in (FULL, HALF):
        got = wq_dequant(pack(codes, bits)[None], torch.ones(1, 1), bits=bits, small_float=form, dtype=dtype)[0]
        assert torch.equal(got.double(), values)
        assert torch.equal(got.signbit(), codes >= len(values) // 2)


@pytest.mark.parametrize(("kind", "affine"), [*INTEGERS, *((form, False) for form in (*FLOATS[::5], *TABLES))])
def test_products(kind, affine):
    """Forward, gradient, experts; one dtype and scale dtype each, drawn anew."""
    pick = random.Random(f"{kind} {affine} {random.random()}").choice
    dtype, scale_dtype = pick([FULL, HALF]), pick([FULL, HALF])
    m, n, k, group = pick([1, 17]), pick([7, 24]), pick([33, 130, 256]), pick([32, 64, 20, None])
    say = f"{dtype=} {scale_dtype=} {m=} {n=} {k=} {group=}"
    w = draw(kind, affine, n, k, group, experts=2, scale_dtype=scale_dtype)
    x, dy, bias = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), torch.randn(n).to(dtype)
    what = {name: value for name, value in w.what.items() if name != "codebook"} | {"codebook": w.codebook}
    ends, half = torch.tensor([0, m // 2, m]), m // 2
    parts = lambda t, matrix: torch.cat([t[:half].double() @ matrix[0], t[half:].double() @ matrix[1]])  # noqa: E731
    bound = TOLERANCE[dtype]
    for layout, qdata in layouts(w, k):
        what["layout"] = layout
        shift = None if w.shift is None else w.shift[0]
        got = wq_gemm(x, qdata[0], w.scale[0], shift, bias, **what)
        size = (
            x.double().abs() @ w.meaning[0].abs().T
        ).norm() / k**0.5  # where terms cancel, errors are as large as they
        want = x.double() @ w.meaning[0].T + bias.double()
        assert (got.double() - want).norm() <= bound * torch.maximum(size, want.norm()), say
        got, want = wq_gemm_dx(dy, qdata[0], w.scale[0], shift, k=k, **what), dy.double() @ w.meaning[0]
        size = (dy.double().abs() @ w.meaning[0].abs()).norm() / n**0.5
        assert (got.double() - want).norm() <= bound * torch.maximum(size, want.norm()), say
        got, want = wq_gemm_grouped(x, ends, qdata, w.scale, w.shift, **what), parts(x, w.meaning.mT)
        size = (parts(x.abs(), w.meaning.abs().mT)).norm() / k**0.5
        assert (got.double() - want).norm() <= bound * torch.maximum(size, want.norm()), say


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("fields", [False, True])
@pytest.mark.parametrize("kind", ["table2", "table4", "3"])
def test_every_form_of_the_kernel(kind, fields, left):
    for split in (1, 2) if left == fields else (1,):
        w = draw(kind, kind == "3", 16, 512, 64)
        x = torch.randn(9, 512).to(HALF)
        config = Config(block_m=16, block_n=16, block_k=256, left=left, fields=fields, split_k=split)
        got = wq_gemm(x, to_exec_layout(w.qdata, w.bits), w.scale, w.shift, layout="exec", config=config, **w.what)
        assert error(got, x.double() @ w.meaning.T) <= TOLERANCE[HALF]


@pytest.mark.parametrize("scale_dtype", [FULL, HALF])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("kind", ["1", "3", "7", "u8"])
def test_groups_of_equal_weights(kind, group, scale_dtype):
    """Stored as scale 1, codes 0 and their value as shift: they come back rounded once."""
    w = draw(kind, True, 24, 256, group, scale_dtype=scale_dtype, equal=0.5)
    for layout, qdata in layouts(w, 256):
        got = wq_gemm_dx(torch.eye(24, dtype=HALF), qdata, w.scale, w.shift, k=256, layout=layout, **w.what)
        check_equal_groups(got, w, TOLERANCE[HALF])
        x = torch.eye(256, dtype=HALF)[:64]
        got = wq_gemm(x, qdata, w.scale, w.shift, layout=layout, **w.what)
        assert error(got, w.meaning[:, :64].T) <= TOLERANCE[HALF]
        same = w.equal[:, :64].T
        assert error(got[same], w.meaning[:, :64].T[same]) <= TOLERANCE[HALF]


@pytest.mark.parametrize(("bits", "affine"), [(1, True), (3, False), (3, True), (6, False), (7, True)])
@pytest.mark.parametrize(("group", "k"), [(256, 512), (32, 128), (None, 77)])
def test_int8_activations(bits, affine, group, k):
    w = weight(12, k, bits, group, affine)
    x, steps = torch.randint(-127, 128, (5, k), dtype=torch.int8), torch.rand(5)
    layout, qdata = list(layouts(w, k))[-1] if group == 256 else ("plain", w.qdata)
    got = w4a8_gemm(x, steps, qdata, w.scale, w.shift, layout=layout, out_dtype=FULL, **w.what)
    assert error(got, (x.double() * steps.double()[:, None]) @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("bits", range(1, 9))
def test_nothing_beside_a_row_counts(bits):
    """Rows with other bytes between them, and bits behind the last code of a row."""
    k = 77 if bits < 8 else 75
    w = weight(9, k, bits, None, True, unsigned=bits == 8)
    wide = torch.full((9, w.qdata.shape[1] + 5), 255, dtype=torch.uint8)
    wide[:, : w.qdata.shape[1]] = w.qdata
    filled = k * bits % 8
    if filled:
        wide[:, w.qdata.shape[1] - 1] |= 256 - (1 << filled)
    codes = wide[:, : w.qdata.shape[1]]
    assert error(wq_dequant(codes, w.scale, w.shift, bits=bits, k=k, dtype=FULL), w.meaning) <= 1e-6
    x = torch.randn(3, k)
    assert error(wq_gemm(x, codes, w.scale, w.shift, bits=bits), x.double() @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_beyond_two_gigabytes(bits):
    """Codes at offsets that no int32 holds; only the pages that are written take memory."""
    w = weight(3, 96, bits, 32, True, unsigned=bits == 8)
    stride = (2**31 + 4096) // 2
    codes = torch.empty(2 * stride + w.qdata.shape[1], dtype=torch.uint8).as_strided(w.qdata.shape, (stride, 1))
    codes.copy_(w.qdata)
    assert error(wq_dequant(codes, w.scale, w.shift, k=96, dtype=FULL, **w.what), w.meaning) <= 1e-6
    x = torch.randn(2, 96)
    assert error(wq_gemm(x, codes, w.scale, w.shift, **w.what), x.double() @ w.meaning.T) <= TOLERANCE[FULL]
    got = wq_gemm_dx(x[:, :3], codes, w.scale, w.shift, k=96, **w.what)
    assert error(got, x[:, :3].double() @ w.meaning) <= TOLERANCE[FULL]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": torch.ones(8)}, r"codebook.shape: found \(8,\), expected \(16,\)"),
        ({"codebook": torch.ones(16, dtype=torch.int32)}, "codebook.dtype: found torch.int32"),
        ({"codebook": torch.ones(16, device="meta")}, "codebook.device: found meta, expected cpu"),
        ({"codebook": torch.ones(16), "shift": torch.ones(8, 2)}, "codebook: found one with bits 4, a shift, expected"),
        (
            {"codebook": torch.ones(16), "small_float": "e2m1"},
            "codebook: found one with bits 4, a small_float, expected",
        ),
        ({"small_float": "e3m2"}, "small_float: found 'e3m2', expected '' or, .* = 4 bits"),
        ({"small_float": "float"}, "small_float: found 'float'"),
        (
            {"qdata": torch.zeros(8, 64, dtype=torch.uint8), "bits": 8},
            "shift: found None, expected a tensor, which unsigned",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    w = weight(8, 64, 4, 32)
    good = {"x": torch.randn(2, 64), "qdata": w.qdata, "scale": w.scale, "bits": 4}
    with pytest.raises(ValueError, match=message):
        wq_gemm(**(good | change))
    if "qdata" in change:
        x, scale = torch.ones(2, 64, dtype=torch.int8), torch.ones(8, 1)
        with pytest.raises(
            ValueError, match=r"qdata.dtype: found torch.uint8, expected torch.int8 for int8 activations"
        ):
            w4a8_gemm(x, torch.ones(2), change["qdata"], scale, scale, bits=8)
