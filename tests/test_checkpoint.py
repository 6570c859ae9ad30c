"""The stored form: descriptions and parts there and back, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor, qtypes
from requanto.checkpoint import CheckpointError, flatten, parse_spec, rebuild, spec_text, table_of

KINDS = ["int2", "int4", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]


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
    symmetric = None if qtypes[f"q{kind}"].bits == 8 else symmetric
    tensor = QTensor.quantize(torch.randn(*shape), kind, group_size=group, symmetric=symmetric, transposed=transposed)
    tensor.activation = None if activation is None else qtypes[activation]
    flat = flatten({"a.weight": tensor, "a.bias": torch.zeros(2)})
    names = {"a.weight_qdata", "a.weight_scale", "a.bias"} | ({"a.weight_shift"} if tensor.shift is not None else set())
    assert set(flat) == names
    parts = {key.removeprefix("a.weight_"): value for key, value in flat.items() if "weight_" in key}
    back = rebuild("a.weight", spec_text(tensor), parts, torch.float32)
    assert back.spec() == tensor.spec()
    assert torch.equal(back, tensor)
    assert table_of({"a.weight": tensor, "b": torch.zeros(2)}.items()) == {"a.weight": spec_text(tensor)}


def test_the_lines_of_the_format():
    weight = torch.randn(4, 128)
    assert spec_text(QTensor.quantize(weight, "int4")) == "qint4 4x128 group=64 affine"
    assert spec_text(QTensor.quantize(weight, "int8")) == "qint8 4x128"
    experts = QTensor.quantize(torch.randn(2, 128, 4), "int2", transposed=True, symmetric=True)
    assert spec_text(experts) == "qint2 2x128x4 group=32 axis=1 transposed"


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
