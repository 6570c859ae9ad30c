"""Products with weights of signed scales, of scales in blocks and of columns in another order, against float64."""

import pytest
import torch
import torch.nn.functional as F
from made_weights import ACT_ORDER, EVERY, MIXED, ORDERED, Q4_K, Q6_K, made, meaning
from torch import nn

from requanto.linear import explain as explaining
from requanto.linear import grouped_linear
from requanto.runtime.settings import settings

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Dtypes, and further words of the descriptions.
CASES = [
    (torch.float32, ""),
    (torch.float32, "rank=3 transposed"),
    (torch.float16, "transposed"),
    (torch.bfloat16, "rank=3"),
]


@pytest.fixture(autouse=True)
def float_arithmetic(monkeypatch):
    """x is not rounded, so that limits are float32's."""
    monkeypatch.setattr(settings, "cpu_arithmetic", "float")


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def random(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "words"), CASES)
@pytest.mark.parametrize("form", EVERY)
def test_gemms_both_ways_and_their_gradients(form, words, dtype):
    shape = (256, 9) if "transposed" in words else (9, 256)
    weight = made(form, *shape, dtype=dtype, words=words)
    wanted, bound = meaning(weight), BOUNDS[dtype]
    bias = random(shape[0], seed=1).to(dtype)
    for rows in (1, 6):
        x = random(rows, shape[1]).to(dtype).requires_grad_()
        out = F.linear(x, weight, bias)
        assert error(out, x.double() @ wanted.T + bias) < bound
        out.sum().backward()
        assert error(x.grad, wanted.sum(0).expand(rows, -1)) < bound
        z = random(2, rows, shape[0], seed=2).to(dtype).requires_grad_()
        out = z @ weight
        assert error(out, z.double() @ wanted) < bound
        out.sum().backward()
        assert error(z.grad, wanted.sum(1).expand(2, rows, -1)) < bound
        with torch.no_grad():  # by plans and packed layouts
            for _ in range(3):
                assert error(F.linear(x, weight, bias), x.double() @ wanted.T + bias) < bound
                assert error(z @ weight, z.double() @ wanted) < bound
    one = random(shape[1]).to(dtype)
    assert error(weight @ one, wanted @ one.double()) < bound


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("how", [{}, {"activation": "int8"}])
def test_layers_packed_for_the_cpu(form, dtype, how):
    weight = made(form, 320, 512, dtype=dtype)
    weight.activation = how.get("activation")
    wanted = meaning(weight)
    layer = nn.Linear(512, 320).requires_grad_(False)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(random(320).to(dtype))
    for rows in (1, 5, 80):
        x = random(rows, 512).to(dtype)
        for _ in range(3):
            found = layer(x).detach()
            bound = 0.02 if how else BOUNDS[dtype]
            assert error(found, x.double() @ wanted.T + layer.bias.detach()) < bound
    before = weight.inner_tensors()
    layer.weight.unpack()
    assert all(torch.equal(part, before[name]) for name, part in layer.weight.inner_tensors().items())
    assert error(layer.weight.dequantize(torch.float32), wanted) < 1e-6


@pytest.mark.parametrize(("dtype", "words"), CASES)
@pytest.mark.parametrize("form", EVERY)
def test_experts(form, words, dtype):
    weight = made(
        form, *((3, 256, 10) if "transposed" in words else (3, 10, 256)), dtype=dtype, words=f"axis=1 {words}"
    )
    wanted, bound = meaning(weight), BOUNDS[dtype]
    assert error(weight.dequantize(torch.float32), wanted) < 1e-6
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    owner = [0, 0, 2, 2, 2, 2]
    for seen, values in ((weight, wanted), (weight.mT, wanted.mT)):
        x = random(8, values.shape[-1]).to(dtype).requires_grad_()
        out = grouped_linear(x, seen, offsets)
        assert error(out[:6], torch.stack([x[i].double() @ values[e].T for i, e in enumerate(owner)])) < bound
        assert not out[6:].any()
        out[:6].sum().backward()
        assert error(x.grad[:6], torch.stack([values[e].sum(0) for e in owner])) < bound
        batch = random(3, 4, values.shape[-1]).to(dtype)
        assert error(torch.bmm(batch, seen.mT), batch.double() @ values.mT) < bound
    assert error(weight[1].dequantize(torch.float32), wanted[1]) < 1e-6
    assert error(weight[torch.tensor([2, 0])].dequantize(torch.float32), wanted[[2, 0]]) < 1e-6


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("words", ["", "rank=2"])
def test_embeddings(form, words):
    table = made(form, 12, 256, words=words)
    ids = torch.tensor([[3, 0, 11], [3, 3, 7]])
    assert torch.equal(F.embedding(ids, table), table.dequantize()[ids])
    assert error(F.embedding(ids, table), meaning(table)[ids]) < 1e-6
    assert torch.equal(table[ids], table.dequantize()[ids])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("form", EVERY)
