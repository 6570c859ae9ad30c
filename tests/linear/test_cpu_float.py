"""RQ_FLOAT of the CPU kernels against float64: all codes, scales, dtypes, strides, odd sizes, at every level."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from types import SimpleNamespace

import pytest
import torch
from cpu_levels import PROPERTY
from cpu_weights import DTYPES, FLOAT8, KINDS, Weight, combinations, weight

from requanto.linear.cpu import conditions
from requanto.linear.cpu.library import Library
from requanto_cpu import interface as c
from requanto_cpu import level, levels, library, set_level

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 7.0
#: Most error of a result, relative to the sum of the absolute values of its terms: of the sums, and of rounding the result.
ROUNDING = {torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture(params=levels())
def at_level(request, record_property):
    before = level()
    set_level(request.param)
    record_property(PROPERTY, request.param)
    yield request.param
    set_level(before)


def multiply(
    w: Weight, x: torch.Tensor, bias=None, dtype=None, scratch: int | None = None, how=c.FLOAT
) -> torch.Tensor:
    """The result of the kernel, whose surroundings in memory must stay what they were."""
    rows, columns = x.shape[0], w.strips.rows
    out = torch.full((rows + 1, columns + 3), GUARD, dtype=dtype or x.dtype)
    g = c.RqGemm(weight=ctypes.pointer(w.strips), rows=rows, x_stride=x.stride(0), out_stride=out.stride(0))
    g.x_dtype, g.out_dtype, g.arithmetic = DTYPES[x.dtype], DTYPES[out.dtype], how
    if bias is not None:
        g.bias_dtype, g.bias = DTYPES[bias.dtype], bias.data_ptr()
    g.scratch_bytes = library().rq_gemm_scratch(g, rows) if scratch is None else scratch
    buffer = torch.full((g.scratch_bytes + 64,), 255, dtype=torch.uint8)
    code = library().rq_gemm(g, x.data_ptr(), out.data_ptr(), buffer.data_ptr())
    assert code == 0, library().rq_error(code)
    assert bool((buffer[g.scratch_bytes :] == 255).all()), "wrote behind the scratch buffer"
    assert bool((out[:rows, columns:] == GUARD).all()), "wrote beside the result"
    assert bool((out[rows] == GUARD).all()), "wrote below the result"
    return out[:rows, :columns]


def least_scratch(w: Weight, x: torch.Tensor, how=c.FLOAT) -> int:
    g = c.RqGemm(weight=ctypes.pointer(w.strips), rows=x.shape[0], arithmetic=how)
    g.x_dtype = g.out_dtype = DTYPES[x.dtype]
    return library().rq_gemm_least_scratch(g)


def check(w: Weight, x: torch.Tensor, out: torch.Tensor, bias=None, more_bound: float = 0.0) -> None:
    """bfloat16 x: weights may be rounded to bfloat16, as dequantized ones are."""
    more = 0 if bias is None else bias.double()
    expected = x.double() @ w.values.double().t() + more
    size = x.double().abs() @ w.values.double().abs().t() + abs(more)
    bound = ROUNDING[out.dtype] + (ROUNDING[torch.bfloat16] if x.dtype == torch.bfloat16 else 0) + 4e-6 + more_bound
    error = (out.double() - expected).abs()
    finite = torch.isfinite(expected) & (expected.abs() < torch.finfo(out.dtype).max)
    assert bool((error[finite] <= bound * size[finite] + 1e-7).all()), float((error / size)[finite].max())
    special = ~torch.isfinite(expected)
    assert torch.equal(out[special].double().nan_to_num(1, 2, 3), expected[special].nan_to_num(1, 2, 3))


def cases(count: int, seed: int):
    chosen = random.Random(seed)
    every = list(combinations())
    chosen.shuffle(every)
    for kind, scale, shift in itertools.islice(itertools.cycle(every), count):
        length = chosen.choice([8, 16, 24, 32, 40, 64, 96, 100, 160, 512, 2080, 4128])
        group = chosen.choice([None, *(g for g in (8, 16, 24, 32, 40, 64, 160) if length % g == 0)])
        rows, columns = chosen.choice([1, 2, 3, 4, 5, 7, 14, 15, 31]), chosen.choice([1, 15, 16, 17, 32, 33, 70])
        x_dtype, of_scales = chosen.choice(FLOATS), chosen.choice(FLOATS)
        yield kind, scale, shift, length, group, rows, columns, x_dtype, of_scales, chosen


def test_equals_float64(at_level):
    torch.manual_seed(0)
    for kind, scale, shift, length, group, rows, columns, x_dtype, of_scales, chosen in cases(200, 1):
        w = weight(
            kind, columns, length, group, scale, shift, of_scales, chosen.choice([4, 5, 6, 8]), chosen.random() < 0.7,
            nan=chosen.random() < 0.2,
        )  # fmt: skip
        x = torch.randn(rows, length + chosen.choice([0, 5])).to(x_dtype)[:, :length]
        bias = chosen.choice([None, torch.randn(columns).to(x_dtype), torch.randn(columns)])
        out = multiply(w, x, bias, chosen.choice([x_dtype, torch.float32]), chosen.choice([None, least_scratch(w, x)]))
        check(w, x, out, bias)


def test_few_rows_of_bfloat16_meet_exact_codes(at_level):
    """Sums of codes are scaled, so no weight is rounded to bfloat16 (of codebooks neither)."""
    torch.manual_seed(0)
    for kind, _ in KINDS:
        w = weight(kind, 33, 256, 32, dtype=torch.float32)
        x = torch.randn(4, 256).to(torch.bfloat16)
        out = multiply(w, x, dtype=torch.float32)
        size = x.double().abs() @ w.values.double().abs().t()
        error = (out.double() - x.double() @ w.values.double().t()).abs()
        assert bool((error <= 4e-6 * size).all()), kind


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_infinite_and_huge_x(at_level, rows):
    """The shift of a weight must not turn an infinity into NaN, nor a sum of large numbers into infinity."""
    torch.manual_seed(0)
    for x_dtype, value in itertools.product(FLOATS, (float("inf"), float("nan"), 1e38)):
        if value == 1e38 and x_dtype == torch.float16:
            continue
        w = weight("int4", 20, 64, 32, shift="plain", dtype=torch.float32)
        x = torch.randn(rows, 64).to(x_dtype)
        x[0, 5] = value
        out = multiply(w, x, dtype=torch.float32)
        expected = x @ (w.values.to(x_dtype)).t() if value != 1e38 else x.float() @ w.values.t()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        check(w, x, out)


def test_subnormal_mode_changes_nothing(at_level):
    torch.manual_seed(0)
    for kind in FLOAT8:
        w, x = weight(kind, 33, 64, 32, dtype=torch.float32), torch.randn(3, 64)
        expected = multiply(w, x)
        assert torch.set_flush_denormal(True)
        try:
            found = multiply(w, x)
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 40, 600])
def test_threads_and_scratch_change_nothing(at_level, rows):
    torch.manual_seed(0)
    for kind, x_dtype in (("int4", torch.float32), ("e4m3", torch.bfloat16)):
        w, x = weight(kind, 300, 2112, 32), torch.randn(rows, 2112).to(x_dtype)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                found.append(multiply(w, x))
        finally:
            torch.set_num_threads(threads)
        found.append(multiply(w, x, scratch=least_scratch(w, x)))
        found.append(multiply(w, x, scratch=max(least_scratch(w, x), 1 << 20)))
        assert all(torch.equal(found[0], other) for other in found)


PARTS_OF = [
    *((rows, 70, 1184) for rows in (1, 4, 5, 15, 16, 17, 31, 32, 33, 47, 64, 65)),
    (588, 33, 40),
    (600, 17, 2080),
]


@pytest.mark.parametrize("x_dtype", FLOATS)
def test_x_in_two_parts_of_bfloat16(at_level, x_dtype):
    """16 bits of each element, whatever its neighbours are; of float16 all. Where there are no tiles, it is float32."""
    torch.manual_seed(0)
    for (rows, columns, length), kind in itertools.product(PARTS_OF, ("int8", "uint6")):
        w = weight(kind, columns, length, None, dtype=torch.float32)
        x = (torch.randn(rows, length + 3) * 10 ** (4 * torch.rand(rows, length + 3))).to(x_dtype)[:, :length]
        bias = torch.randn(columns)
        out = multiply(w, x, bias, torch.float32, how=c.PARTS)
        check(w, x, out, bias, 2.0**-16 if x_dtype == torch.float32 else 0)
        least = multiply(w, x, bias, torch.float32, least_scratch(w, x, c.PARTS), how=c.PARTS)
        assert torch.equal(out, least)


@pytest.mark.parametrize(
    ("kind", "group", "shift"), [("int8", 32, "none"), ("uint8", None, "plain"), ("e4m3", None, "none")]
)
def test_weights_that_bfloat16_would_round_meet_float32(at_level, kind, group, shift):
    torch.manual_seed(0)
    w, x = weight(kind, 33, 96, group, shift=shift, dtype=torch.float32), torch.randn(40, 96)
    assert torch.equal(multiply(w, x, how=c.PARTS), multiply(w, x))


def test_rows_in_two_parts_do_not_depend_on_others_or_threads(at_level):
    torch.manual_seed(0)
    w, x = weight("int8", 576, 544, None), torch.randn(70, 544)
    expected = multiply(w, x, how=c.PARTS)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 16):
            torch.set_num_threads(count)
            assert torch.equal(multiply(w, x, how=c.PARTS), expected)
    finally:
        torch.set_num_threads(threads)
    strange = {7: float("inf"), 20: float("nan"), 40: 3e38, 64: 1e-38}
    for row, number in strange.items():
        x[row, 3] = number
    x[64] *= 1e-36
    found = multiply(w, x, how=c.PARTS)
    same = [row for row in range(70) if row not in strange]
    assert torch.equal(found[same], expected[same])
    check(w, x, found, more_bound=2.0**-16)


def test_too_small_scratch_is_an_error():
    w, x = weight("int4", 32, 64, 32), torch.randn(2, 64)
    g = c.RqGemm(weight=ctypes.pointer(w.strips), rows=2, arithmetic=c.FLOAT, x_dtype=c.F32, out_dtype=c.F32)
    g.scratch_bytes = library().rq_gemm_least_scratch(g) - 1
    assert library().rq_gemm(g, x.data_ptr(), x.data_ptr(), x.data_ptr()) == c.E_SCRATCH


def test_many_rows_of_bfloat16_are_torchs_where_only_it_has_amx(monkeypatch):
    """The compiler may not know AMX."""

    class Bf16:
        level, has_bfloat16, lacks_amx = "bf16", True, True

    monkeypatch.setattr(conditions.library, "find", Bf16)
    assert conditions.gemm_rows(conditions.FLOAT, torch.bfloat16) < 64
    assert conditions.gemm_rows(conditions.FLOAT, torch.float32) > 2**32
    Bf16.lacks_amx = False
    assert conditions.gemm_rows(conditions.FLOAT, torch.bfloat16) > 2**32


def test_the_library_lacks_amx_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.delenv("REQUANTO_CPU", raising=False)

    def lacks(processor, built):
        build = SimpleNamespace(processor_levels=lambda: processor)
        return Library(SimpleNamespace(build=build, levels=lambda: built), None, None).lacks_amx

    assert lacks(["avx2", "bf16", "amx"], ["avx2", "bf16"])
    assert not lacks(["avx2", "bf16", "amx"], ["amx"])
    assert not lacks(["avx2", "bf16"], ["avx2", "bf16"])
    assert not lacks(None, ["bf16"])
    monkeypatch.setenv("REQUANTO_CPU", "bf16")  # chosen: the only level that is built
    assert not lacks(["avx2", "bf16", "amx"], ["bf16"])


@pytest.fixture
def with_tiles():
    """The level amx, where this processor and compiler have it."""
    if "amx" not in levels():
        pytest.skip("this processor or compiler has no AMX: tests/linear/test_cpu_qemu.py emulates it")
    before = level()
    set_level("amx")
    yield
    set_level(before)


def test_tiles_of_any_number_of_rows(with_tiles):
    """Two tiles, one, a part of one; a panel alone or twice; several pieces of the columns."""
    torch.manual_seed(0)
    for rows, columns, length in ((5, 33, 544), (16, 31, 72), (17, 200, 1600), (32, 97, 8), (33, 16, 1056), (47, 130, 520),
                                  (48, 70, 512), (64, 257, 40), (70, 129, 2080)):  # fmt: skip
        for kind in ("int8", "int4", "e4m3", "nf4"):
            group = next((g for g in (32, 40, 24, 8) if length % g == 0), None) if kind != "int8" else None
            w = weight(kind, columns, length, group, dtype=torch.float32)
            x = torch.randn(rows, length + 3).to(torch.bfloat16)[:, :length]
            bias = torch.randn(columns)
            check(w, x, multiply(w, x, bias, torch.float32), bias)


def test_a_row_with_tiles_does_not_depend_on_the_others(with_tiles):
    """How many there are, what is in them, and which tile it is in."""
    torch.manual_seed(0)
    w, x = weight("int4", 70, 1184, 32), torch.randn(70, 1184).to(torch.bfloat16)
    expected = multiply(w, x)
    for begin, end in ((0, 5), (3, 20), (31, 64), (64, 70), (1, 34)):
        assert torch.equal(multiply(w, x[begin:end]), expected[begin:end])
    x[7, 3], x[40, 1000] = float("inf"), float("nan")
    other = multiply(w, x)
    same = [row for row in range(70) if row not in (7, 40)]
    assert torch.equal(other[same], expected[same])


def test_tiles_beside_those_of_torch(with_tiles):
    """torch's own GEMMs configure tiles in the same threads, in between and in other Python threads."""
    torch.manual_seed(0)
    w, x = weight("int4", 130, 1056, 32), torch.randn(40, 1056).to(torch.bfloat16)
    a, b = torch.randn(40, 1056).to(torch.bfloat16), torch.randn(520, 1056).to(torch.bfloat16)
    expected, product = multiply(w, x), a @ b.t()
    threads, wrong = torch.get_num_threads(), []

    def run():
        for _ in range(20):
            if not torch.equal(a @ b.t(), product) or not torch.equal(multiply(w, x), expected):
                wrong.append(threading.current_thread())

    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            product = a @ b.t()
            workers = [threading.Thread(target=run) for _ in range(2)]
            for worker in workers:
                worker.start()
            run()
            for worker in workers:
                worker.join()
    finally:
        torch.set_num_threads(threads)
    assert not wrong
