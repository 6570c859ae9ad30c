"""bitsandbytes: files of its own layers (writers/bnb_files.py), equal to its own dequantized weights bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import bitsandbytes
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
LINES = {
    "nf4.weight": "qnf4 32x128 group=64",
    "nf4_double.weight": "qnf4 64x256 group=64",
    "nf4_sparse.weight": "qnf4 64x256 group=64 signed",
    "fp4_double.weight": "qfp4 32x128 group=64",
    "fp4_128.weight": "qfp4 32x256 group=128",
    "words.weight": "qnf4 32x128 group=64",
    "crossing.weight": "qnf4 8x96 group=32",
    "rows.weight": "qnf4 7x32",
    "experts.up_proj": "qnf4 2x32x64 axis=1",
}


@pytest.fixture
def four(written):
    folder = written("bnb_files")
    return load_file(folder / "4bit.safetensors"), load_file(folder / "4bit.expected.safetensors")


@pytest.fixture
def eight(written):
    folder = written("bnb_files")
    return load_file(folder / "8bit.safetensors"), load_file(folder / "8bit.expected.safetensors")


def scan(config, tensors):
    return bitsandbytes.scan(config, TensorsSource(tensors))


def test_four_bits_equal_the_library(four, made):
    tensors, expected = four
    found = scan(FOUR, tensors)
    assert found.table == LINES
    assert set(tensors) - found.consumed == {"nf4.bias", "norm.weight", "norm.bias"}
    assert list(found.floats) == ["tiny_groups.weight"]
    assert found.floats["tiny_groups.weight"].reason == "bitsandbytes' blocks of 64 cross its rows of 20 weights"
    weights = made(found, TensorsSource(tensors))
    for name, weight in weights.items():
        wanted = expected[name]
        dense = weight if name in found.floats else weight.dequantize(wanted.dtype)
        assert dense.dtype == wanted.dtype
        assert torch.equal(dense, wanted), name


def test_other_values_become_a_codebook(four, made):
    tensors, _ = four
    tensors["nf4.weight.quant_map"][3] += 0.01
    found = scan(FOUR, tensors)
    assert found.table["nf4.weight"] == "qcodebook4 32x128 group=64"
    for name in [name for name in found.weights if name != "nf4.weight"]:
        del found.weights[name]
    weight = made(found, TensorsSource(tensors))["nf4.weight"].dequantize()
    assert torch.equal(
        weight.view(-1, 64)[:, 0].abs() <= tensors["nf4.weight.absmax"], torch.ones(64, dtype=torch.bool)
    )
    wanted = bitsandbytes._dequantized(
        TensorsSource(tensors),
        {"codes": "nf4.weight", "absmax": "nf4.weight.absmax", "quant_map": "nf4.weight.quant_map"},
        bitsandbytes._State("nf4", torch.Size([32, 128]), torch.float32, 64, None, 1),
    )
    assert torch.equal(weight, wanted)


def test_eight_bits_equal_the_library_to_one_rounding(eight, made):
    tensors, expected = eight
    found = scan(EIGHT, tensors)
    assert found.table == {"m.weight": "qint8 32x128"}
    assert set(tensors) - found.consumed == {"m.bias"}
    assert "here inputs stay float" in found.weights["m.weight"].note
    weight = made(found, TensorsSource(tensors))["m.weight"].dequantize()
    # (code * SCB) / 127 there, code * (SCB / 127) here: each product rounds once more than the exact value
    assert float(((weight - expected["m.weight"]).abs() / expected["m.weight"].abs().clamp(min=1e-30)).max()) <= 2**-23


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_missing_and_cut_parts(four, part):
    tensors, _ = four
    whole = tensors.pop(f"nf4_double.weight.{part}")
    with pytest.raises(CheckpointError, match=rf"nf4_double.weight needs the tensor nf4_double.weight.{part}"):
        scan(FOUR, tensors)
    with pytest.raises(CheckpointError, match=rf"nf4_double.weight.{part} is .*expected"):
        scan(FOUR, {**tensors, f"nf4_double.weight.{part}": whole[:-1].clone()})


def test_codes_without_their_scales(four, eight):
    tensors, _ = four
    del tensors["nf4.weight.quant_state.bitsandbytes__nf4"]
    with pytest.raises(CheckpointError, match=r"nf4.weight is uint8, and its quant_state is not in the files"):
        scan(FOUR, tensors)
    del tensors["nf4.weight"]
    with pytest.raises(CheckpointError, match=r"nf4.weight.absmax has no quant_state"):
        scan(FOUR, tensors)
    tensors, _ = eight
    del tensors["m.SCB"]
    with pytest.raises(CheckpointError, match=r"m.weight is int8, and its SCB is not in the files"):
        scan(EIGHT, tensors)


def test_cut_codes(four):
    tensors, _ = four
    tensors["nf4.weight"] = tensors["nf4.weight"][:-1].clone()
    with pytest.raises(CheckpointError, match=r"nf4.weight is torch.uint8 \(2047, 1\), expected 2048 bytes"):
        scan(FOUR, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4"},
        {"blocksize": 0},
        {"blocksize": "64"},
        {"shape": [32, -128]},
        {"shape": None},
        {"dtype": "float8"},
        {"nested_offset": float("nan")},
        {"nested_blocksize": None},
    ],
)
def test_a_damaged_state(four, changes):
    tensors, _ = four
    name = "nf4_double.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=rf"{name} does not describe a weight of bitsandbytes"):
        scan(FOUR, tensors)


def test_a_state_that_is_no_json(four):
    tensors, _ = four
    tensors["nf4.weight.quant_state.bitsandbytes__nf4"].fill_(255)
    with pytest.raises(CheckpointError, match="does not describe"):
        scan(FOUR, tensors)


def test_scales_that_are_nan(four, made):
    tensors, _ = four
    tensors["nf4.weight.absmax"][5] = float("nan")
    found = scan(FOUR, tensors)
    found.weights = {"nf4.weight": found.weights["nf4.weight"]}
    with pytest.raises(CheckpointError, match=r"nf4.weight_scale holds NaN or Inf"):
        made(found, TensorsSource(tensors))


def test_layouts_of_old_kernels(eight):
    tensors, _ = eight
    tensors["m.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"m.weight_format is col_turing"):
        scan(EIGHT, tensors)


def test_config_and_tensors_disagree(four, eight):
    with pytest.raises(CheckpointError, match=r"says load_in_8bit, and crossing.weight.quant_state"):
        scan(EIGHT, four[0])
    with pytest.raises(CheckpointError, match=r"says load_in_4bit, and m.SCB"):
        scan(FOUR, eight[0])
    with pytest.raises(CheckpointError, match="load_in_4bit=False and load_in_8bit=False"):
        scan({"quant_method": "bitsandbytes"}, four[0])
    with pytest.raises(CheckpointError, match=r"no file holds a quant_state or SCB.*a pickle"):
        scan(FOUR, {"m.weight": torch.zeros(2, 2)})
    assert scan({**EIGHT, "llm_int8_has_fp16_weight": True}, {"m.weight": torch.zeros(2, 2)}).weights == {}
