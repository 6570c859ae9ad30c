"""Signed scales, scales in blocks and columns in another order on the GPU's part of the table, in Triton's interpreter."""

import pytest
import torch
from gpu_stand_in import take_for_a_gpu
from made_weights import ACT_ORDER, EVERY, MIXED, Q3_K, Q4_0, Q4_K, Q6_K, made, meaning
from reference import TOLERANCE, error

from requanto.dtypes.qtypes import qint8
from requanto.linear import grouped_linear, linear, registry
from requanto.linear.gpu import layout, paths

HALF, FULL = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The table with the GPU's entries first, which take the CPU for their device."""
    take_for_a_gpu(monkeypatch)
    torch.manual_seed(0)


def chosen(weight, x, activation=None):
    problem = registry.problem_of(weight, x.dtype, x.shape[0], activation)
    return registry.choose(problem).implementation.name


@pytest.mark.parametrize(("dtype", "transposed"), [(FULL, False), (HALF, True)])
@pytest.mark.parametrize("form", EVERY)
def test_products(form, transposed, dtype):
    shape = (256, 24) if transposed else (24, 256)
    weight = made(form, *shape, dtype=dtype, words="transposed" if transposed else "")
    wanted = meaning(weight)
    x, z = torch.randn(3, shape[1]).to(dtype), torch.randn(3, shape[0]).to(dtype)
    for packed in (False, True):
        if packed:
            if not layout.fits(weight):
                assert weight.qtype.bits not in (2, 3, 4)
                continue
            weight.pack(layout.EXEC)
        assert chosen(weight, x) == "triton-wq"
        leaf = x.clone().requires_grad_()
        out = linear(leaf, weight)
        assert error(out, x.double() @ wanted.T) <= TOLERANCE[dtype]
        out.sum().backward()
        assert error(leaf.grad, wanted.sum(0).expand(3, -1)) <= TOLERANCE[dtype]
        assert error(z @ weight, z.double() @ wanted) <= TOLERANCE[dtype]
        if "order" not in form:
            assert error(paths.run_dequantized(x, weight, None), x.double() @ wanted.T) <= TOLERANCE[dtype]
        assert weight.is_packed == packed


@pytest.mark.parametrize("form", [Q4_K, Q4_0, ACT_ORDER, MIXED[2], MIXED[5]])
def test_int8_activations(form):
    weight = made(form, 24, 256)
    x = torch.randn(4, 256)
    assert chosen(weight, x, qint8) == ("triton-scaled-mm" if form == MIXED[2] else "triton-w4a8")
    step = x.double().abs().amax(1, keepdim=True) / 127
    wanted = (x.double() / step).round() * step @ meaning(weight).T
    assert error(linear(x, weight, activation=qint8), wanted) <= 2e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [Q3_K, Q4_K, Q6_K, ACT_ORDER, MIXED[2], MIXED[3]])
def test_experts(form, transposed):
    weight = made(
        form, *((3, 256, 24) if transposed else (3, 24, 256)), words="axis=1 transposed" if transposed else "axis=1"
    )
    wanted, offsets = meaning(weight), torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(6, weight.shape[2])
    out = grouped_linear(x, weight, offsets)
    assert error(out[:5], torch.stack([x[i].double() @ wanted[e].T for i, e in enumerate((0, 0, 2, 2, 2))])) <= 1e-5
    assert not out[5:].any()
