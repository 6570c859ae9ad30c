"""The table "What runs where" of docs/kernels.md: every way to read a weight, and whether torch's operators decode it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu_stand_in import gpu
from made_weights import ACT_ORDER, Q4_K, made

import requanto
from requanto.dtypes.qtypes import qint8
from requanto.linear import grouped_linear, linear, times
from requanto.tensor.qtensor import QTensor

DOC = Path(__file__).parents[3] / "docs" / "kernels.md"


def quantized(kind="nf4", n=24, k=128, **how):
    return QTensor.quantize(torch.randn(n, k), kind, **how)


def through(function, weight, *shape):
    """Forward and backward of ``function(x, weight)``."""
    x = torch.randn(*shape, requires_grad=True)
    function(x, weight).sum().backward()
    assert x.grad.abs().sum() > 0


def experts():
    weight, ends = QTensor.quantize(torch.randn(3, 24, 128), "nf4"), torch.tensor([2, 2, 5])
    through(lambda x, w: grouped_linear(x, w, ends), weight, 6, 128)


def convolutions():
    weight = QTensor.quantize(torch.randn(8, 4, 3, 3), "int4", axis=0)
    through(F.conv2d, weight, 1, 4, 5, 5)
    through(F.conv_transpose2d, weight, 1, 8, 5, 5)
    through(lambda x, w: F.conv2d(x, w, groups=2), weight, 1, 8, 5, 5)


def trained_term():
    weight = quantized(low_rank=2)
    weight.set_lowrank(weight.up.detach().requires_grad_(), weight.down.detach().requires_grad_())
    through(linear, weight, 2, 128)
    weight.dequantize().sum().backward()


def column_scale_and_order():
    through(linear, quantized(column_scale="root"), 2, 128)
    linear(torch.randn(2, 256), made(ACT_ORDER, 24, 256))
    made(ACT_ORDER, 24, 256).dequantize()


def static_activations():
    linear(torch.randn(2, 128), quantized("int8"), activation=qint8, input_scale=torch.tensor(0.05))
    linear(torch.randn(2, 128), quantized("nf4"), activation=qint8)


def few_bits():
    for weight in (quantized(scale_bits=6), quantized("int4", zero_point="integer"), quantized("nvfp4")):
        through(linear, weight, 2, 128)
        weight.dequantize()
    through(linear, made(Q4_K, 24, 256), 2, 256)


def empty():
    weight = quantized()
    assert linear(torch.empty(0, 128), weight).shape == (0, 24)
    assert F.embedding(torch.empty(0, dtype=torch.int64), weight).shape == (0, 128)
    assert weight[:0].dequantize().shape == (0, 128)


def autocast():
    with torch.autocast("cpu", dtype=torch.float16):
        assert linear(torch.randn(2, 128), quantized()).dtype == torch.float16
        assert (
            F.conv2d(torch.randn(1, 8, 5, 5), QTensor.quantize(torch.randn(4, 8, 3, 3), "int8")).dtype == torch.float16
        )


def func():
    weight = quantized()
    torch.func.grad(lambda x: linear(x, weight).sum())(torch.randn(2, 128))


READINGS = {
    "`linear`, gradient for x (adapters, QLoRA)": lambda: through(linear, quantized(), 3, 128),
    "`x @ W` (GPT-2's `Conv1D`), gradient for x": lambda: through(times, quantized(), 3, 24),
    "fused experts, gradient for x": experts,
    "convolutions (also in groups, transposed), gradient for x": convolutions,
    "embeddings": lambda: F.embedding(torch.tensor([[1, 5]]), quantized()),
    "`dequantize()`, adapters that are merged, DoRA's norms": lambda: quantized("int4").dequantize(torch.float16),
    "other operators, which read values": lambda: (quantized() * 2, quantized()[3], quantized().std()),
    "x of float64": lambda: through(lambda x, w: linear(x.double(), w), quantized(), 2, 128),
    "scales of few bits, scales in blocks, whole zero points": few_bits,
    "column scale, order of columns": column_scale_and_order,
    "rotation": lambda: through(linear, quantized(rotation=64), 2, 128),
    "low-rank term, also trained": trained_term,
    "int8 and float8 activations, also with a static scale": static_activations,
    "autocast": autocast,
    "no rows, no weights": empty,
    "`torch.func`, `torch.jit.trace`": func,
}


def documented():
    """The table's rows: what is read -> what decodes the codes."""
    section = DOC.read_text().split("## What runs where")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1] for row in rows[2:]}


def test_the_table_has_these_rows():
    assert list(documented()) == list(READINGS)


@pytest.mark.parametrize("name", READINGS)
def test_what_decodes(name):
    torch.manual_seed(0)
    with gpu() as decoded:
        READINGS[name]()
    how = documented()[name]
    assert bool(decoded) == ("torch" in how), (how, decoded)


def test_without_kernels_the_others_run():
    """An old GPU: every reading works, and explain says what it costs."""
    with gpu(capability=70) as decoded:
        for reading in READINGS.values():
            reading()
        model = models()
        said = {(choice.name, choice.implementation) for choice in requanto.explain(model)}
    assert said == {(name, "gpu-dequantize") for name, _ in model.named_parameters()}
    assert decoded


def models():
    weights = {
        "table": torch.nn.Embedding(24, 128), "conv": torch.nn.Conv2d(4, 8, 3, bias=False),
        "line": torch.nn.Conv1d(4, 8, 3, bias=False), "head": torch.nn.Linear(128, 24, bias=False),
    }  # fmt: skip
    model = torch.nn.ModuleDict(weights)
    for module in model.values():
        weight = QTensor.quantize(module.weight.detach(), "int4", axis=0)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    model.experts = torch.nn.Parameter(QTensor.quantize(torch.randn(2, 24, 128), "nf4"), requires_grad=False)
    return model


def test_explain_covers_convolutions_embeddings_and_experts():
    model = models()
    model["table"].weight = model["head"].weight  # tied: looked up and multiplied
    with gpu():
        said = requanto.explain(model, rows=1)
    assert sorted((c.name, c.rows, c.implementation) for c in said) == [
        ("conv.weight", 0, "triton-dequantize"), ("experts", 1, "triton-wq"), ("line.weight", 0, "triton-dequantize"),
        ("table.weight", 0, "triton-dequantize"), ("table.weight", 1, "triton-wq"),
    ]  # fmt: skip
    assert "any" in str(said)
    assert "gathered" in str(said)
    on_a_cpu = {c.name: c.implementation for c in requanto.explain(model) if not c.rows}
    assert on_a_cpu == dict.fromkeys(("conv.weight", "line.weight", "table.weight"), "cpu-dequantize")
