"""Column scales in files: the format's version, descriptions, damage, and formats that have none."""

import json

import pytest
import torch
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint import CheckpointError, flatten, rebuild, spec_text, table_of
from requanto.checkpoint.foreign.quanto_files import from_qtensor
from requanto.checkpoint.format import check_version
from requanto.checkpoint.state_dict import flatten_described, join_described
from requanto.config.config import FORMAT_VERSION, format_version_of


def quantized(kind="int4", shape=(96, 128), **how) -> QTensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) * (torch.randn(shape[-1], generator=generator) / 2).exp()
    return QTensor.quantize(weight.to(torch.bfloat16), kind, **{"column_scale": "root", **how})


@pytest.mark.parametrize("how", [{}, {"low_rank": 2, "scale_bits": 4, "rotation": 32}, {"kind": "codebook4"}])
def test_flattened_and_rebuilt(how):
    weight = quantized(**how)
    flat = flatten({"a.weight": weight})
    assert flat["a.weight_column"].shape == (128,)
    parts = {key.removeprefix("a.weight_"): value for key, value in flat.items()}
    assert torch.equal(rebuild("a.weight", spec_text(weight), parts, weight.dtype), weight)
    described = flatten_described({"a.weight": weight, "b": torch.ones(2)})
    assert json.loads(bytes(described["a.weight_spec"].tolist()))["format_version"] == 3
    assert torch.equal(join_described(described)["a.weight"], weight)


def test_only_weights_with_a_column_scale_need_version_3(monkeypatch):
    assert format_version_of(table_of({"a": quantized(column_scale=False)}.items())) == 1
    assert format_version_of(table_of({"a": quantized(column_scale=False, rotation=32)}.items())) == 2
    table = table_of({"a": quantized()}.items())
    assert format_version_of(table) == 3 <= FORMAT_VERSION
    config = QuantoConfig(weights="int4", column_scale="root")
    config.record(table)
    stored = config.to_dict()
    assert (stored["format_version"], stored["column_scale"]) == (3, "root")
    assert QuantoConfig.from_dict(stored) == config
    assert "column_scale" not in QuantoConfig(weights="int4").to_dict()  # earlier versions read such a config
    assert QuantoConfig(weights="int4", column_scale=False).to_dict()["column_scale"] is False
    monkeypatch.setattr("requanto.checkpoint.format.FORMAT_VERSION", 2)  # as it was before column scales
    with pytest.raises(CheckpointError, match=r"of format version 3; .* reads versions 1 to 2\. Install a newer one"):
        check_version(config.format, config.format_version, "quantization_config")


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "a column scale is positive"), (-1.0, "a column scale is positive"), (float("nan"), "holds NaN or Inf")],
)
def test_damage_is_named(value, message):
    weight = quantized()
    parts = {name: part.clone() for name, part in weight.inner_tensors().items()}
    parts["column"][5] = value
    with pytest.raises(CheckpointError, match=f"a.weight_column .*{message}|{message}"):
        rebuild("a.weight", spec_text(weight), parts, weight.dtype)
    parts["column"][5] = 1e30
    with pytest.raises(CheckpointError, match="makes weights of"):
        rebuild("a.weight", spec_text(weight), parts, weight.dtype)
    del parts["column"]
    with pytest.raises(CheckpointError, match=r"needs the tensors .*a\.weight_column"):
        rebuild("a.weight", spec_text(weight), parts, weight.dtype)


def test_column_scales_of_other_programs_may_be_negative():
    weight = quantized()
    parts = {name: part.clone() for name, part in weight.inner_tensors().items()}
    parts["column"][5] *= -1
    text = f"{spec_text(weight)} signed"
    found = rebuild("a.weight", text, parts, torch.float32)
    wanted = weight.float().dequantize()
    wanted[:, 5] *= -1
    assert torch.equal(found.dequantize(), wanted)
    x = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(torch.nn.functional.linear(x, found), x @ wanted.T)
    parts["column"][5] = 0
    with pytest.raises(CheckpointError, match="a column scale is not 0"):
        rebuild("a.weight", text, parts, weight.dtype)


def test_a_small_column_beside_a_large_scale_is_no_damage():
    column = torch.ones(128)
    column[::2] = 2.0**-13
    generator = torch.Generator().manual_seed(0)
    weight = QTensor.quantize(
        torch.randn(64, 128, generator=generator) * 100, "int4", column_scale=column, group_size=2
    )
    assert float(weight.scale.max()) * 15 > 2**16
    assert torch.equal(rebuild("w", spec_text(weight), weight.inner_tensors(), weight.dtype), weight)


def test_optimum_quanto_has_none():
    with pytest.raises(CheckpointError, match="no column scales"):
        from_qtensor(quantized("int8"), "a.weight")


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
def test_requantize(flat, frozen):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))
    twin = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))
    requanto.quantize(model, "int4", column_scale="root")
    if frozen:
        requanto.freeze(model)
    found = json.loads(json.dumps(requanto.quantization_map(model, digests=frozen)))
    assert found["0"]["column_scale"] == (True if frozen else "root")
    state = flatten(model.state_dict()) if flat else model.state_dict()
    requanto.requantize(twin, state, found)
    x = torch.randn(3, 64)
    torch.testing.assert_close(twin(x), model(x))
    requanto.freeze(twin)
    assert twin[0].weight.column is not None
    requanto.freeze(model)
    assert torch.equal(twin[0].weight, model[0].weight)
