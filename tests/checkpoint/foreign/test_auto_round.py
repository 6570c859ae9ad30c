"""AutoRound: files that auto-round wrote (tests/data/auto_round/make.py), equal to what its own layers dequantize."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import auto_round, readers
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError

DATA = Path(__file__).parents[2] / "data" / "auto_round"
CASES = json.loads((DATA / "cases.json").read_text())
Q, K = (f"model.layers.0.self_attn.{layer}.weight" for layer in ("q_proj", "k_proj"))
LINES = {
    "sym4": "qint4 64x64 group=32 signed",
    "sym8_row": "qint8 64x64 signed",
    "asym2": "qint2 64x64 group=32 affine zeros",
    "asym5": "qint5 64x64 group=32 affine zeros",
    "asym4_awq": "qint4 64x64 group=32 affine zeros",
    "asym4_gptqmodel": "qint4 64x64 group=32 affine zeros",
    "mixed": "qint4 64x64 group=32 signed",
    "gptq3": "qint3 64x64 group=32 affine zeros",
    "awq_sym": "qint4 64x64 group=32 signed",
    "mxfp4": "qmxfp4 64x64 group=32",
    "mxfp8": "qmxfp8_e4m3 64x64 group=32",
    "nvfp4": "qnvfp4 64x64 group=16",
    "fp8": "qfloat8_e4m3fn 64x64",
    "fp8_static": "qfloat8_e4m3fn 64x64",
}


def case(name):
    return CASES[name]["config"], load_file(DATA / f"{name}.safetensors")


def sha256(weight):
    return hashlib.sha256((weight + 0).contiguous().view(torch.int16).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", LINES)
def test_weights_equal_auto_rounds_own_layers(made, name):
    config, tensors = case(name)
    source = TensorsSource(tensors)
    found = readers.scan(config, source)
    assert found.table == {Q: LINES[name], K: "qint8 64x64 signed" if name == "mixed" else LINES[name]}
    assert found.consumed == set(tensors)
    for weight, value in made(found, source).items():
        expected = CASES[name]["weights"][weight]
        assert sha256(value.dequantize(getattr(torch, expected["dtype"]))) == expected["sha256"], weight


def test_static_inputs():
    config, tensors = case("fp8_static")
    found = auto_round.scan(config, TensorsSource(tensors))
    (first, *_), scales = sorted(found.activations), {}
    for module, activation in found.activations.items():
        scales[module] = activation.build(TensorsSource(tensors))
        assert (activation.type, scales[module].dtype, scales[module].shape) == ("qfloat8_e4m3fn", torch.float32, ())
    assert float(scales[first]) == float(tensors[f"{first}.input_scale"])
    assert {weight.note for weight in found.weights.values()} == {""}


@pytest.mark.parametrize(("name", "kind"), [("mxfp4", "mx_fp of 4 bits"), ("nvfp4", "nv_fp4_with_static_gs of 4 bits")])
def test_inputs_that_stay_float_are_told(name, kind):
    config, tensors = case(name)
    (note,) = {weight.note for weight in auto_round.scan(config, TensorsSource(tensors)).weights.values()}
    assert "inputs stay float" in note
    assert kind in note


def test_blocks_of_float8(made):
    codes = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5, 2.0, 1.0], [0.25, 1.0, 3.0]], dtype=torch.bfloat16)
    source = TensorsSource({"m.weight": codes, "m.weight_scale_inv": scale})
    config = {"quant_method": "auto-round", "data_type": "fp", "bits": 8, "group_size": [32, 32], "act_bits": 8}
    weight = made(auto_round.scan(config, source), source)["m.weight"].dequantize()
    wanted = codes.float() * scale.float().repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(weight, wanted)


def test_its_mlx_files_are_read_as_such(written):
    tensors = load_file(written("mlx_files") / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if key.startswith("affine4.")}
    config = {"quant_method": "auto-round", "packing_format": "mlx", "bits": 4, "group_size": 64, "data_type": "int"}
    found = auto_round.scan(config, TensorsSource(tensors))
    assert found.table == {"affine4.weight": "qint4 32x128 group=64 affine signed"}
    own = {"affine4": {"bits": 8}}
    with pytest.raises(CheckpointError, match=r"affine4.scales is"):
        auto_round.scan({**config, "extra_config": own}, TensorsSource(tensors))


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sym4", {"packing_format": "auto_round:exllamav2"}, "cannot tell how zero points are stored"),
        ("sym4", {"packing_format": None}, "packing_format is None"),
        ("sym4", {"packing_format": "auto_round:auto_awq"}, "has 64 words in a row for 64 outputs"),
        ("sym4", {"rotation_config": {"hadamard_type": "hadamard"}}, "rotation_config is"),
        ("sym4", {"spinquant_config": {"r1": True}}, "spinquant_config is"),
        ("sym4", {"act_bits": 8}, "act_bits is 8 for data_type int"),
        ("sym4", {"bits": 3}, "codes of 4 bits, 64 in a row with 2 scales, and the config says 3 bits in groups of 32"),
        ("sym4", {"data_type": "int_asym_dq"}, "data_type is 'int_asym_dq'"),
        ("mixed", {"extra_config": {}}, "codes of 8 bits, 64 in a row with 1 scales, and the config says 4 bits"),
        ("mixed", {"extra_config": [1]}, "extra_config is"),
        ("mxint4", {}, "data_type is 'mx_int'"),
        ("mxfp4", {"extra_config": {"x": {"data_type": "mx_int"}}}, "extra_config has data types"),
        ("mxfp4", {"data_type": "nvfp4_v2"}, "data_type is 'nvfp4_v2'"),
    ],
)
def test_configs_that_do_not_fit(name, changes, message):
    config, tensors = case(name)
    with pytest.raises(CheckpointError, match=message):
        auto_round.scan({**config, **changes}, TensorsSource(tensors))


@pytest.mark.parametrize("layout", ["auto_round", "auto_round:gptqmodel"])
def test_symmetric_weights_of_the_other_zero_points(made, layout):
    config, tensors = case("sym4")
    found = auto_round.scan({**config, "packing_format": layout}, TensorsSource(tensors))
    with pytest.raises(CheckpointError, match=r"every zero point is 8; found 7 and 127 others of 128"):
        made(found, TensorsSource(tensors))


@pytest.mark.parametrize("name", ["sym4", "asym4_awq", "mxfp4", "mxfp8", "nvfp4", "fp8"])
def test_missing_tensors(name):
    config, tensors = case(name)
    for key in [key for key in tensors if "q_proj" in key and not key.endswith(("g_idx", "input_global_scale"))]:
        rest = {other: value for other, value in tensors.items() if other != key}
        with pytest.raises(CheckpointError):
            auto_round.scan(config, TensorsSource(rest))


def test_nothing_quantized():
    config, _ = case("mxfp4")
    with pytest.raises(CheckpointError, match="no file holds a weight_packed"):
        auto_round.scan(config, TensorsSource({"m.weight": torch.zeros(2, 2)}))
