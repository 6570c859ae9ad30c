"""x on its way into int8 GEMMs: how exact 16 and 32 bits are whatever stands in x, and what becomes of what is no number."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor, prepare
from requanto.dtypes.qtypes import qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint8
from requanto.linear import linear
from requanto.linear.activations import (
    coarse_rows,
    nan_rows,
    quantize_activations,
    quantize_unsigned,
    row_absmax,
    scale_of_row,
    single_scale,
    split_16bit,
    split_32bit,
    split_row_32bit,
)
from requanto.linear.cpu import int8_gemm, onednn_int8

blocked = pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
HALVES = (torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def packed(rows, length, dtype=torch.bfloat16, zero=(), seed=None):
    """A packed int8 weight, and its values; the columns of ``zero`` hold no weight."""
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    values = torch.randn(rows, length, generator=generator)
    values[:, list(zero)] = 0
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(QTensor.quantize(values.to(dtype), "int8"), requires_grad=False)
    values = layer.weight.dequantize(torch.float32).double()
    layer.weight.activation = qint8  # packed for x of any dtype then; both GEMMs are called by name here
    prepare(layer, smallest=0)
    return layer.weight, values


def error(got, want):
    return ((got.double() - want).norm(dim=1) / want.norm(dim=1)).max().item()


# ---------------------------------------------------------------------- float activations


@blocked
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 7, 300])
@pytest.mark.parametrize("large", [10, 2000, 60000])
def test_one_large_element_whose_weight_is_zero(dtype, rows, large):
    weight, values = packed(64, 4096, dtype, zero=[17])
    x = torch.randn(rows, 4096).to(dtype)
    x[:, 17] = large
    got = int8_gemm.run_split(x, weight, None)
    assert error(got, x.double() @ values.t()) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


@blocked
@given(st.data())
def test_against_float64(data):
    """Anything from equal elements to every one of another size: never worse than bfloat16's own rounding."""
    dtype = data.draw(st.sampled_from(HALVES))
    rows, length = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0, 1, 3, 10] if dtype == torch.float16 else [0, 1, 3, 10, 30]))
    sizes = torch.exp(spread * torch.rand(rows, length, generator=generator) - spread)
    x = (torch.randn(rows, length, generator=generator) * sizes).to(dtype)
    x[torch.rand(x.shape, generator=generator) < data.draw(st.sampled_from([0, 0.5, 0.99]))] = 0
    outliers = torch.rand(length, generator=generator) < data.draw(st.sampled_from([0, 0.01, 0.3]))
    x[:, outliers] *= data.draw(st.sampled_from([1, 100, 1000]))
    x = x.clamp(-6e4, 6e4)
    weight, values = packed(
        32, length, dtype, zero=outliers.nonzero().flatten().tolist(), seed=data.draw(st.integers(0, 99))
    )
    got = int8_gemm.run_split(x, weight, None).double()
    want = x.double() @ values.t()
    # What the docstring says: of the row cut off at 1/254 of its largest element, times the weights' norms.
    cut = torch.minimum(x.double().abs(), x.double().abs().amax(1, keepdim=True) / 254)
    rounding = 2**-8 * want.abs() if dtype == torch.bfloat16 else 2**-10 * want.abs() + 1e-7
    scale = cut.norm(dim=1)[:, None] * values.norm(dim=1)
    assert ((got - want).abs() <= rounding + 0.006 * scale + 1e-6 * (x.double().abs() @ values.abs().t())).all()


@blocked
def test_a_row_does_not_depend_on_its_neighbours(caplog):
    weight, _ = packed(64, 512)
    x = torch.randn(6, 512).bfloat16()
    want = int8_gemm.run_split(x, weight, None)
    x[[1, 4], 3] = 1e4
    with caplog.at_level(logging.DEBUG, logger="requanto"):
        got = int8_gemm.run_split(x, weight, None)
    assert torch.equal(got[[0, 2, 3, 5]], want[[0, 2, 3, 5]])
    assert [record.getMessage() for record in caplog.records].count(caplog.records[0].getMessage()) == 1
    assert "2 of 6 rows" in caplog.text


@pytest.mark.parametrize("length", [1, 7, 8, 64, 100, 1024, 2040, 4096, 4104, 11008])
def test_which_rows_are_coarse(length):
    x = torch.randn(9, length) * torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1.0])[:, None]
    x[1, 0], x[2, length // 2], x[3, -1] = 1e6, -3e4, 90
    x[5, 1:] = 0
    x[6, ::2] = 0
    x[7, ::2], x[8] = 1e5, x[8] * torch.exp(8 * torch.rand(length))
    halves, _ = split_16bit(x)
    codes = (halves[:9].int() - 128) * 256 + halves[9:].int() - 128
    kept = ((codes >= 128) | (codes < -128)).sum(1)
    want = (2 * kept < (x != 0).sum(1)).nonzero().flatten().tolist()
    found = coarse_rows(x, halves)
    assert (found.tolist() if found is not None else []) == want
    assert (1 in want) == (length > 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_activations_in_32_bits(dtype):
    x = torch.randn(5, 300) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1.0])[:, None]
    x[4, 7] = 6e4
    x = x.to(dtype)
    bytes_, scale = split_32bit(x, 24)
    assert bytes_.shape == (24, 300)

    def codes(part):
        return sum((digit.double() - 128) * 256**place for place, digit in enumerate(part.view(4, -1, 300)))

    assert (
        (codes(bytes_[:20]) * scale.double() - x.double()).abs() <= 1.01 * scale.double() + 2e-7 * x.double().abs()
    ).all()
    for row in range(5):
        one, step = split_row_32bit(x[row : row + 1], 4)
        assert torch.equal(one, split_32bit(x[row : row + 1], 4)[0])
        assert step == pytest.approx(split_32bit(x[row : row + 1])[1].item())


