"""The CPU library multiplies x by a column scale: the same bits as torch's multiplication before the GEMM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor
from requanto.linear.cpu import library
from requanto.linear.cpu.gemm import MOST_SCALED_ROWS, Call

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def needs_library(monkeypatch, cpu_level):
    monkeypatch.setattr(requanto.settings, "compiled", None)
    if library.find() is None:
        pytest.skip("the library of CPU kernels cannot be used here")


def pair(kind: str, n: int, k: int, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
    """A packed weight with a column scale, the same without it, and the column scale."""
    made = QTensor.quantize(torch.randn(n, k, dtype=dtype), kind, column_scale=torch.rand(k) + 0.5)
    plain = made.with_inner({name: part.clone() for name, part in made.inner_tensors().items() if name != "column"})
    weights = [nn.Parameter(one, requires_grad=False) for one in (made, plain)]
    requanto.prepare(nn.ParameterList(weights), smallest=0)
    assert all(one.is_packed for one in weights)
    return *weights, made.column


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_bits(dtype):
    for kind, n, k in (("int4", 48, 576), ("int8", 31, 500), ("int3", 125, 96)):
        for stored in {dtype, torch.float32}:
            weight, plain, column = pair(kind, n, k, stored)
            for rows in (1, 2, 5, MOST_SCALED_ROWS, MOST_SCALED_ROWS + 1):
                for x in (torch.randn(rows, k, dtype=dtype), torch.randn(rows, k + 3, dtype=dtype)[:, 1 : k + 1]):
                    for _ in range(2):  # without and with a cached plan
                        assert torch.equal(F.linear(x, weight), F.linear(x * column.to(dtype), plain)), (kind, rows)


def test_a_change_in_place_takes_effect():
    weight, plain, _ = pair("int4", 32, 64, torch.bfloat16)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    for _ in range(2):
        F.linear(x, weight)
    (plan,) = [one.gemm for one in weight._storage.plans.values()]
    assert isinstance(plan, Call)  # nothing else runs before the library
    weight.column.mul_(-2)
    assert torch.equal(F.linear(x, weight), F.linear(x * weight.column, plain))


def test_bias_and_what_the_library_does_not_take():
    weight, plain, column = pair("int4", 32, 64, torch.bfloat16)
    x, bias = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(32, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(F.linear(x, weight, bias), F.linear(x * column, plain, bias))
    call = next(one.gemm for one in weight._storage.plans.values())
    assert isinstance(call, Call)
    for column in (torch.ones(63), torch.ones(64, dtype=torch.float64), torch.ones(128)[::2], torch.ones(1, 64)):
        assert call.with_column(column) is None
