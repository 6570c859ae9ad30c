"""``mul_`` and ``div_`` by a power of two: exact, for all aliases; any other write of values is refused."""

import copy

import pytest
import torch
from torch import nn

import requanto
from requanto import QTensor
from requanto.tensor.lowrank import append

KINDS = {
    "int8": {},
    "int4": {"group_size": 32},
    "nf4": {},
    "nvfp4": {},
    "mxfp4": {},
    "float8": {},
    "int3": {"group_size": 16, "scale_bits": 6},
    "codebook4": {},
}


def quantized(kind: str, dtype: torch.dtype = torch.float32, low_rank: bool = False) -> QTensor:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    made = QTensor.quantize(weight, kind, **KINDS[kind])
    if low_rank:
        append(made, torch.ones(48, 2, dtype=dtype), torch.ones(2, 64, dtype=dtype))
    return made


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_by_a_power_of_two(kind: str, dtype: torch.dtype, low_rank: bool) -> None:
    weight = quantized(kind, dtype, low_rank)
    before, codes, turned, alias = weight.dequantize(), weight.qdata.clone(), weight.t(), weight.detach()
    assert weight.div_(4) is weight
    for found in (weight, turned.t(), alias):
        assert torch.equal(found.dequantize(), before / 4)
        assert torch.equal(found.qdata, codes)
    weight *= torch.tensor(8.0)
    turned.div_(2)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_after_a_forward(kind: str) -> None:
    layer = nn.Linear(64, 48, bias=False)
    layer.weight = nn.Parameter(quantized(kind), requires_grad=False)
    model = nn.Sequential(layer)
    requanto.prepare(model)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    before, other = model(x), copy.deepcopy(model)
    with torch.no_grad():
        layer.weight.div_(2)
    torch.testing.assert_close(model(x), before / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(other(x), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(3),
        lambda w: w.mul_(0),
        lambda w: w.mul_(-2),
        lambda w: w.div_(0.3),
        lambda w: w.div_(0),
        lambda w: w.mul_(float("inf")),
        lambda w: w.mul_(torch.full((64,), 2.0)),
        lambda w: w.div_(2, rounding_mode="floor"),
        lambda w: w[:8].mul_(2),
        lambda w: w.mul_(2.0**-60),
        lambda w: w.mul_(2.0**40),
    ],
    ids=["3", "zero", "negative", "0.3", "by zero", "inf", "row", "floor", "slice", "underflow", "overflow"],
)
def test_what_would_round_is_refused(change) -> None:
    weight = quantized("int4", torch.float16)
    before = weight.dequantize()
    with pytest.raises(NotImplementedError, match="would write float values into the codes"):
        change(weight)
    assert torch.equal(weight.dequantize(), before)
