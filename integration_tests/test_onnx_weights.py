"""ONNX files of quantized weights: every type and option, as codes, with the outputs of the model."""

import re

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import requanto
from requanto import QTensor, qtypes

pytest.importorskip("onnx", reason="ONNX files need the package onnx")
pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs the package onnxscript")
pytest.importorskip("onnxruntime", reason="ONNX files are run by the package onnxruntime")
from made_weights import EVERY, made
from onnx_files import Layers, error, export, initializers, operators, outputs, parameter, run, weights_of

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = [name for name in qtypes if name != "qfloat8"]


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    return str(tmp_path / "model.onnx")


def quantized(kind, rows=24, length=128, **how):
    return QTensor.quantize(torch.randn(rows, length), kind, **how)


def test_every_type(file):
    model = Layers([quantized(name) for name in NAMES])
    program = export(model, model.inputs(), file, dynamic_shapes=(({0: torch.export.Dim("rows", min=2, max=64)},),))
    other = model.inputs(9)
    assert max(map(error, run(file, other), outputs(model, other))) < 1e-5
    # The codes, scales and shifts of the model, and no dequantized weight. Integers of 3 bits take 4, and of 1 bit 2.
    stored = sum(value.nbytes for value in initializers(program).values())
    assert stored < 1.2 * sum(weight.nbytes for weight in weights_of(model))


#: Further words of a description, and the shape that they fit.
FORMS = {"": (24, 256), "rank=2": (7, 256), "transposed": (256, 24)}
OPTIONS = {
    "one scale a row": {"group_size": None},
    "groups of 8": {"group_size": 8},
    "groups of 16": {"group_size": 16},
    "groups of 128": {"group_size": 128},
    "rotated": {"rotation": True},
    "low rank": {"low_rank": 4},
    "column scale and rotation": {"column_scale": torch.linspace(0.1, 1, 128), "rotation": True, "low_rank": 4},
    "stored transposed": {"transposed": True},
}


def test_options(file):
    weights = []
    for kind in ("int2", "int3", "int4", "int8", "float8", "nf4"):
        weights += [quantized(kind, 128, **how) for how in OPTIONS.values()]
        if kind in ("int2", "int3", "int4"):
            weights += [quantized(kind, symmetric=True), quantized(kind, scale_bits=6)]
        weights += [quantized(kind, 7, 90), quantized(kind, 7, 100, group_size=None)]
    model = Layers(weights)
    export(model, model.inputs(), file)


def test_forms_of_other_programs(file):
    """Signed scales, scales in blocks, columns in another order: as GEMMs both ways and as dequantized values."""
    rows = [made(form, *shape, words=words) for form in EVERY for words, shape in FORMS.items()]
    model = Layers(rows)
    assert {"Gather", "MatMulNBits"} <= operators(export(model, model.inputs(), file))


