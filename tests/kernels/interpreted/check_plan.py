"""Cached plans in Triton's interpreter: the same numbers as the call that was recorded, for other inputs."""

import pytest
import torch
from reference import TOLERANCE, error, weight

from requanto_kernels import quant_rows, scaled_mm, wq_gemm, wq_gemm_dx
from requanto_kernels._plan import record


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_other_values(dtype, bias):
    w = weight(40, 256, 4, 64, True)
    x, b = torch.randn(2, 3, 256).to(dtype), torch.randn(40) if bias else None
    with record(x=x, bias=b, constants=[w.qdata, w.scale, w.shift]) as recording:
        out = wq_gemm(x, w.qdata, w.scale, w.shift, b, bits=4)
    plan = recording.plan(out)
    for _ in range(2):
        x, b = torch.randn_like(x), None if b is None else torch.randn_like(b)
        got, want = plan(x, b), x.double() @ w.meaning.T + (0 if b is None else b.double())
        assert got.shape == want.shape
        assert error(got, want) <= TOLERANCE[dtype]
    w.qdata.random_(0, 256)  # the plan reads the weight's memory
    again = wq_gemm(x, w.qdata, w.scale, w.shift, b, bits=4)
    assert torch.equal(plan(x, b), again)


def test_several_launches():
    w = torch.randint(-128, 128, (24, 96), dtype=torch.int8)
    x, steps = torch.randn(5, 96), torch.rand(24) / 100

    def call(x):
        return scaled_mm(*_swapped(quant_rows(x), w), steps, out_dtype=torch.float32)

    with record(x=x, constants=[w, steps]) as recording:
        out = call(x)
    plan = recording.plan(out)
    assert plan.launches == 2
    x = torch.randn(5, 96)
    assert torch.equal(plan(x), call(x))


def _swapped(pair, w):
    codes, scales = pair
    return codes, w, scales


def test_transposed_and_strided():
    w = weight(40, 256, 4, 64, True)
    x = torch.randn(5, 80)[:, ::2]
    with record(x=x, constants=[w.qdata, w.scale, w.shift]) as recording:
        out = wq_gemm_dx(x, w.qdata, w.scale, w.shift, bits=4)
    other = torch.randn(5, 80)[:, ::2]
    got = recording.plan(out)(other)
    assert error(got, other.double() @ w.meaning) <= TOLERANCE[torch.float32]