def test_convolutions(form, dtype):
    for function, shape, size, how in (
        (F.conv2d, (6, 64, 2, 2), (2, 64, 7, 9), {"stride": 2, "padding": 1}),
        (F.conv1d, (6, 128, 4), (2, 128, 11), {}),
        (F.conv2d, (6, 256, 1, 1), (1, 256, 3, 3), {}),
        (F.conv_transpose2d, (6, 64, 2, 2), (1, 6, 5, 5), {"stride": 2}),
    ):
        weight = made(form, *shape, dtype=dtype)
        x = random(*size).to(dtype)
        for _ in range(2):
            assert error(function(x, weight, **how), function(x.double(), meaning(weight), **how)) < BOUNDS[dtype]


@pytest.mark.parametrize("form", [Q4_K, ACT_ORDER, MIXED[0]])
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_it_is_one_graph(form, grad):
    torch._dynamo.reset()
    layer = nn.Linear(256, 12)
    layer.weight = nn.Parameter(made(form, 12, 256, words="rank=2"), requires_grad=False)
    x = random(5, 256).requires_grad_(grad)
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    wanted = meaning(layer.weight)
    assert error(out, x.detach().double() @ wanted.T + layer.bias.detach()) < 2e-6
    if grad:
        out.sum().backward()
        assert error(x.grad, wanted.sum(0).expand(5, -1)) < 2e-6
    else:
        flipped = torch.compile(lambda z, w: (z @ w, w.dequantize()), backend="aot_eager", fullgraph=True)
        z = random(3, 12)
        out, values = flipped(z, layer.weight)
        assert error(out, z.double() @ wanted) < 2e-6
        assert error(values, wanted) < 1e-6


@pytest.mark.parametrize("form", [Q4_K, Q6_K, *(form for form in ORDERED if "rotation" not in form)])
def test_transforms_and_traces(form):
    weight, x = made(form, 12, 256), random(3, 5, 256)
    wanted = x.double() @ meaning(weight).T
    assert error(torch.func.vmap(lambda one: F.linear(one, weight))(x), wanted) < 2e-6
    grad = torch.func.grad(lambda one: F.linear(one, weight).sum())(x)
    assert error(grad, meaning(weight).sum(0).expand(3, 5, -1)) < 2e-6
    layer = nn.Linear(256, 12, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    assert error(torch.jit.trace(layer, x)(x), wanted) < 2e-6
    assert error(torch.export.export(layer, (x,)).module()(x), wanted) < 2e-6


def test_an_order_that_changes_in_place_reaches_plans():
    layer = nn.Linear(256, 320, bias=False)
    layer.weight = nn.Parameter(made(ACT_ORDER, 320, 256), requires_grad=False)
    x = random(4, 256)
    with torch.no_grad():
        for _ in range(3):
            assert error(layer(x), x.double() @ meaning(layer.weight).T) < 2e-6
        layer.weight.order.copy_(layer.weight.order.flip(0))
        assert error(layer(x), x.double() @ meaning(layer.weight).T) < 2e-6
        other = made(ACT_ORDER, 320, 256, seed=5)
        layer.weight.copy_(other)
        assert error(layer(x), x.double() @ meaning(other).T) < 2e-6


def test_what_is_said_of_them():
    layer = nn.Linear(512, 12, bias=False)
    layer.weight = nn.Parameter(made(Q4_K, 12, 512), requires_grad=False)
    assert "int4, group 32, scales in 6 bits, blocks of 256" in str(explaining.explain(layer))
    assert "scales in 6 bits, blocks of 256" in repr(layer.weight)
    layer.weight = nn.Parameter(made(ACT_ORDER, 12, 512), requires_grad=False)
    assert "columns in another order" in str(explaining.explain(layer))
    assert "columns in another order" in repr(layer.weight)
    assert layer.weight.spec()["order"] is True
    assert made(Q4_K, 12, 512).bits_per_weight == 4 + 12 / 32 + 32 / 256 == 4.5
    assert made(Q6_K, 12, 512).bits_per_weight == 6.5625
