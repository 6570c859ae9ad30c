"""Rows of a weight as floats on a CPU: the same bits by every instruction set, packed or as stored; near float64."""

import pytest
import torch
import torch.nn.functional as F
from cpu_reference import DTYPES, HALF_STEP, KINDS, Fresh, codes_only, every_form, form, quantized_layer, values_of

from requanto import QTensor, prepare
from requanto.linear import linear
from requanto.linear.cpu import library
from requanto.linear.cpu.dequantize import dequantize_rows, rows_rounded_once
from requanto.runtime import buffers
from requanto.runtime.settings import settings


@pytest.fixture(autouse=True)
def draw():
    return Fresh()


def rows_of(weight, start, stop, dtype):
    return dequantize_rows(weight, start, stop, torch.full((stop - start, weight.row_length), torch.nan, dtype=dtype))


def near(got, want, weight, roundings=1):
    """Computed in float32 from numbers as large as a row's largest, rounded to the dtype once (or as often as said)."""
    wide = want.abs().amax(-1, keepdim=True) + (
        0 if weight.shift is None else weight.shift.double().abs().amax(-1, keepdim=True)
    )
    step = roundings * HALF_STEP[got.dtype] * want.abs() + 2.0**-22 * wide + torch.finfo(got.dtype).smallest_normal
    return bool(((got.double() - want).abs() <= step).all())


def test_every_form(cpu_level, draw):
    for one in every_form():
        rows, length = draw.one_of((1, 5, 16, 17, 40)), one.length(draw.one_of((8, 33, 96, 200)))
        weight = codes_only(one.weight(rows, length, torch.float32, draw))
        want = values_of(weight)
        packed = quantized_layer(weight.clone())
        prepare(packed, smallest=0)
        start = draw.number(rows)
        stop = start + 1 + draw.number(rows - start)
        for dtype in DTYPES:
            got = rows_of(weight, 0, rows, dtype)
            assert near(got, want, weight), (one, dtype, str(draw))
            assert torch.equal(rows_of(packed.weight, 0, rows, dtype), got), (one, dtype, str(draw))
            assert torch.equal(rows_of(packed.weight, start, stop, dtype), got[start:stop]), (one, dtype, str(draw))
            assert torch.equal(rows_of(weight, start, stop, dtype), got[start:stop]), (one, dtype, str(draw))
            assert rows_of(weight, start, start, dtype).shape == (0, want.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_levels_agree(kind, draw, at_level):
    """Each operation is rounded to float32, so the order of instructions makes no difference."""
    weight = form(kind, group_size=draw.one_of((16, 32, None))).weight(37, 160, torch.bfloat16, draw)
    found = []
    for level in at_level.names:
        with at_level(level):
            found.append([rows_of(weight.clone(), 0, 37, dtype) for dtype in DTYPES])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others)), draw


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "uint8", "nf4", "float8", "fp8_e5m2", "mxfp4"])
def test_without_the_library(kind, draw, monkeypatch):
    """Operators center codes at 0 first, which rounds otherwise, by less than a step."""
    weight = form(kind).weight(37, 160, torch.float32, draw)
    want = values_of(weight)
    monkeypatch.setattr(settings, "compiled", False)
    for dtype in DTYPES:
        assert near(rows_of(weight, 3, 30, dtype), want[3:30], weight, roundings=2), (dtype, str(draw))
        assert near(rows_rounded_once(weight, 3, 30, torch.empty(27, 160, dtype=dtype)), want[3:30], weight), draw


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "nf4", "float8"])
@pytest.mark.parametrize("length", [1, 7, 32, 33, 96])
def test_nothing_is_written_beside_the_rows(cpu_level, kind, length, draw):
    """Rows of the result may lie apart."""
    weight = form(kind, group_size=None).weight(21, length, torch.float32, draw)
    packed = quantized_layer(weight.clone())
    prepare(packed, smallest=0)
    want = rows_of(weight, 0, 21, torch.float32)
    for one in (weight, packed.weight):
        around = torch.full((23, length + 3), 77.0)
        dequantize_rows(one, 0, 21, around[1:22, 1 : length + 1])
        assert torch.equal(around[1:22, 1 : length + 1], want)
        around[1:22, 1 : length + 1] = 77
        assert bool((around == 77).all())


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "int6", "nf4", "float8", "nvfp4"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_an_embedding(cpu_level, kind, packed, draw):
    weight = form(kind).weight(70, 160, draw.one_of(DTYPES), draw)
    layer = quantized_layer(weight)
    want = rows_of(weight, 0, 70, weight.dtype)
    if packed:
        prepare(layer, smallest=0)
    index = torch.randint(70, (3, 11), generator=draw)
    for dtype in (torch.int64, torch.int32):
        assert torch.equal(F.embedding(index.to(dtype), layer.weight), want[index])
    assert torch.equal(F.embedding(index[:, ::2], layer.weight), want[index[:, ::2]])
    assert F.embedding(index[:0], layer.weight).shape == (0, 11, 160)
    for wrong in (-1, 70, 2**40):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([3, wrong]), layer.weight)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_codes_with_gaps(cpu_level, kind, draw):
    """Every other row of a weight, whose codes and scales are views."""
    weight = form(kind).weight(80, 192, torch.bfloat16, draw)[::2]
    assert near(rows_of(weight, 0, 40, torch.float32), values_of(weight.clone()), weight)


