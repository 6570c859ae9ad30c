"""x quantized to 8 bits, per token or with a static scale: the codes by definition, and what becomes of other numbers."""

import math

import pytest
import torch
from cpu_reference import Fresh, quantized_layer

from requanto import QTensor, prepare
from requanto.dtypes.qtypes import qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint8
from requanto.linear import linear
from requanto.linear.activations import quantize_activations, row_absmax
from requanto.linear.cpu import library

HALVES = (torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def layer_of(kind, rows, length, dtype=torch.bfloat16):
    layer = quantized_layer(QTensor.quantize(torch.randn(rows, length).to(dtype), kind))
    layer.weight.activation = qint8
    prepare(layer, smallest=0)
    return layer


# ---------------------------------------------------------------------- codes


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_negated_view(dtype):
    x = torch.randn(5, 40).to(dtype)
    for found, expected in zip(quantize_activations(torch._neg_view(x), qint8), quantize_activations(-x, qint8)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("static", [None, 0.03, -0.5, 1e-45, 0.0])
def test_kernels_give_the_codes_of_the_definition(cpu_level, dtype, static):
    """Bit for bit, whatever the rows look like, at any address; nothing beside them is written."""
    used = library.find()
    if used is None:
        pytest.skip("the CPU kernels are not available here")
    draw = Fresh()
    for rows, length in ((1, 1), (3, 31), (5, 64), (2, 1000), (7, 129)):
        x = torch.randn(rows, length + 3, generator=draw).mul_(10.0 ** draw.one_of((-20, -3, 0, 3))).to(dtype)
        x[draw.number(rows)] = 0
        x = x[:, 2 : 2 + length]
        codes, steps = torch.full((rows + 1, length), 77, dtype=torch.int8), torch.full((rows + 1,), 77.0)
        scale = None if static is None else torch.tensor([static])
        used.check(
            used.functions.rq_rows_to_int8(
                x.data_ptr(), {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}[dtype], rows, length, x.stride(0),
                None if scale is None else scale.data_ptr(), codes.data_ptr(), steps.data_ptr(),
            )
        )  # fmt: skip
        want, own = quantize_activations(x, qint8, scale)
        assert torch.equal(steps[:rows], own.expand(rows, 1).flatten()), draw
        assert torch.equal(codes[:rows].float(), want), draw
        assert bool((codes[rows] == 77).all())
        assert steps[rows] == 77


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("how", ["plain", "transposed", "every second", "misaligned", "expanded"])
def test_strides_and_dtypes(dtype, how):
    x = (torch.randn(6, 50) * 3).to(dtype)
    x = {
        "plain": lambda: x,
        "transposed": lambda: x.t().contiguous().t(),
        "every second": lambda: x.repeat_interleave(2, 1)[:, ::2],
        "misaligned": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 50),
        "expanded": lambda: x[:1].expand(6, 50),
    }[how]()
    before = x.clone()
    want = x.double().abs().amax(1, keepdim=True)
    assert torch.equal(row_absmax(x), want.float())
    codes, step = quantize_activations(x, qint8)
    assert ((codes.double() * step.double() - x.double()).abs() <= 0.501 * step.double()).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_nothing_to_round(shape, dtype):
    x = torch.zeros(shape, dtype=dtype)
    assert row_absmax(x).shape == (shape[0], 1)
    for kind in (qint8, qfloat8_e4m3fn):
        for scale in (None, torch.tensor(0.1)):
            codes, step = quantize_activations(x, kind, scale)
            assert codes.shape == shape
            assert step.isfinite().all()


def test_rows_are_asked_for():
    with pytest.raises(ValueError, match=r"\[rows, K\]"):
        quantize_activations(torch.tensor(1.0), qint8)
    with pytest.raises(ValueError, match=r"\[rows, K\]"):
        quantize_activations(torch.ones(3), qint8)


# ---------------------------------------------------------------------- what is no number


@pytest.mark.parametrize("kind", ["int8", "int4", "int3"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("static", [False, True])
def test_rows_that_are_not_finite(cpu_level, kind, dtype, static):
    """NaN of its row alone; with a static scale infinity is the largest code, like every value out of range."""
    layer = layer_of(kind, 64, 128, dtype)
    bias = torch.randn(64).to(dtype)
    scale = torch.tensor(0.03) if static else None
    for rows in (1, 5, 200):
        x = torch.randn(rows, 128).to(dtype)
        with torch.no_grad():
            clean = linear(x, layer.weight, bias, input_scale=scale)
            for value in (NAN, INF, -INF):
                x[rows // 2, 5] = value
                got = linear(x, layer.weight, bias, input_scale=scale)
                others = [row for row in range(rows) if row != rows // 2]
                assert torch.equal(got[others], clean[others])
                if static and not math.isnan(value):
                    x[rows // 2, 5] = math.copysign(1e4, value)
                    assert torch.equal(got, linear(x, layer.weight, bias, input_scale=scale))
                else:
                    assert got[rows // 2].isnan().all()


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FC00080, 0xFFC12345 - 2**32, 0x7FFFFFFF])
@pytest.mark.parametrize("activation", [None, qint8])
@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_every_nan_is_found(cpu_level, payload, kind, activation):
    """Whatever its bits, at any place; infinities that cancel are none in a static scale's codes."""
    layer = layer_of(kind, 32, 70, torch.float32)
    layer.weight.activation = activation
    for place in (0, 31, 32, 69):
        x = torch.randn(4, 70)
        x.view(torch.int32)[2, place] = payload
        with torch.no_grad():
            assert layer(x).isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("kind", [qint8, qfloat8_e4m3fn, qfloat8_e5m2, qfloat8_e4m3fnuz])
@pytest.mark.parametrize("static", [None, 0.02])
@pytest.mark.parametrize("weight", ["int4", "float8", "nf4", "int8"])
def test_nan_through_every_product(kind, static, weight):
    quantized = QTensor.quantize(torch.randn(32, 64), weight)
    x = torch.randn(3, 64)
    x[1, 9] = NAN
    scale = None if static is None else torch.tensor(static)
    got = linear(x, quantized, activation=kind, input_scale=scale)
    assert got.isnan().all(1).tolist() == [False, True, False]
    assert not got[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, NAN, INF])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_static_scales_that_are_none(dtype, rows, scale, kind):
    layer = layer_of(kind, 64, 128, dtype)
    bias = torch.randn(64).to(dtype)
    x = torch.randn(rows, 128).to(dtype)
    x[0, :3] = torch.tensor([0.0, 1e3, -1e3])
    with torch.no_grad():
        got = linear(x, layer.weight, bias, input_scale=torch.tensor(scale))
        codes, step = quantize_activations(x, qint8, torch.tensor(scale))
        if math.isfinite(scale):
            assert torch.equal(got, bias.expand_as(got))
            assert not (codes * step).any()
        else:
            assert got.isnan().all()
            assert (codes * step).isnan().all()
        x[0, 7] = NAN
        assert linear(x, layer.weight, bias, input_scale=torch.tensor(scale))[0].isnan().all()


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("bias", [False, True])
def test_no_rows(kind, bias):
    layer = layer_of(kind, 64, 128)
    added = torch.ones(64).bfloat16() if bias else None
    with torch.no_grad():
        assert linear(torch.zeros(0, 128).bfloat16(), layer.weight, added).shape == (0, 64)


@pytest.mark.parametrize("how", ["transposed", "misaligned", "expanded"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gemms_of_strides(cpu_level, kind, how):
    layer = layer_of(kind, 64, 96)
    x = torch.randn(6, 96).bfloat16()
    x = {
        "transposed": lambda: x.t().contiguous().t(),
        "misaligned": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 96),
        "expanded": lambda: x[:1].expand(6, 96),
    }[how]()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(x), layer(x.contiguous().clone()))
