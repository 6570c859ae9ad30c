"""Quantized weights on MPS, as far as a machine without it can tell: which operators and dtypes would reach the device.

`mps_tensor.MpsTensor` refuses what torch on MPS refuses; the numbers are those of the CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from mps_tensor import MpsTensor, install, on_mps

import requanto
from requanto import QTensor
from requanto.dtypes.qtypes import resolve_qtype
from requanto.linear.registry import choose, problem_of


@pytest.fixture(autouse=True)
def mps(monkeypatch):
    install(monkeypatch)


TYPES = ("float8", "float8_e5m2", "float8_e4m3fnuz", "int8", "int4", "int2", "int3", "nf4", "mxfp4", "mxfp8", "nvfp4")


def moved(weight: QTensor) -> QTensor:
    """The weight with its parts on the stand-in device."""
    return weight.with_inner({name: on_mps(part) for name, part in weight.inner_tensors().items()})


@pytest.mark.parametrize("kind", TYPES)
def test_linear(kind):
    weight = QTensor.quantize(torch.randn(32, 128), kind)
    x = torch.randn(3, 128)
    there = moved(weight)
    assert there.device.type == "mps"
    assert choose(problem_of(there, torch.float32, 3)).implementation.name == "reference"
    y = requanto.linear.linear(on_mps(x), there, on_mps(torch.ones(32)))
    assert isinstance(y, MpsTensor)
    torch.testing.assert_close(y.inner, F.linear(x, weight.dequantize(), torch.ones(32)))


def test_refused():
    # What the stand-in is for: without conversions of our own these raise, as on a Mac.
    codes = on_mps(torch.randn(4).to(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match="float8"):
        codes.to(torch.float32)
    with pytest.raises(TypeError, match="float64"):
        on_mps(torch.randn(4)).to(torch.float64)


@pytest.mark.parametrize("kind", TYPES)
def test_quantize(kind):
    values = torch.randn(16, 128)
    there, here = QTensor.quantize(on_mps(values), kind), QTensor.quantize(values, kind)
    for (name, part), known in zip(there.inner_tensors().items(), here.inner_tensors().values()):
        assert isinstance(part, MpsTensor), name
        assert part.inner.contiguous().view(torch.uint8).equal(known.contiguous().view(torch.uint8)), name
    torch.testing.assert_close(there.dequantize().inner, here.dequantize())


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_activations(kind):
    weight, x = QTensor.quantize(torch.randn(32, 128), "float8"), torch.randn(3, 128)
    y = requanto.linear.linear(on_mps(x), moved(weight), None, activation=resolve_qtype(kind))
    expected = requanto.linear.linear(x, weight, None, activation=resolve_qtype(kind))
    torch.testing.assert_close(y.inner, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["float8", "int4", "nf4"])
def test_embedding(kind):
    weight, ids = QTensor.quantize(torch.randn(32, 128), kind), torch.tensor([[3, 1, 3]])
    rows = F.embedding(on_mps(ids), moved(weight))
    torch.testing.assert_close(rows.inner, weight.dequantize()[ids])