def test_a_group_of_equal_weights(cpu_level, draw):
    """Codes of 0 under a scale of 1: the shift is the number, and may be far below that scale."""
    values = torch.randn(4, 64, generator=draw)
    values[:, :32] = 1e-5
    values[2, 32:] = 1000.25
    weight = QTensor.quantize(values, "int4", group_size=32, symmetric=False)
    for way in (None, False):
        settings.compiled = way
        try:
            got = rows_of(weight, 0, 4, torch.float32)
        finally:
            settings.compiled = None
        assert torch.equal(got[:, :32], values[:, :32])
        assert torch.equal(got[2, 32:], values[2, 32:])
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    x = torch.randn(3, 64, generator=draw)
    want = x.double() @ values_of(weight.clone()).t()
    with torch.no_grad():
        assert (layer(x) - want).abs().max() <= 4e-3 * x.abs().sum() * 1000 / 64


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernels", [True, False])
def test_products_of_weights_that_are_not_packed(kind, rows, transposed, kernels, draw, monkeypatch):
    """Sizes that would be padded too much, and matrices that are stored [in, out]."""
    monkeypatch.setattr(settings, "compiled", None if kernels else False)
    monkeypatch.setattr(settings, "pack_on_first_use", False)
    shape = (192, 320) if transposed else (100, 192)
    weight = QTensor.quantize(torch.randn(shape, generator=draw).bfloat16(), kind, transposed=transposed)
    wide = weight.dequantize(torch.float32).double()
    x = torch.randn(rows, 192, generator=draw).bfloat16()
    with torch.inference_mode():
        got = x @ weight if transposed else linear(x, weight)
    want = x.double() @ (wide if transposed else wide.t())
    assert not weight.is_packed
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_workspace_s_bound(kind, kernels, draw, monkeypatch):
    monkeypatch.setattr(settings, "compiled", None if kernels else False)
    monkeypatch.setattr(settings, "workspace_bytes", 2**18)
    buffers.release()
    weight = form(kind).weight(300, 1088, torch.bfloat16, draw)
    assert near(rows_of(weight, 0, 300, torch.bfloat16), values_of(weight), weight, roundings=2)
    assert buffers.held_bytes() <= 2**18


def test_without_the_library_nothing_is_asked_of_it(monkeypatch, draw):
    monkeypatch.setattr(settings, "compiled", False)
    monkeypatch.setattr(library, "_load", lambda: pytest.fail("the library was loaded"))
    monkeypatch.setattr(library, "_library", None)
    weight = form("int8").weight(40, 192, torch.bfloat16, draw)
    assert near(rows_of(weight, 0, 40, torch.bfloat16), values_of(weight), weight, roundings=2)
