"""What rounding x to 8 or 16 bits costs: less than half of what rounding the weights does, for whatever x looks like.

A GEMM of integers rounds x, a block of 32 elements at a time. The weights were rounded more coarsely, so the result hardly
changes; these tests measure both errors on the same x.
"""

import itertools
import math

import pytest
import torch
from cpu_reference import DTYPES, Fresh, form, inputs, quantized_layer

from requanto import QTensor, prepare, qint8
from requanto.linear import linear
from requanto.linear.activations import quantize_activations
from requanto.linear.cpu import gemm, library
from requanto.linear.explain import explain
from requanto.runtime.settings import settings

#: Types of up to 6 bits, with the sizes of groups they usually have. Those of 6 get 16 bits of x.
ROUNDED = {
    "int2": (16, 32, 64),
    "int3": (32, 64),
    "int4": (32, 64, 128, None),
    "uint4": (64,),
    "int5": (32, 64),
    "int6": (32, 64, None),
    "nf2": (32,),
    "nf3": (32,),
    "nf4": (32, 64),
    "fp4": (64,),
    "fp4_e2m1": (64,),
    "fp5_e2m2": (64,),
    "fp6_e2m3": (64,),
    "fp6_e3m2": (32, 64),
    "codebook3": (32,),
    "codebook4": (64,),
    "nvfp4": (16,),
    "mxfp4": (32,),
    "mxfp6_e2m3": (32,),
    "mxfp6_e3m2": (32,),
}
OUTPUTS, LENGTH = 128, 768