@given(data=st.data())
@settings(max_examples=2, deadline=None, derandomize=True)
def test_random_weights(data):
    """Shapes, types, groups and options drawn at random; many weights in each model."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    weights = []
    for _ in range(20):
        name = data.draw(st.sampled_from(NAMES))
        own_scales = name.startswith(("qmx", "qnvfp"))  # their scales have 8 bits
        weights.append(
            quantized(
                name,
                data.draw(st.integers(1, 40)),
                2 * data.draw(st.integers(1, 80)),
                group_size=data.draw(st.sampled_from(["default", None, 2, 16, 32, 64])),
                rotation=data.draw(st.sampled_from([None, True])),
                scale_bits=None if own_scales else data.draw(st.sampled_from([None, 4, 7, 8])),
            )
        )
    model = Layers(weights)
    program = torch.onnx.export(model, model.inputs(), verbose=False)
    args = model.inputs()
    got = run(program.model_proto.SerializeToString(), args)
    for weight, one, other in zip(weights, got, outputs(model, args), strict=True):
        assert error(one, other) < 1e-5, weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype, file):
    kinds = ("int4", "int8", "nf4", "float8")
    model = Layers([QTensor.quantize(torch.randn(24, 128, dtype=dtype), kind) for kind in kinds])
    export(model, model.inputs(), file)


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(opset, file):
    model = Layers([quantized(kind) for kind in ("int4", "int8", "nf4", "float8", "int7")])
    program = export(model, model.inputs(), file, opset_version=opset)
    assert program.model.opset_imports[""] == opset


def test_quantized_activations(file):
    weights = []
    for kind in ("int8", "int4", "float8", "int5"):
        for activation in ("qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"):
            weights.append(quantized(kind))
            weights[-1].activation = activation
    model = Layers(weights)
    (x,) = model.inputs()
    x[1] *= 1e4
    x[2] = 0
    assert "MatMulInteger" in operators(export(model, (x,), file))
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    for got, want in zip(run(file, (x,)), outputs(model, (x,)), strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert error(got[:3], want[:3]) < 1e-5


def test_calibrated_activations(file):
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).eval()
    requanto.quantize(model, weights="int8", activations="int8")
    x = torch.randn(8, 64)
    with requanto.Calibration():
        model(x)
    requanto.freeze(model)
    torch.onnx.export(model, (x,), file, verbose=False)
    x[2, 3] = torch.inf  # the largest code
    with torch.no_grad():
        assert error(run(file, (x,))[0], model(x).dequantize()) < 1e-5


def test_integer_zero_points_stay_integers(file):
    """Where shift / scale is one for every group: ONNX Runtime multiplies with them fastest."""
    scale, zero = torch.rand(24, 2) + 0.5, torch.randint(0, 16, (24, 2)).float()
    codes = torch.randint(0, 256, (24, 64), dtype=torch.uint8)
    how = {"qtype": qtypes["qint4"], "shape": (24, 128), "dtype": torch.float32, "group_size": 64}
    model = Layers([QTensor(codes, scale, zero * scale, **how)])
    program = export(model, model.inputs(), file)
    assert initializers(program, "_zero_point")
    assert not initializers(program, "_offset")


def test_prepacked_weights(file):
    kinds = ("int4", "int8", "float8")
    model = Layers([QTensor.quantize(torch.randn(256, 256).bfloat16(), kind) for kind in kinds])
    requanto.prepare(model)
    for layer in model.layers:
        layer.bias = None
    layouts = [weight.layout_name for weight in weights_of(model)]
    x = torch.randn(4, 256)
    torch.onnx.export(model, (x,), file, verbose=False)
    assert [weight.layout_name for weight in weights_of(model)] == layouts
    for weight, got in zip(weights_of(model), run(file, (x,)), strict=True):
        assert error(got, x @ weight.dequantize(torch.float32).T) < 1e-5


def ordered(weight):
    """The weight with its columns in another order."""
    order = torch.argsort(torch.rand(weight.lead[:-1] + (weight.row_length,)), -1).to(torch.int32)
    return weight.with_inner({**weight.inner_tensors(), "order": order})


class Mixed(torch.nn.Module):
    """A tied embedding, convolutions, matmuls and slices."""

    def __init__(self, kind, columns=False, order=False, **how):
        super().__init__()
        self.embedding, self.output = torch.nn.Embedding(24, 64), torch.nn.Linear(64, 24, bias=False)
        self.conv, self.up = torch.nn.Conv2d(4, 8, 3), torch.nn.ConvTranspose2d(8, 8, 3)

        def column(*shape):
            return torch.rand(shape) + 0.2 if columns else None

        for module in (self.embedding, self.conv, self.up):
            scale = column(module.weight[0].numel())
            module.weight = parameter(QTensor.quantize(module.weight, kind, column_scale=scale, **how))
        self.output.weight = self.embedding.weight
        self.experts = parameter(QTensor.quantize(torch.randn(3, 64, 64), kind, column_scale=column(3, 64)))
        if order:
            for module in (self.embedding, self.conv, self.up):
                module.weight = parameter(ordered(module.weight))
            self.output.weight, self.experts = self.embedding.weight, parameter(ordered(self.experts))

    def forward(self, ids):
        x = self.embedding(ids)
        image = self.up(self.conv(x[:, None].expand(-1, 4, -1, -1)))
        for index in range(3):
            x = x + 0.1 * F.linear(x, self.experts[index])
        x = x + 0.1 * (x @ self.experts[0]) + 0.1 * F.linear(x, self.experts[1][:64])
        return self.output(x), F.linear(x, self.output.weight[:8]), image


MIXED = [
    ("int8", {}),
    ("float8", {}),
    ("int4", {"rotation": True}),
    ("int3", {"scale_bits": 6}),
    ("int8", {"columns": True}),
    ("int4", {"columns": True, "order": True}),
]


@pytest.mark.parametrize(("kind", "how"), MIXED)
def test_other_operators(kind, how, file):
    model = Mixed(kind, **how)
    program = export(model, (torch.randint(0, 24, (5, 6)),), file)
    found = initializers(program)
    assert {f"{name}.weight_{part}" for name in ("output", "conv", "up") for part in ("qdata", "scale")} <= found.keys()
    assert not [name for name in found if "parametrizations" in name]
    assert any(name.endswith("_column") for name in found) == ("columns" in how)
    if kind != "int3":  # which is stored in 4 bits for the product
        table = [v.nbytes for n, v in found.items() if re.match(r"(embedding|output)\.weight_qdata", n)]
        assert sum(table) <= model.embedding.weight.qdata.nbytes + 8 * 64  # once, and the slice of it


def test_a_low_rank_term(file):
    class LowRank(Mixed):
        def forward(self, ids):
            x = self.embedding(ids)
            return self.output(x), self.up(self.conv(x[:, None].expand(-1, 4, -1, -1)))

    export(LowRank("int4", low_rank=2), (torch.randint(0, 24, (5, 6)),), file)
