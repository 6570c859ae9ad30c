"""Stored codes made bfloat16 by compiled kernels, and by operators: the same numbers, at every place."""

import pytest
import torch

from requanto import QTensor
from requanto.linear import linear
from requanto.linear.cpu import fused_dequantize
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.dequantize import dequantize_rows
from requanto.runtime import buffers
from requanto.runtime.settings import settings

pytestmark = pytest.mark.skipif(cache.compiler() is None, reason="no C++ compiler: neither CXX nor torch's is here")
KINDS = {
    "int8": {},
    "int8 in groups": {"group_size": 32},
    "int4": {"group_size": 32},
    "int4 a row": {"group_size": None},
    "int4 symmetric": {"group_size": 64, "symmetric": True},
    "int4 with scales in 8 bits": {"group_size": 32, "scale_bits": 8},
    "uint4": {"group_size": 32},
    "float8": {},
}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setattr(settings, "compiled", True)
    monkeypatch.setattr(fused_dequantize, "SMALLEST", 0)


def quantized(kind, *shape, **how):
    return QTensor.quantize(torch.randn(shape).bfloat16(), kind.split()[0], **{**KINDS[kind], **how})


def exact(weight):
    """What the codes stand for, in float64, and how far a bfloat16 number may be from it."""
    want = weight.dequantize(torch.float32).double()
    # Half a step, and what a difference of two float32 numbers loses where it is small beside them.
    return want, want.abs() * 2.0**-8 + want.abs().amax() * 2.0**-22


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "length"), [(1, 64), (3, 192), (7, 1088), (70, 64)])
def test_every_number(kind, rows, length):
    weight = quantized(kind, rows, length)
    assert fused_dequantize.ready(weight, torch.bfloat16)
    out = torch.full((rows, length), torch.nan, dtype=torch.bfloat16)
    fused_dequantize.fill(weight, 0, rows, out)
    want, step = exact(weight)
    assert bool(((out.double() - want).abs() <= step).all())


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows(kind):
    weight = quantized(kind, 40, 192)
    want, step = exact(weight)
    for start, stop in ((0, 1), (7, 23), (39, 40), (5, 5)):
        out = torch.empty(stop - start, 192, dtype=torch.bfloat16)
        dequantize_rows(weight, start, stop, out)
        assert bool(((out.double() - want[start:stop]).abs() <= step[start:stop]).all())


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("length", [1, 3, 31, 33, 577])
def test_odd_lengths(kind, length):
    weight = quantized(kind, 5, length)
    out = torch.empty(5, length, dtype=torch.bfloat16)
    fused_dequantize.fill(weight, 0, 5, out)
    want, step = exact(weight)
    assert bool(((out.double() - want).abs() <= step).all())


@pytest.mark.parametrize("length", [2, 6, 22, 34, 66, 1030])
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_lengths_of_int4(length, symmetric):
    """Nothing is written beyond the rows that were asked for."""
    weight = QTensor.quantize(torch.randn(5, length).bfloat16(), "int4", group_size=None, symmetric=symmetric)
    around = torch.full((7, length), 77.0, dtype=torch.bfloat16)
    fused_dequantize.fill(weight, 0, 5, around[1:6])
    want, step = exact(weight)
    assert bool(((around[1:6].double() - want).abs() <= step).all())
    assert bool((around[[0, 6]] == 77).all())


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_codes_with_gaps(kind):
    weight = quantized(kind, 80, 192)[::2]
    out = torch.empty(40, 192, dtype=torch.bfloat16)
    fused_dequantize.fill(weight, 0, 40, out)
    want, step = exact(weight)
    assert bool(((out.double() - want).abs() <= step).all())


def test_experts_count_one_by_one(monkeypatch):
    monkeypatch.setattr(fused_dequantize, "SMALLEST", 2**16)
    assert not fused_dequantize.ready(quantized("int8", 8, 128, 256), torch.bfloat16)
    assert fused_dequantize.ready(quantized("int8", 2, 256, 256), torch.bfloat16)


