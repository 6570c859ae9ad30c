"""Conversions from and to float8 where torch has none: the same bits as torch's on a CPU."""

import pytest
import torch

from requanto.dtypes import float8

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)


@pytest.fixture(autouse=True)
def without_conversions(monkeypatch):
    monkeypatch.setattr(float8, "WITHOUT", frozenset({"cpu"}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code(dtype, to):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(16, 16).view(dtype)
    for each in (codes, codes.t()):
        found, expected = float8.from_float8(each, to), each.to(to)
        assert found.dtype == to
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(nan=0, posinf=1e4), expected.nan_to_num(nan=0, posinf=1e4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_every_rounding(dtype, source):
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    above, below = (torch.nextafter(middles, torch.tensor(end)) for end in (1e9, -1e9))
    random = torch.randn(50000) * 10 ** torch.empty(50000).uniform_(-8, 3)
    odd = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), 1e-40, -1e-40])
    numbers = torch.cat([values, middles, above, below, random, odd])
    numbers = numbers.clamp(values.min(), values.max()).to(source)
    numbers = numbers[(numbers.float() <= values.max()) | numbers.isnan()]
    found, expected = float8.to_float8(numbers, dtype), numbers.to(dtype)
    is_nan = numbers.isnan()  # whose sign differs between torch's own conversions
    assert torch.equal(found.float().isnan(), is_nan)
    assert torch.equal(found.view(torch.uint8)[~is_nan], expected.view(torch.uint8)[~is_nan])
    assert torch.equal(float8.rounded_to_float8(numbers, dtype)[~is_nan], expected.to(source)[~is_nan])


def test_beyond_the_largest():
    far = torch.tensor([1e6, -1e6, float("inf")])
    assert float8.to_float8(far, torch.float8_e4m3fn).float().tolist() == [448.0, -448.0, 448.0]
    assert float8.to_float8(far, torch.float8_e5m2).float().tolist() == [float("inf"), -float("inf"), float("inf")]
    assert float8.to_float8(far, torch.float8_e4m3fnuz).float().isnan().all()


def test_other_dtypes_pass():
    assert float8.from_float8(torch.tensor([3], dtype=torch.int8), torch.float32).tolist() == [3.0]
    assert float8.to_float8(torch.tensor([3.7]), torch.int8).tolist() == [3]
