"""Cached plans in Triton's interpreter: the same numbers as the call that was recorded, for other inputs."""

import pytest
import torch
from reference import TOLERANCE, error, weight

from requanto_kernels import expert_bounds, quant_rows, scaled_mm, wq_gemm, wq_gemm_dx
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [1, 3, 8, 200])
def test_bounds_of_experts(dtype, experts):
    for ends in (torch.sort(torch.randint(0, 50, (experts,)))[0], torch.randint(-5, 90, (experts,))):
        ends = ends.to(dtype)
        found = expert_bounds(ends, 40)
        assert found.dtype == dtype
        assert torch.equal(found[1:], ends.clamp(0, 40).cummax(0).values)
        assert found[0] == 0
    with pytest.raises(ValueError, match="ends"):
        expert_bounds(ends.float(), 40)
    with pytest.raises(ValueError, match="ends"):
        expert_bounds(ends[:0], 40)
