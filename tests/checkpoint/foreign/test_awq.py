"""AWQ: files written from the specification, whose codes compressed-tensors unpacked (writers/gptq.py)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import awq, packing
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError

LINES = {
    "awq": "qint4 64x64 group=16 affine zeros",
    "awq_row": "qint4 32x64 affine zeros",
    "awq_sym": "qint4 32x64 group=32",
    "gemv": "qint4 32x64 group=32 affine zeros",
    "gemv128": "qint4 32x256 group=128 affine zeros",
}


@pytest.fixture
def case(written):
    folder = written("gptq")
    configs = json.loads((folder / "configs.json").read_text())

    def load(name):
        tensors = load_file(folder / f"{name}.safetensors")
        return configs[name], tensors, load_file(folder / f"{name}.expected.safetensors")["m.weight"]

    return load


def scan(config, tensors):
    return awq.scan(config, TensorsSource(tensors))


@pytest.mark.parametrize("name", LINES)
def test_weights_equal_the_kernels(case, made, name):
    config, tensors, expected = case(name)
    found = scan(config, tensors)
    assert found.table == {"m.weight": LINES[name]}
    assert found.consumed == set(tensors)
    assert torch.equal(made(found, TensorsSource(tensors))["m.weight"].dequantize(torch.float16), expected)


def test_a_weight_is_unpacked_in_pieces(case, made, monkeypatch):
    monkeypatch.setattr(packing, "_AT_A_TIME", 1)
    config, tensors, expected = case("awq")
    weight = made(scan(config, tensors), TensorsSource(tensors))["m.weight"]
    assert torch.equal(weight.dequantize(torch.float16), expected)


def test_configs_of_autoawq_and_of_transformers(case):
    config, tensors, _ = case("awq")
    own = {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM", "quant_method": "awq"}
    assert scan(own, tensors).table == {"m.weight": LINES["awq"]}
    # Transformers writes GPTQ's defaults beside AWQ's keys.
    assert scan({**config, "sym": True, "desc_act": False, "format": "gemm"}, tensors).table == {
        "m.weight": LINES["awq"]
    }


def test_symmetric_weights_without_zero_points(case, made):
    config, tensors, expected = case("awq_sym")
    del tensors["m.qzeros"]
    found = scan(config, tensors)
    assert torch.equal(made(found, TensorsSource(tensors))["m.weight"].dequantize(torch.float16), expected)
    with pytest.raises(CheckpointError, match=r"m.weight needs the tensor m.qzeros"):
        scan({**config, "zero_point": True}, tensors)


def test_the_scale_of_an_activation_becomes_that_of_the_next_layer(case, made):
    config, tensors, expected = case("awq")
    scales = torch.linspace(0.5, 2, 64, dtype=torch.float32, device="cpu").half()
    named = {f"h.0.mlp.dense_4h_to_h.{key.removeprefix('m.')}": value for key, value in tensors.items()}
    source = TensorsSource({**named, "h.0.mlp.act.scales": scales})
    found = awq.scan(config, source)
    name = "h.0.mlp.dense_4h_to_h.weight"
    assert found.table == {name: "qint4 64x64 group=16 affine columns zeros"}
    assert "h.0.mlp.act.scales" in found.consumed
    weight = made(found, source)[name].dequantize()  # of activations that are not divided
    torch.testing.assert_close((weight * scales.float()).half(), expected, rtol=1e-3, atol=0)
    with pytest.raises(CheckpointError, match=r"h.0.mlp.act.scales is a scale of AutoAWQ.*no quantized layer after"):
        scan(config, {**tensors, "h.0.mlp.act.scales": scales})


# ---------------------------------------------------------------------- bad input


def test_symmetric_in_the_config_only(case, made):
    config, tensors, _ = case("awq")
    found = scan({**config, "zero_point": False}, tensors)
    with pytest.raises(CheckpointError, match=r"every zero point is 8; found \d+ and \d+ others"):
        made(found, TensorsSource(tensors))


def test_scales_that_are_nan(case, made):
    config, tensors, _ = case("awq")
    tensors["m.scales"][1, 5] = float("inf")
    with pytest.raises(CheckpointError, match=r"m.weight_scale holds NaN or Inf"):
        made(scan(config, tensors), TensorsSource(tensors))


@pytest.mark.parametrize("name", ["awq", "gemv"])
def test_missing_and_cut_tensors(case, name):
    config, tensors, _ = case(name)
    for part in tensors:
        with pytest.raises(CheckpointError):
            scan(config, {key: value for key, value in tensors.items() if key != part})
        for cut in (tensors[part][:-1], tensors[part][:, :-1]):
            if name == "gemv" and part == "m.qweight" and cut.shape[0] == tensors[part].shape[0]:
                continue  # one word is eight inputs fewer: the model's shape tells
            with pytest.raises(CheckpointError):
                scan(config, {**tensors, part: cut.contiguous()})


def test_the_other_version(case):
    config, tensors, _ = case("gemv")
    with pytest.raises(CheckpointError, match=r"m.qweight has \d+ words.*version is wrong"):
        scan({**config, "version": "gemm"}, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv_fast"}, "version is 'gemv_fast', which stores codes in the order of a GPU kernel"),
        ({"version": "marlin"}, "'marlin'"),
        ({"version": "exllama"}, "is no layout of files"),
        ({"version": "gemm2"}, "is not known here"),
        ({"backend": "llm-awq"}, "'llm-awq'"),
        ({"bits": 8}, "bits is 8, expected one of 4"),
        ({"group_size": 64}, "64 in a row with 4 scales, and the config says 4 bits in groups of 64"),
        ({"zero_point": "no"}, "zero_point is 'no'"),
    ],
)
def test_unknown_configs(case, changes, message):
    config, tensors, _ = case("awq")
    with pytest.raises(CheckpointError, match=message):
        scan({**config, **changes}, tensors)


def test_scales_behind_the_last_group_of_gemv(case, made):
    config, tensors, _ = case("gemv128")
    found = scan({**config, "group_size": 256}, tensors)
    with pytest.raises(CheckpointError, match=r"m.scales holds more than 1 scales a row.*group_size in the config"):
        made(found, TensorsSource(tensors))
