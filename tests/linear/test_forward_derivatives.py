"""Forward-mode derivatives (`torch.autograd.forward_ad`): a cached plan or scratch buffer must not drop the tangent."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from requanto import QTensor


def tangent(function, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
def test_products(kind, dtype):
    weight = QTensor.quantize(torch.randn(256, 256).to(dtype), kind)
    square = weight.dequantize()
    x, direction = torch.randn(2, 4, 256).to(dtype)
    functions = {
        "linear": (lambda a: F.linear(a, weight), lambda a: F.linear(a, square)),
        "x @ W": (lambda a: a @ weight, lambda a: a @ square),
        "W @ x": (lambda a: weight @ a.mT, lambda a: square @ a.mT),
    }
    for name, (run, plain) in functions.items():
        with torch.no_grad():
            for _ in range(3):  # packed, and with a plan
                run(x)
        got, want = tangent(run, x, direction), tangent(plain, x, direction)
        assert got is not None, name
        assert (got - want).norm() <= 0.02 * want.norm(), name
        assert tangent(run, x, torch.zeros_like(x)).count_nonzero() == 0, name


def test_convolution():
    weight = QTensor.quantize(torch.randn(8, 4, 3, 3), "int8")
    x, direction = torch.randn(2, 1, 4, 9, 9)
    with torch.no_grad():
        F.conv2d(x, weight)
    got = tangent(lambda a: F.conv2d(a, weight), x, direction)
    want = F.conv2d(direction, weight.dequantize())
    assert (got - want).norm() <= 1e-4 * want.norm()
