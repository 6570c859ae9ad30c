"""HQQ: files of its own layers (writers/hqq_files.py) beside its own dequantized weights."""

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import hqq, readers
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError

CONFIG = {"quant_method": "hqq", "skip_modules": ["lm_head"]}
LINES = {
    "four": "qint4 32x128 group=64 affine",
    "four_row": "qint4 64x64 affine",
    "four_bf16": "qint4 64x128 group=32 affine",
    "as_float": "qint4 64x128 group=64 affine",
    "eight": "quint8 64x128 group=64 affine",
    "six": "qint6 64x128 group=64 affine",
    "five": "qint5 64x128 group=64 affine",
    "three": "qint3 64x96 group=32 affine",
    "three_as_float": "qint3 64x96 group=32 affine",
    "two": "qint2 64x128 group=16 affine",
    "ternary": "qint2 64x128 group=16 affine",
    "one": "quint1 64x128 group=16 affine",
    "crossing": "qint4 64x96 group=32 affine",
    "row": "qint4 64x128 affine",
    "tensor": "qint4 64x128 affine",
}


@pytest.fixture
def files(written):
    folder = written("hqq_files")
    return load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def scan(tensors, config=CONFIG):
    return hqq.scan(config, TensorsSource(tensors))


def one(tensors, name):
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def test_weights_equal_the_library_but_for_its_first_rounding(files, made):
    tensors, expected = files
    found = scan(tensors)
    assert found.table == {f"{name}.weight": line for name, line in LINES.items()}
    assert set(tensors) - found.consumed == {"four.bias"}
    weights = made(found, TensorsSource(tensors))
    for name, line in found.table.items():
        wanted = expected[name].float()
        # two roundings to 11 (8) bits there, none here
        digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 23}[expected[name].dtype]
        error = (weights[name].dequantize() - wanted).abs()
        assert bool((error <= 2.0 ** (1.01 - digits) * wanted.abs() + 2.0**-24).all()), (name, line)


def test_groups_along_the_other_axis_are_dequantized_as_the_library_does(files, made):
    tensors, expected = files
    found = scan(tensors)
    assert list(found.floats) == ["axis0.weight", "axis0_three.weight"]
    assert "axis=0" in found.floats["axis0.weight"].reason
    weights = made(found, TensorsSource(tensors))
    for name in found.floats:
        assert torch.equal(weights[name], expected[name]), name


def test_the_config_has_to_allow_what_the_tensors_say(files):
    tensors = one(files[0], "four")
    params = {"nbits": 4, "group_size": 64, "axis": 1}
    config = {**CONFIG, "quant_config": {"weight_quant_params": params}}
    assert scan(tensors, config).format == "HQQ, 4 bits, group size 64"
    by_layer = {
        "self_attn.q_proj": {"weight_quant_params": {**params, "nbits": 8}},
        "mlp": {"weight_quant_params": params},
    }
    assert list(scan(tensors, {**CONFIG, "quant_config": by_layer}).table) == ["four.weight"]
    config["quant_config"]["weight_quant_params"]["group_size"] = 32
    with pytest.raises(CheckpointError, match=r"four has 4 bits in groups of 64 along axis 1, and quant_config"):
        scan(tensors, config)


def test_files_without_a_config_are_recognized(files):
    assert readers.recognize({"model_type": "llama"}, TensorsSource(files[0])) == {"quant_method": "hqq"}
    assert hqq.recognize({}, TensorsSource({"m.W_q": torch.zeros(1), "m.weight": torch.zeros(1)})) is None


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("part", ["W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing"])
def test_missing_tensors(files, part):
    tensors = one(files[0], "four") | one(files[0], "three")
    del tensors[f"four.{part}"]
    with pytest.raises(CheckpointError, match=rf"four.weight needs the tensor four.{part}"):
        scan(tensors)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("packing", torch.tensor(list(b"4bit_u9"), dtype=torch.uint8), "packing '4bit_u9'"),
        ("packing", torch.tensor(list(b"2bit_u8"), dtype=torch.uint8), "nbits is 4, and packing 2bit_u8 holds 2 bits"),
        ("axis", torch.tensor(2), "axis 2"),
        ("group_size", torch.tensor(0), "group_size 0"),
        ("group_size", torch.tensor(32), "has 64 numbers, expected 128"),
        ("group_size", torch.tensor(60), "groups of 60 do not divide"),
        ("nbits", torch.tensor(3.0), "nbits is 3"),
        ("shape", torch.tensor([32, 64]), "expected 1024 bytes"),
        ("shape", torch.tensor([4096]), "expected the two sizes"),
        ("shape", torch.tensor([-32, -128]), "expected the two sizes"),
        ("compute_dtype", torch.tensor(list(b"__import__('os')"), dtype=torch.uint8), "compute_dtype is"),
        ("quant_zero", torch.tensor(1, dtype=torch.uint8), "quant_zero is set"),
        ("W_q", torch.zeros(31, 64, dtype=torch.uint8), "expected 2048 bytes"),
        ("zero", torch.zeros(63, 1), "four.zero is float32"),
    ],
)
def test_damaged_descriptions(files, part, value, message):
    tensors = one(files[0], "four")
    tensors[f"four.{part}"] = value
    with pytest.raises(CheckpointError, match=message):
        scan(tensors)


def test_scales_that_are_nan_and_codes_that_are_too_large(files, made):
    tensors = one(files[0], "six")
    tensors["six.scale"][7] = float("nan")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        made(scan(tensors), TensorsSource(tensors))
    tensors = one(files[0], "five")
    tensors["five.W_q"][7, 7] = 32
    with pytest.raises(CheckpointError, match=r"five.W_q holds the code 32, which has more than 5 bits"):
        made(scan(tensors), TensorsSource(tensors))


def test_pickles_are_refused():
    with pytest.raises(CheckpointError, match=r"qmodel.pt is a pickle.*save_to_safetensors"):
        scan({"m.weight": torch.zeros(2, 2)})
