"""Scales in blocks on a CPU: packed weights keep nearly the size of their file, and their kernels get the right numbers."""

import pytest
import torch
import torch.nn.functional as F
from made_weights import K_TYPES, made, meaning
from torch import nn

from requanto.linear.cpu import library
from requanto.runtime.settings import settings

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Descriptions and shapes: whole blocks of the packed layout, and padded rows and columns; affine, symmetric and signed.
PACKED = [
    *((form, (304, 512)) for form in K_TYPES),
    ("qint4 {} group=32 affine scales=5 block=32", (300, 992)),
    ("qint4 {} group=32 scales=8 signed block=64", (300, 960)),
    ("qint4 {} group=64 affine scales=8 signed block=128", (190, 1152)),
    ("qint4 {} group=32 scales=6 block=96", (256, 960)),
]


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def layer_of(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.fixture
def float_arithmetic(monkeypatch):
    """x is not rounded, so that limits are float32's; test_cpu_sweep.py has the others."""
    monkeypatch.setattr(settings, "cpu_arithmetic", "float")


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("form", "shape"), PACKED)
def test_packed_products(form, shape, dtype, float_arithmetic):
    weight = made(form, *shape, dtype=dtype)
    wanted, layer, stored = meaning(weight), layer_of(weight), weight.nbytes
    for rows in (1, 5, 100):
        x = torch.randn(rows, shape[1]).to(dtype)
        for _ in range(3):
            assert error(layer(x), x.double() @ wanted.T) < BOUNDS[dtype]
        grad = x.clone().requires_grad_()
        layer(grad).sum().backward()
        assert error(grad.grad, wanted.sum(0).expand(rows, -1)) < BOUNDS[dtype]
    assert layer.weight.is_packed == (library.find() is not None)
    padded = -(-shape[0] // 16) * 16 * -(-shape[1] // 32) * 32 / (shape[0] * shape[1])
    assert layer.weight.nbytes <= padded * stored
    layer.weight.unpack()
    assert layer.weight.nbytes == stored
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("form", K_TYPES)
def test_codes_that_change_in_place_reach_the_kernels(form, float_arithmetic):
    layer, other, x = layer_of(made(form, 320, 512)), made(form, 320, 512, seed=3), torch.randn(3, 512)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.weight.copy_(other)
        assert error(F.linear(x, layer.weight), x.double() @ meaning(other).T) < 2e-6
        layer.weight.row_scale.mul_(2)
        if layer.weight.row_shift is not None:
            layer.weight.row_shift.mul_(2)
        assert error(F.linear(x, layer.weight), x.double() @ meaning(other).T * 2) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", K_TYPES)
@pytest.mark.parametrize("training", [False, True])
def test_memory_after_use_is_that_of_the_file(form, dtype, training):
    """The bytes of the file, whatever ran."""
    weight = made(form, 512, 1024, dtype=dtype)
    stored, layer = weight.nbytes, layer_of(weight)
    for rows in (1, 64, 1):
        layer(torch.randn(rows, 1024).to(dtype).requires_grad_(training))
    assert layer.weight.nbytes == stored
