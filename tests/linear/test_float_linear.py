"""Linear layers that stay float: one to four rows of x by the C library, against float64; and when torch's operator runs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import requanto
from requanto.linear.cpu import float_linear, library
from requanto.linear.cpu.float_linear import few_rows
from requanto.nn.direct_linear import use_plain_linear
from requanto.nn.float_linear import FloatLinear, use_float_linear

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(float_linear, "SMALLEST", 0)
    monkeypatch.setattr(requanto.settings, "compiled", None)


@pytest.fixture
def needs_library(any_size, cpu_level):
    if library.find() is None:
        pytest.skip("the library of CPU kernels cannot be used here")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_against_float64(dtype, threads, needs_library):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, k in ((1, 1), (7, 5), (33, 31), (100, 576), (257, 1000), (40, 65), (4000, 96)):
            for rows in range(1, 5):
                weight = torch.randn(n, k + 3, dtype=dtype)[:, 2 : 2 + k]  # rows at any address
                x = torch.randn(rows, k + 1, dtype=dtype)[:, 1:]
                bias = torch.randn(n, dtype=dtype)
                for b in (None, bias):
                    out = few_rows(x, weight, b)
                    exact = x.double() @ weight.double().T + (0 if b is None else b.double())
                    size = x.double().abs() @ weight.double().abs().T + (0 if b is None else b.double().abs())
                    assert out.dtype is dtype
                    assert out.shape == exact.shape
                    assert ((out.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-6).all(), (
                        n,
                        k,
                        rows,
                    )
    finally:
        torch.set_num_threads(before)


def test_values_that_are_not_finite_and_shapes_of_x(needs_library):
    weight = torch.randn(64, 100, dtype=torch.bfloat16)
    x = torch.randn(2, 1, 100, dtype=torch.bfloat16)
    x[0, 0, 3], x[1, 0, 99] = float("inf"), float("nan")
    out = few_rows(x, weight, None)
    assert out.shape == (2, 1, 64)
    assert torch.equal(out.isnan(), nn.functional.linear(x, weight).isnan())
    assert torch.equal(out.isinf(), nn.functional.linear(x, weight).isinf())
    assert few_rows(x[0, 0].contiguous(), weight, None).shape == (64,)
    column = torch.randn(100, 1, dtype=torch.bfloat16).t()  # not contiguous where it matters
    assert torch.allclose(few_rows(column, weight, None).float(), column.float() @ weight.float().T, atol=0.3)


def test_when_torch_runs(needs_library):
    weight, x = torch.randn(8, 16), torch.randn(1, 16)
    assert few_rows(x, weight, None) is not None
    others = [
        (torch.randn(5, 16), weight, None),
        (x[:0], weight, None),
        (x.to(torch.bfloat16), weight, None),
        (x.double(), weight.double(), None),
        (x, weight.t().contiguous().t(), None),
        (x, weight, torch.randn(8, dtype=torch.bfloat16)),
        (torch.randn(1, 15), weight, None),
        (x.to("meta"), weight, None),
    ]
    for one in others:
        assert few_rows(*one) is None
    grown = nn.Parameter(weight)
    assert few_rows(x, grown, None) is None
    with torch.no_grad():
        assert few_rows(x, grown, None) is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert few_rows(x, grown, None) is None
        with torch.device("cpu"):  # a mode that is to see each function
            assert few_rows(x, grown, None) is None
        layer = FloatLinear(16, 8)
        assert torch.allclose(torch.func.vmap(layer)(torch.ones(3, 16)), layer(torch.ones(3, 16)), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_weight_takes_torch_s_operator():
    weight, x = torch.randn(64, 32) * (torch.rand(64, 32) > 0.9), torch.randn(2, 32)
    layer = FloatLinear(32, 64, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(weight.to_sparse_csr(), False)
    assert torch.allclose(layer(x), x @ weight.t(), atol=1e-5)


def test_the_class_changes_and_nothing_else(monkeypatch):
    monkeypatch.setattr("requanto.nn.float_linear.SMALLEST", 0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 16, bias=False))
    requanto.quantize(model, weights="int4", include="0")
    requanto.freeze(model)
    x = torch.randn(2, 32)
    before, names = model(x), list(model.state_dict())
    assert use_float_linear(model) == ["1"]
    assert use_float_linear(model) == []
    assert list(model.state_dict()) == names
    assert isinstance(model[1], nn.Linear)
    assert repr(model[1]) == "Linear(in_features=64, out_features=16, bias=False)"
    plain = copy.deepcopy(model[1])
    use_plain_linear(plain)
    assert type(plain) is nn.Linear
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.allclose(same(x), before, atol=0.02)  # x is rounded
        assert type(same[1]) is FloatLinear
    model(x).sum().backward()  # the layer can be trained
    assert model[1].weight.grad is not None
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(x), before, atol=0.02)
    assert torch.jit.trace(model[1], torch.randn(1, 64))(torch.zeros(1, 64)).abs().max() == 0
    requanto.quantize(model, weights="int8", include="1")  # it can be quantized like any linear layer
    requanto.freeze(model)
    assert isinstance(model[1].weight, requanto.QTensor)
    assert torch.allclose(model(x), before, atol=0.1)