@blocked
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_float_rows_that_are_not_finite(rows, value):
    weight, _ = packed(64, 128)
    x = torch.randn(rows, 128).bfloat16()
    x[rows // 2, 5] = value
    got = int8_gemm.run_split(x, weight, torch.ones(64).bfloat16())
    assert got[rows // 2].isnan().all()
    others = [row for row in range(rows) if row != rows // 2]
    assert got[others].isfinite().all()


# ---------------------------------------------------------------------- quantized activations


@blocked
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 400])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_int8_rows_that_are_not_finite(dtype, static, rows, value):
    weight, _ = packed(64, 128, dtype)
    bias = torch.randn(64).to(dtype)
    scale = torch.tensor(0.03) if static else None
    x = torch.randn(rows, 128).to(dtype)
    clean = int8_gemm.run_int8(x, weight, bias, qint8, scale)
    x[rows // 2, 5] = value
    got = int8_gemm.run_int8(x, weight, bias, qint8, scale)
    others = [row for row in range(rows) if row != rows // 2]
    assert torch.equal(got[others], clean[others])
    if static and not math.isnan(value):  # saturated
        x[rows // 2, 5] = math.copysign(1e4, value)
        assert torch.equal(got, int8_gemm.run_int8(x, weight, bias, qint8, scale))
    else:
        assert got[rows // 2].isnan().all()


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FC00080, 0xFFC12345 - 2**32, 0x7FFFFFFF])
def test_every_nan_is_found(payload):
    x = torch.randn(4, 33)
    assert nan_rows(x) is None
    x.view(torch.int32)[2, 30] = payload
    assert nan_rows(x).flatten().tolist() == [False, False, True, False]
    x = torch.randn(4, 33)
    x[1, 0], x[1, 1] = INF, -INF
    found = nan_rows(x)
    assert found is None or not found.any()


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


@blocked
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, NAN, INF])
def test_static_scales_that_are_none(dtype, rows, scale):
    weight, _ = packed(64, 128, dtype)
    bias = torch.randn(64).to(dtype)
    x = torch.randn(rows, 128).to(dtype)
    x[0, :3] = torch.tensor([0.0, 1e3, -1e3])
    got = int8_gemm.run_int8(x, weight, bias, qint8, torch.tensor(scale))
    codes, step = quantize_activations(x, qint8, torch.tensor(scale))
    if math.isfinite(scale):
        assert torch.equal(got, bias.expand_as(got))
        assert not (codes * step).any()
    else:
        assert got.isnan().all()
        assert (codes * step).isnan().all()
    x[0, 7] = NAN
    assert int8_gemm.run_int8(x, weight, bias, qint8, torch.tensor(scale))[0].isnan().all()


# ---------------------------------------------------------------------- shapes, strides, dtypes


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
    assert quantize_unsigned(x, qint8, None)[0].shape[1] == shape[1]
    assert math.isfinite(scale_of_row(x, 127))
    assert nan_rows(x) is None


@blocked
@pytest.mark.parametrize("run", [int8_gemm.run_split, int8_gemm.run_int8])
@pytest.mark.parametrize("bias", [False, True])
def test_no_rows(run, bias):
    weight, _ = packed(64, 128)
    added = torch.ones(64).bfloat16() if bias else None
    assert run(torch.zeros(0, 128).bfloat16(), weight, added, qint8).shape == (0, 64)


def test_rows_are_asked_for():
    with pytest.raises(ValueError, match=r"\[rows, K\]"):
        quantize_activations(torch.tensor(1.0), qint8)
    with pytest.raises(ValueError, match=r"\[rows, K\]"):
        quantize_activations(torch.ones(3), qint8)


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
    same, own = quantize_unsigned(x, qint8, None)
    assert torch.equal(same[:6].float() - 128, codes)
    assert torch.equal(own, step)
    halves, steps = split_16bit(x)
    values = (halves[:6].double() - 128) * 256 + halves[6:12].double() - 128
    assert ((values * steps.double() - x.double()).abs() <= 0.51 * steps.double()).all()
    assert single_scale(x[:1], qint8, None) == pytest.approx(step[0].item(), rel=1e-6)
    assert torch.equal(x, before)


@blocked
@pytest.mark.parametrize("how", ["transposed", "misaligned", "expanded"])
@pytest.mark.parametrize("run", [int8_gemm.run_split, int8_gemm.run_int8])
def test_gemms_of_strides(run, how):
    weight, _ = packed(64, 96)
    x = torch.randn(6, 96).bfloat16()
    x = {
        "transposed": lambda: x.t().contiguous().t(),
        "misaligned": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(6, 96),
        "expanded": lambda: x[:1].expand(6, 96),
    }[how]()
    assert torch.equal(run(x, weight, None, qint8), run(x.contiguous().clone(), weight, None, qint8))
