"""`linear_many` through the launch for several weights, in Triton's interpreter, against one `linear` for each weight."""

import pytest
import torch
from gpu_stand_in import take_for_a_gpu
from reference import TOLERANCE, error
from torch import nn

from requanto.linear import custom_ops, linear, linear_many
from requanto.linear import prepack as packing
from requanto.linear.gpu.layout import kernel_parts
from requanto.tensor.qtensor import QTensor
from requanto_kernels import wq_gemm_many as kernel


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    take_for_a_gpu(monkeypatch)
    monkeypatch.setattr(packing, "SMALLEST", 0)
    monkeypatch.setattr(packing, "SMALLEST_ON_CPU", 0)
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    import requanto_kernels

    found = []

    def noted(*args, **how):
        found.append(how["layout"])
        return kernel(*args, **how)

    monkeypatch.setattr(requanto_kernels, "wq_gemm_many", noted)
    return found


@torch.no_grad()
def test_biases_of_unlike_dtypes(calls):
    weights = [QTensor.quantize(torch.randn(n, 128), "int4") for n in (40, 33)]
    biases = [torch.randn(40), torch.randn(33).half()]
    x = torch.randn(1, 128)
    for _ in range(2):
        for out, weight, bias in zip(linear_many(x, weights, biases), weights, biases):
            assert torch.equal(out, linear(x, weight, bias))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("int4", {"column_scale": "mean"}), ("int4", {"group_size": 128, "symmetric": True}), ("int4", {"scale_bits": 6}),
        ("nf4", {}), ("int3", {}), ("mxfp4", {}), ("float8", {}), ("int8", {"group_size": 64}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_like_one_by_one(kind, how, calls):
    weights = [nn.Parameter(QTensor.quantize(torch.randn(n, 256).half(), kind, **how), False) for n in (72, 33)]
    meanings = [weight.dequantize(torch.float64) for weight in weights]
    biases = [None, torch.randn(33).half()]
    for shape in ((1, 256), (2, 3, 256), (1, 256)):
        x = torch.randn(shape).half()
        outs = linear_many(x, weights, biases)
        for out, meaning, bias in zip(outs, meanings, biases):
            want = x.double() @ meaning.T + (0 if bias is None else bias.double())
            assert out.shape == want.shape
            assert error(out, want) <= 2 * TOLERANCE[torch.float16]
    packed = weights[0].is_packed
    assert packed == weights[1].is_packed
    layout = kernel_parts(weights[0], torch.float16).layout
    assert layout == "exec" or weights[0].qtype.bits == 8
    assert calls == [layout] * 2  # recorded once for each number of rows, then repeated
    calls.clear()
    parts, words, shapes = [], [], []
    for weight in weights:
        its_parts, text, size = custom_ops.arguments(weight)
        parts, words, shapes = parts + its_parts, [*words, text], [*shapes, *size, len(its_parts)]
    xs = [x if weight.column is None else x * weight.column for weight in weights]
    xs = xs if "column_scale" in how else xs[:1]
    again = torch.ops.requanto.linear_many(xs, biases, parts, "|".join(words), shapes)
    assert all(torch.equal(one, two) for one, two in zip(again, outs))
    assert len(calls) == (0 if packed and len(xs) == 1 else 1)  # the plans of packed weights are found by their memory