def test_groups_that_share_bytes_are_left_to_operators():
    for length in (15, 33):
        weight = QTensor.quantize(torch.randn(4, length).bfloat16(), "int4", group_size=None)
        assert not fused_dequantize.ready(weight, torch.bfloat16)
        out = torch.empty(4, length, dtype=torch.bfloat16)
        want, step = exact(weight)
        assert bool(((dequantize_rows(weight, 0, 4, out).double() - want).abs() <= 2 * step).all())


@pytest.mark.parametrize("kind", ["int3", "int2", "nf4", "int6", "float8_e5m2"])
def test_types_without_a_kernel(kind):
    weight = QTensor.quantize(torch.randn(4, 64).bfloat16(), kind)
    assert fused_dequantize.family(weight) is None


def test_other_dtypes_are_left_to_operators():
    weight = quantized("int8", 4, 64)
    assert not any(fused_dequantize.ready(weight, dtype) for dtype in (torch.float32, torch.float16))


def test_every_float8_code():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0)
    weight = quantized("float8", 3, 256)
    weight.qdata, weight.scale = numbers.to(torch.float8_e4m3fn).expand(3, -1).contiguous(), torch.ones(3, 1)
    out = torch.empty(3, 256, dtype=torch.bfloat16)
    fused_dequantize.fill(weight, 0, 3, out)
    assert torch.equal(out.float(), numbers.expand(3, -1))


def test_a_group_of_equal_weights():
    """Codes of 0 under a scale of 1: the shift is the number, and may be far below that scale."""
    values = torch.randn(4, 64)
    values[:, :32] = 1e-5
    weight = QTensor.quantize(values.bfloat16(), "int4", group_size=32, symmetric=False)
    out = torch.empty(4, 64, dtype=torch.bfloat16)
    fused_dequantize.fill(weight, 0, 4, out)
    want, step = exact(weight)
    assert bool(((out.double() - want).abs() <= step).all())
    assert torch.equal(out[:, :32], values[:, :32].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_weights_that_are_not_packed(kind, rows, transposed):
    """Sizes that are no whole blocks, and matrices that are stored [in, out]."""
    shape = (192, 320) if transposed else (100, 192)
    weight = quantized(kind, *shape, transposed=transposed)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    wide = weight.dequantize(torch.float32).double()
    x = torch.randn(rows, 192).bfloat16()
    with torch.inference_mode():
        got = x @ parameter if transposed else linear(x, parameter)
    want = x.double() @ (wide if transposed else wide.t())
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_workspace_s_bound(kind, monkeypatch):
    """Float8 goes through float32, and a group of rows at a time."""
    monkeypatch.setattr(settings, "workspace_bytes", 2**18)
    buffers.release()
    weight = quantized(kind, 300, 1088)
    want, step = exact(weight)
    out = torch.empty(300, 1088, dtype=torch.bfloat16)
    dequantize_rows(weight, 0, 300, out)
    assert bool(((out.double() - want).abs() <= step).all())
    assert buffers.held_bytes() <= 2**18


def test_small_weights_wait_for_no_kernel(monkeypatch):
    monkeypatch.setattr(fused_dequantize, "SMALLEST", 2**16)
    assert not fused_dequantize.ready(quantized("int8", 255, 256), torch.bfloat16)
    assert fused_dequantize.ready(quantized("int8", 256, 256), torch.bfloat16)


def test_loading_a_kernel_takes_no_random_numbers(monkeypatch):
    monkeypatch.setattr(cache, "_loaded", {})
    torch.manual_seed(3)
    want = torch.rand(5)
    torch.manual_seed(3)
    assert calls.ready(calls.STORED_INT8)
    assert torch.equal(torch.rand(5), want)


def test_without_a_compiler(monkeypatch):
    """Operators, and nothing is asked of a kernel."""
    monkeypatch.setattr(settings, "compiled", False)
    monkeypatch.setattr(calls, "ready", lambda family: pytest.fail("a kernel was asked for"))
    weight = quantized("int8", 40, 192)
    want, step = exact(weight)
    out = dequantize_rows(weight, 0, 40, torch.empty(40, 192, dtype=torch.bfloat16))
    assert bool(((out.double() - want).abs() <= 2 * step).all())
