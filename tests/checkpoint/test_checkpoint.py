"""The stored form: descriptions and parts there and back, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor, QuantoConfig, qtypes
from requanto.checkpoint import CheckpointError, flatten, parse_spec, rebuild, spec_text, table_of
from requanto.checkpoint.format import check_version

OLD = ["int2", "int4", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]  # of format version 1
NEW = ["int3", "int7", "uint4", "uint8", "nf4", "fp4", "fp6_e3m2", "codebook4"]
BLOCKS = ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8_e5m2"]
NEW += BLOCKS
KINDS = [*OLD, *NEW]


@given(
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from([(4, 32), (3, 4, 32), (32, 5), (4, 3, 2, 2), (1, 1), (5, 7)]),
    group=st.sampled_from([None, 8, 16]),
    symmetric=st.booleans(),
    transposed=st.booleans(),
    activation=st.sampled_from([None, "qint8", "qfloat8_e4m3fn"]),
)
def test_flattened_and_rebuilt_it_is_the_same(kind, shape, group, symmetric, transposed, activation):
    transposed = transposed and len(shape) < 4
    both = not (qtypes[f"q{kind}"].bits == 8 or qtypes[f"q{kind}"].is_unsigned or qtypes[f"q{kind}"].is_codebook)
    symmetric = symmetric if both else None
    tensor = QTensor.quantize(torch.randn(*shape), kind, group_size=group, symmetric=symmetric, transposed=transposed)
    tensor.activation = None if activation is None else qtypes[activation]
    flat = flatten({"a.weight": tensor, "a.bias": torch.zeros(2)})
    names = {"a.weight_qdata", "a.weight_scale", "a.bias"} | ({"a.weight_shift"} if tensor.shift is not None else set())
    names |= {"a.weight_codebook"} if kind.startswith("codebook") else set()
    names |= {"a.weight_row_scale"} if kind == "nvfp4" else set()
    assert set(flat) == names
    parts = {key.removeprefix("a.weight_"): value for key, value in flat.items() if "weight_" in key}
    back = rebuild("a.weight", spec_text(tensor), parts, torch.float32)
    assert back.spec() == tensor.spec()
    assert torch.equal(back, tensor)
    assert table_of({"a.weight": tensor, "b": torch.zeros(2)}.items()) == {"a.weight": spec_text(tensor)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_version_that_can_say_it_is_written(kind):
    config = QuantoConfig(weights=kind)
    config.record(table_of({"a": QTensor.quantize(torch.randn(4, 64), kind), "b": torch.ones(1)}.items()))
    version = 1 if kind in OLD else 3 if kind in BLOCKS else 2
    assert config.to_dict()["format_version"] == version
    check_version(config.format, config.format_version, "here")
    config.record(config.tensors | {"c": "qint4 4x64 group=64"})
    assert config.format_version == version
    config.record({"c": f"qint4 4x64 group=64 activation=q{BLOCKS[0]}"})
    assert config.format_version == 3


def test_a_reader_that_knows_less_says_so(monkeypatch):
    monkeypatch.setattr("requanto.checkpoint.format.FORMAT_VERSION", 1)  # as it was before these types
    with pytest.raises(CheckpointError, match=r"of format version 2; .* reads versions 1 to 1\. Install a newer one"):
        check_version("requanto", 2, "quantization_config")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("quint4 4x64 group=64", "quint4 codes are unsigned and need a shift"),
        ("qnf4 4x64 group=64 affine", "qnf4 codes are symmetric"),
    ],
)
def test_a_form_that_a_type_lacks(line, why):
    with pytest.raises(CheckpointError, match=why):
        parse_spec(line, "w")


def test_a_codebook_of_another_size_is_refused():
    tensor = QTensor.quantize(torch.randn(4, 64), "codebook3")
    parts = tensor.inner_tensors()
    with pytest.raises(CheckpointError, match=r"needs the tensors w_qdata, w_scale, w_codebook"):
        rebuild("w", spec_text(tensor), {"qdata": parts["qdata"], "scale": parts["scale"]}, torch.float32)
    with pytest.raises(CheckpointError, match=r"w_codebook: found torch\.float32 \(7,\), expected .* \(8,\)"):
        rebuild("w", spec_text(tensor), parts | {"codebook": parts["codebook"][:7]}, torch.float32)


def test_the_lines_of_the_format():
    weight = torch.randn(4, 128)
    assert spec_text(QTensor.quantize(weight, "int4")) == "qint4 4x128 group=64 affine"
    assert spec_text(QTensor.quantize(weight, "int8")) == "qint8 4x128"
    experts = QTensor.quantize(torch.randn(2, 128, 4), "int2", transposed=True, symmetric=True)
    assert spec_text(experts) == "qint2 2x128x4 group=32 axis=1 transposed"
    assert spec_text(QTensor.quantize(weight, "nf4")) == "qnf4 4x128 group=64"
    assert spec_text(QTensor.quantize(weight, "uint8")) == "quint8 4x128 affine"
    assert spec_text(QTensor.quantize(weight, "codebook3", group_size=128)) == "qcodebook3 4x128"


@pytest.mark.parametrize("line", ["", "qint4", "qint9 4x4", "qint4 4xq", "qint4 4x4 group", "qint4 4x4 tall", None, 3])
def test_a_line_of_another_form(line):
    with pytest.raises(CheckpointError, match=r"tensors\['w'\].* no description .*expected e\.g\. 'qint4 1536x576"):
        parse_spec(line, "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("scale"), r"needs the tensors w_qdata, w_scale, w_shift; the checkpoint has w_qdata, w_shift"),
        (
            lambda p: p.update(qdata=p["qdata"][:-1]),
            r"w_qdata: found torch\.uint8 \(3, 16\), expected torch\.uint8 \(4, 16\)",
        ),
        (lambda p: p.update(qdata=p["qdata"].to(torch.int8)), r"w_qdata: found torch\.int8"),
        (lambda p: p.update(scale=p["scale"].double()), r"w_scale: found torch\.float64"),
        (lambda p: p["scale"].fill_(float("nan")), r"w_scale holds NaN or Inf: the checkpoint is damaged"),
        (lambda p: p["shift"].fill_(float("inf")), r"w_shift holds NaN or Inf: the checkpoint is damaged"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    tensor = QTensor.quantize(torch.randn(4, 32), "int4")
    parts = {name: inner.clone() for name, inner in tensor.inner_tensors().items()}
    change(parts)
    with pytest.raises(CheckpointError, match=message):
        rebuild("w", spec_text(tensor), parts, torch.float32)
