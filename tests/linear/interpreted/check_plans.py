"""Cached plans of GPU layers in Triton's interpreter: every call gives the numbers of the weight as it is now."""

import pytest
import torch
import torch.nn.functional as F
from gpu_stand_in import take_for_a_gpu

from requanto.linear import custom_ops
from requanto.linear.gpu import layout, plans
from requanto.tensor.qtensor import QTensor

BOUNDS = {torch.float16: 3e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    take_for_a_gpu(monkeypatch)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


WEIGHTS = {
    "int4": {"kind": "int4", "group_size": 64},
    "int3": {"kind": "int3", "group_size": 32},
    "nf4": {"kind": "nf4"},
    "nvfp4": {"kind": "nvfp4"},
    "scales in 6 bits": {"kind": "int4", "group_size": 32, "scale_bits": 6},
    "whole zero points": {"kind": "int4", "group_size": 64, "zero_point": "integer"},
    "a column scale": {"kind": "int4", "column_scale": "std"},
    "int8": {"kind": "int8"},
}


@pytest.mark.parametrize(("name", "dtype"), [*zip(WEIGHTS, [*BOUNDS] * 4), ("int4", torch.float32)])
def test_numbers_of_the_present_weight(name, dtype, monkeypatch):
    made = []
    real = plans.Recorder.record
    monkeypatch.setattr(plans.Recorder, "record", lambda self, *a: made.append(1) or real(self, *a))
    weight = QTensor.quantize(torch.randn(40, 256).to(dtype), **WEIGHTS[name])
    if layout.fits(weight) and name != "int3":
        weight.pack(layout.EXEC)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    bias = torch.randn(40).to(dtype)
    for change in range(3):
        if change == 1:
            stored = weight._storage.parts
            part = stored.get("row_scale", stored["scale"])
            part.mul_(0.5)
        if change == 2:
            weight.copy_(QTensor.quantize(torch.randn(40, 256).to(dtype), **WEIGHTS[name]))
        for call in range(3):
            x = torch.randn(2, 3, 256).to(dtype) if call else torch.randn(2, 3, 512).to(dtype)[..., ::2]
            b = None if call == 1 else bias
            wanted = x.double() @ weight.dequantize(torch.float64).T + (0 if b is None else b.double())
            assert error(F.linear(x, weight, b), wanted) <= BOUNDS[dtype]
    assert made
    assert any(one.plan is not None for plan in weight._storage.plans.values() for one in _recorded(plan.gemm))


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4"])
def test_operators_use_plans(kind, monkeypatch):
    """Compiled graphs call `requanto::linear`, whose arguments are tensors; training uses plans for both products."""
    made = []
    real = plans.Recorder.record
    monkeypatch.setattr(plans.Recorder, "record", lambda self, *a: made.append(1) or real(self, *a))
    weight = QTensor.quantize(torch.randn(40, 256), kind)
    weight.pack(layout.EXEC)
    values, parts = weight.dequantize(torch.float64), custom_ops.arguments(weight)
    for _ in range(3):
        x = torch.randn(5, 256)
        assert error(torch.ops.requanto.linear(x, None, *parts, None), x.double() @ values.T) <= 1e-5
    assert len(made) == 1
    with torch.enable_grad():
        for _ in range(3):
            x, bias = torch.randn(7, 256, requires_grad=True), torch.randn(40, requires_grad=True)
            out = F.linear(x, weight, bias)
            dy = torch.randn_like(out)
            out.backward(dy)
            assert error(out, x.double() @ values.T + bias.double()) <= 1e-5
            assert error(x.grad, dy.double() @ values) <= 1e-5
    assert len(made) == 3
    x, bias = torch.randn(2, 40), torch.randn(256)
    for _ in range(2):  # a transposed weight; its kernel adds no bias
        found = custom_ops.run(x, weight.t(), bias, lasts=True)
        assert error(found, x.double() @ values + bias.double()) <= 1e-5


def _recorded(gemm):
    """The recorded calls behind a plan, which a column scale may wrap."""
    if isinstance(gemm, plans._Recorded):
        return list(gemm._plans.values())
    return [one for cell in gemm.__closure__ or () for one in _recorded_of(cell.cell_contents)]


def _recorded_of(value):
    return list(value._plans.values()) if isinstance(value, plans._Recorded) else []
