"""Quantized weights from outside, used in torch.inference_mode(): views, products, copies."""

import pytest
import torch
import torch.nn.functional as F

from requanto import QTensor

VIEWS = {
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "slice": lambda w: w[8:32],
    "narrow": lambda w: w.narrow(0, 8, 24),
    "view": lambda w: w.view(48, 64),
    "detach": lambda w: w.detach(),
    "chunk": lambda w: w.chunk(3)[1],
    "split": lambda w: w.split(16)[2],
}
PRODUCTS = {
    "linear": ((3, 64), lambda x, w: F.linear(x, w)),
    "linear of a view": ((3, 48), lambda x, w: F.linear(x, w.t())),
    "matmul": ((3, 48), lambda x, w: x @ w),
    "addmm": ((3, 48), lambda x, w: torch.addmm(torch.ones(64), x, w)),
    "a copy": ((3, 64), lambda x, w: F.linear(x, w.clone())),
    "another dtype": ((3, 64), lambda x, w: F.linear(x.bfloat16(), w.to(torch.bfloat16)).float()),
}


@pytest.fixture(params=["int8", "int4", "float8", "nf4"])
def weight(request):
    return torch.nn.Parameter(QTensor.quantize(torch.randn(48, 64), request.param), requires_grad=False)


@pytest.mark.parametrize("name", VIEWS)
def test_views(name, weight):
    view = VIEWS[name]
    want = view(weight.dequantize())
    with torch.inference_mode():
        got = view(weight)
        twice = got.detach()
    for tensor in (got, twice, view(weight)):
        assert isinstance(tensor, QTensor)
        assert not tensor.is_inference()
        assert torch.equal(tensor.dequantize(), want)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, weight, exact):
    shape, product = PRODUCTS[name]
    x = torch.randn(shape)
    with torch.inference_mode():
        got, want = product(x, weight), product(x, weight.dequantize())
    assert type(got) is torch.Tensor
    torch.testing.assert_close(
        got, want, rtol=2e-2 if name == "another dtype" else 1e-4, atol=1e-1 if "dtype" in name else 1e-4
    )


def test_experts(weight):
    experts = torch.nn.Parameter(QTensor.quantize(torch.randn(4, 48, 64), weight.qtype), requires_grad=False)
    wide, x = experts.dequantize(), torch.randn(3, 64)
    with torch.inference_mode():
        for got, want in zip(experts.unbind(), wide):
            torch.testing.assert_close(F.linear(x, got), F.linear(x, want), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(F.linear(x, experts[2]), F.linear(x, wide[2]), rtol=1e-4, atol=1e-4)
        picked = experts[torch.tensor([3, 1])]
        assert torch.equal(picked.dequantize(), wide[[3, 1]])


def test_weights_made_inside(weight):
    with torch.inference_mode():
        inner = QTensor.quantize(torch.randn(48, 64), weight.qtype)
        assert torch.equal(inner.t().dequantize(), inner.dequantize().t())
        assert torch.equal(inner[8:16].dequantize(), inner.dequantize()[8:16])