def errors(weight: QTensor, values: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms of each row of x: of what rounding x changes, of what rounding the weights changes, of the result."""
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    exact = weight.dequantize(torch.float64)
    want = x.double() @ exact.t()
    with torch.no_grad():
        got = layer(x).double()
    return (got - want).norm(dim=1), (x.double() @ (exact - values.double()).t()).norm(dim=1), want.norm(dim=1)


@pytest.mark.parametrize("how", ["normal", "heavy", "channels", "sparse", "spiky"])
def test_rounding_x_costs_less_than_half_of_rounding_the_weights(cpu_level, how):
    draw = Fresh()
    values = torch.randn(OUTPUTS, LENGTH, generator=draw)
    for kind, sizes in ROUNDED.items():
        size = draw.one_of(sizes)
        weight = form(kind, group_size=size).quantized(values)
        for rows in (1, draw.one_of((2, 4, 7, 40))):
            x = inputs(rows, LENGTH, torch.float32, draw, how)
            of_x, of_weights, _ = errors(weight, values, x)
            worst = float((of_x / of_weights).max())
            assert worst < 0.5, f"{kind} g{size}, {rows} rows: {worst:.2f} of the weights' rounding error ({draw})"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_16_bits_too(dtype):
    """Beside the rounding of the result, and in bfloat16 of the products' factors, that torch's own GEMM has."""
    draw = Fresh()
    values = torch.randn(OUTPUTS, LENGTH, generator=draw).to(dtype)
    for kind, how in itertools.product(("int2", "int4", "int5", "nf4"), ("normal", "channels", "sparse", "spiky")):
        weight = form(kind).quantized(values)
        x = inputs(7, LENGTH, dtype, draw, how)
        own = (x @ weight.dequantize(dtype).t()).double() - x.double() @ weight.dequantize(torch.float64).t()
        of_x, of_weights, _ = errors(weight, values, x)
        assert (of_x.square() < (0.5 * of_weights).square() + 1.5 * own.norm(dim=1).square()).all(), (
            f"{kind} {how} ({draw})"
        )


@pytest.mark.parametrize("how", ["normal", "heavy", "channels", "sparse"])
def test_with_more_bits_x_is_as_exact_as_float32(cpu_level, how):
    draw = Fresh()
    values = torch.randn(OUTPUTS, LENGTH, generator=draw)
    for kind in ("int6", "int7", "int8", "uint8", "float8", "fp8_e5m2", "fp7_e3m3"):
        weight = form(kind).quantized(values)
        for rows in (1, draw.one_of((2, 4, 7, 40))):
            of_x, of_weights, size = errors(weight, values, inputs(rows, LENGTH, torch.float32, draw, how))
            # Five rows and more of 8-bit floats are multiplied as bfloat16 where the processor has it.
            narrow = rows > 4 and weight.qtype.is_floating_point
            assert (of_x < (4e-3 if narrow else 1e-4) * size).all(), f"{kind} ({draw})"
            assert (of_x < (0.2 if narrow else 0.02) * of_weights).all(), f"{kind} ({draw})"


# ---------------------------------------------------------------------- one large element


def with_zeros(kind: str, dtype: torch.dtype, column: int, length: int, draw: Fresh) -> tuple[QTensor, torch.Tensor]:
    """A weight whose column ``column`` is 0, also as it is stored, and its float64 values."""
    values = torch.randn(64, length, generator=draw)
    values[:, column] = 0
    how = {} if kind in ("int8", "float8") else {"symmetric": True}
    weight = QTensor.quantize(values.to(dtype), kind, **how)
    exact = weight.dequantize(torch.float64)
    assert not exact[:, column].any()
    return weight, exact


@pytest.mark.parametrize("kind", ["int7", "int8", "float8"])
def test_one_large_element_whose_weights_are_zero_drowns_no_other(cpu_level, kind):
    """x rounded by its largest element would leave no digit to the others, which make the result."""
    draw = Fresh()
    for dtype, (rows, length) in itertools.product(DTYPES, ((1, 4096), (2, 4096), (7, 576), (130, 576))):
        weight, exact = with_zeros(kind, dtype, 17, length, draw)
        layer = quantized_layer(weight)
        prepare(layer, smallest=0)
        for large in (10, 2000, 60000):
            x = torch.randn(rows, length, generator=draw).to(dtype)
            x[:, 17] = large
            want = x.double() @ exact.t()
            with torch.no_grad():
                got = layer(x).double()
            worst = float(((got - want).norm(dim=1) / want.norm(dim=1)).max())
            limit = 4e-3 if dtype == torch.bfloat16 or kind == "float8" else 1e-3
            assert worst < limit, f"{large} in {rows} rows of {length} {dtype}: off by {worst:.1e} ({draw})"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_int8_activations_are_those_of_the_definition(cpu_level, dtype, static, rows):
    """Quantized activations round x by its largest element as they are defined to; float ones, on the same layer, do not."""
    draw = Fresh()
    weight, exact = with_zeros("int8", dtype, 17, 576, draw)
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    x = torch.randn(rows, 576, generator=draw).to(dtype)
    x[:, 17] = 500
    scale = torch.tensor(0.05) if static else None
    codes, steps = quantize_activations(x, qint8, scale)
    want = codes.double() * steps.double() @ exact.t()
    plain = x.double() @ exact.t()
    limit = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    with torch.no_grad():
        for _ in range(2):
            got = linear(x, layer.weight, activation=qint8, input_scale=scale).double()
            # A code at a tie may differ by one: a thousandth of the codes, of which few are not 0 here.
            assert (got - want).norm() <= 0.03 * want.norm() + limit * plain.norm(), draw
            got = layer(x).double()
            assert (got - plain).norm() <= limit * plain.norm(), draw


# ---------------------------------------------------------------------- how x is rounded


@pytest.mark.parametrize("arithmetic", ["auto", "float"])
@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "nf4"])
def test_a_row_does_not_depend_on_its_neighbours(cpu_level, kind, arithmetic, monkeypatch):
    """Also where some rows of x are computed otherwise than others: with a large element, or with one that is no number."""
    monkeypatch.setattr(settings, "cpu_arithmetic", arithmetic)
    draw = Fresh()
    layer = quantized_layer(form(kind).quantized(torch.randn(64, 512, generator=draw)))
    prepare(layer, smallest=0)
    x = torch.randn(7, 512, generator=draw)
    with torch.no_grad():
        want = layer(x)
        for number in (1e4, math.nan, math.inf):
            x[[1, 4], 3] = number
            assert torch.equal(layer(x)[[0, 2, 3, 5, 6]], want[[0, 2, 3, 5, 6]]), draw


@pytest.mark.skipif(library.find() is None, reason="the CPU kernels are not available here")
def test_explain_tells_how_x_is_multiplied(monkeypatch):
    names = {"int4": "cpu-integer", "int8": "cpu-integer-16", "nf4": "cpu-integer", "float8": "cpu-float"}
    for kind, name in names.items():
        model = torch.nn.Sequential(quantized_layer(form(kind).quantized(torch.randn(64, 96))))
        for arithmetic, wanted in (("auto", name), ("float", "cpu-float")):
            monkeypatch.setattr(settings, "cpu_arithmetic", arithmetic)
            (row,) = explain(model, rows=1, dtype=torch.float32)
            assert row.implementation == wanted
        assert "in int8" not in str(row)
        model[0].weight.activation = qint8
        (row,) = explain(model, rows=1, dtype=torch.float32)
        assert row.implementation == ("cpu-coded" if kind.startswith("int") else "cpu-dequantize")


def test_explain_tells_that_x_is_rounded_to_bfloat16(monkeypatch):
    """Many rows of float32 or float16 and weights in float8, where the processor multiplies bfloat16."""
    monkeypatch.setattr(gemm, "_has_bfloat16", lambda: True)
    model = torch.nn.Sequential(quantized_layer(form("float8").quantized(torch.randn(64, 96))))
    for dtype, arithmetic, rounded in (
        (torch.float32, "auto", [False, True]),
        (torch.float16, "auto", [False, True]),
        (torch.bfloat16, "auto", [False, False]),
        (torch.float32, "float", [False, False]),
    ):
        monkeypatch.setattr(settings, "cpu_arithmetic", arithmetic)
        found = explain(model, rows=(4, 5), dtype=dtype)
        assert [one.implementation for one in found] == ["cpu-float"] * 2
        assert ["x rounded to bfloat16" in one.reason for one in found] == rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_explain_tells_that_x_is_two_numbers_of_bfloat16(dtype, monkeypatch):
    """With AMX: more than 32 rows and codes with one scale a row, which bfloat16 holds; what would be rounded is not."""
    monkeypatch.setattr(gemm, "_has_tiles", lambda: True)
    rows, draw = (32, 33, 200), torch.randn(64, 96)
    for weight, arithmetic, parts in (
        (QTensor.quantize(draw, "int8"), "auto", [False, True, True]),
        (QTensor.quantize(draw, "int6", group_size=None, symmetric=True), "auto", [False, True, True]),
        (QTensor.quantize(draw, "int8"), "float", [False] * 3),
        (QTensor.quantize(draw, "int8", group_size=32), "auto", [False] * 3),
        (QTensor.quantize(draw, "uint8", group_size=None), "auto", [False] * 3),
    ):
        monkeypatch.setattr(settings, "cpu_arithmetic", arithmetic)
        found = explain(torch.nn.Sequential(quantized_layer(weight)), rows=rows, dtype=dtype)
        assert ["sum of two bfloat16" in one.reason for one in found] == parts
        names = ["cpu-float" if two or arithmetic == "float" else "cpu-integer-16" for two in parts]
        assert [one.implementation for one in found] == names
