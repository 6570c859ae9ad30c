"""Checkpoints of compressed-tensors, written by the library: codes, values, activations, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from requanto import QTensor
from requanto.checkpoint.foreign.readers import scan
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild
from requanto.dtypes.bit_packing import unpack
from requanto.report.inspect import inspect_directory

DATA = Path(__file__).parent / "data"
#: module -> the line of its weight
LINES = {
    **{f"int{b}_group": f"qint{b} 24x96 group=32" for b in range(2, 9)},
    **{f"int{b}_zeros": f"qint{b} 24x96 group=32 affine zeros" for b in range(2, 8)},
    "int8_zeros": "quint8 24x96 group=32 affine zeros",
    "int1_group": "quint1 24x96 group=32 affine",
    "int4_channel": "qint4 24x100",
    "int4_channel_zeros": "qint4 20x100 affine zeros",
    "int4_tensor": "qint4 24x96",
    "int4_tensor_zeros": "qint4 24x96 affine zeros",
    "int3_odd": "qint3 23x90 group=30 affine zeros",
    "int4_token8": "qint4 24x96 group=32 activation=qint8",
    "w8a8_token": "qint8 24x96 activation=qint8",
    "w8a8_zeros": "quint8 24x96 affine zeros",
    "w8a8_static": "qint8 24x96",
    "w4_in_bytes": "qint4 24x96 group=32 activation=qint8",
    "int8_block": "qint8 40x96 group=32",
    "fp8_token": "qfloat8_e4m3fn 24x96 activation=qfloat8_e4m3fn",
    "fp8_static": "qfloat8_e4m3fn 24x96",
    "fp8_block": "qfloat8_e4m3fn 40x160 group=32",
    "fp8_group": "qfloat8_e4m3fn 24x96 group=48",
    "nvfp4": "qnvfp4 24x96 group=16",
    "mxfp4": "qmxfp4 24x96 group=32",
    "mxfp6": "qmxfp6_e2m3 24x96 group=32",
    "mxfp8": "qmxfp8_e4m3 24x96 group=32",
}
#: The library divides a scale by the tensor's number, and we multiply by its reciprocal: float32's last bit may differ.
ROUNDED = {"nvfp4": 2**-23}


@pytest.fixture(scope="module")
def checkpoint(written):
    """(config, tensors, what the library decompresses)."""
    folder = written("ct")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config, load_file(folder / "model.safetensors"), load_file(folder / "reference.safetensors")


@pytest.fixture(scope="module")
def llama(written):
    folder = written("ct") / "model"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config, load_file(folder / "model.safetensors"), load_file(folder / "reference.safetensors")


def read(config, tensors, module) -> QTensor:
    source = TensorsSource(tensors)
    weight = scan(config, source).weights[f"{module}.weight"]
    return rebuild(f"{module}.weight", weight.text, weight.build(source), torch.float32)


def group_of(config, module) -> dict:
    return next(group for group in config["config_groups"].values() if group["targets"] == [module])


def only(checkpoint, module) -> tuple[dict, dict]:
    """The config and tensors of one module."""
    config, tensors, _ = checkpoint
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
    return json.loads(json.dumps({**config, "config_groups": {"it": group_of(config, module)}})), tensors


@pytest.mark.parametrize("module", LINES)
def test_values_are_those_of_the_library(checkpoint, module):
    config, tensors, reference = checkpoint
    config, tensors = only(checkpoint, module)
    found = scan(config, TensorsSource(tensors))
    assert found.table == {f"{module}.weight": LINES[module]}
    assert found.consumed == set(tensors)
    values = read(config, tensors, module).dequantize()
    expected = reference[module]
    if module in ROUNDED:
        torch.testing.assert_close(values, expected.float(), rtol=2**-8, atol=0)
        assert ((values.bfloat16() != expected.bfloat16()).float().mean()) < 0.01
    elif expected.dtype == torch.float32:  # our float32 form of affine codes adds scale * zero in another order
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 if "zeros" in LINES[module] else 0)
    else:
        assert torch.equal(values.to(expected.dtype), expected)


def test_all_modules_are_read_at_once(checkpoint):
    config, tensors, _ = checkpoint
    found = scan(config, TensorsSource(tensors))
    assert found.table == {f"{module}.weight": text for module, text in LINES.items()}
    assert found.consumed == set(tensors)
    assert "pack-quantized, 3 bits" in found.format


@pytest.mark.parametrize("module", ["int4_group", "w8a8_token", "fp8_token", "nvfp4", "mxfp4", "mxfp8"])
def test_bytes_that_are_equal_are_not_copied(checkpoint, module):
    config, tensors = only(checkpoint, module)
    found = scan(config, TensorsSource(tensors)).weights[f"{module}.weight"]
    stored = tensors.get(f"{module}.weight_packed", tensors.get(f"{module}.weight"))
    assert found.build(TensorsSource(tensors))["qdata"].data_ptr() == stored.data_ptr()


def test_activations(checkpoint):
    config, tensors, _ = checkpoint
    source = TensorsSource(tensors)
    found = scan(config, source)
    assert {name: one.type for name, one in found.activations.items()} == {
        "w8a8_static": "qint8",
        "fp8_static": "qfloat8_e4m3fn",
    }
    assert torch.equal(found.activations["fp8_static"].build(source), torch.tensor(0.0625))
    notes = {name.removesuffix(".weight"): weight.note for name, weight in found.weights.items() if weight.note}
    assert set(notes) == {"w8a8_zeros", "fp8_block", "nvfp4", "mxfp4"}
    assert "int8, dynamic, one scale for each token, asymmetric" in notes["w8a8_zeros"]
    assert "float8, dynamic, one scale for each group" in notes["fp8_block"]


def test_output_activations_stay_float_and_say_so(checkpoint):
    config, tensors = only(checkpoint, "int4_group")
    config["config_groups"]["it"]["output_activations"] = {"num_bits": 8, "strategy": "tensor"}
    tensors = {**tensors, "int4_group.output_scale": torch.ones(1), "int4_group.output_zero_point": torch.zeros(1)}
    found = scan(config, TensorsSource(tensors))
    assert found.consumed == set(tensors)
    assert "outputs stay float" in found.weights["int4_group.weight"].note


# ------------------------------------------------------------------ a model: classes, patterns, what is ignored


def test_groups_of_patterns_and_classes(llama):
    config, tensors, reference = llama
    cache = {f"model.layers.{i}.self_attn.{part}_scale": torch.ones(1) for i in (0, 1) for part in "kv"}
    tensors = tensors | cache
    source = TensorsSource(tensors)
    found = scan(config, source)
    assert {name.removesuffix(".weight") for name in found.weights} == set(reference)
    assert found.table["model.layers.0.self_attn.q_proj.weight"] == "qfloat8_e4m3fn 64x64"
    assert found.table["model.layers.0.mlp.up_proj.weight"] == "qint4 96x64 group=32"
    assert "model.layers.1.mlp.up_proj.weight" not in found.weights
    assert set(found.activations) == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}
    assert set(cache) <= found.dropped
    assert "key-value cache" in found.format
    assert {name for name in tensors if name not in found.consumed} == {
        *(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"model.layers.{i}.{norm}_layernorm.weight" for i in (0, 1) for norm in ("input", "post_attention")),
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    }
    for name, weight in found.weights.items():
        values = rebuild(name, weight.text, weight.build(source), torch.bfloat16).dequantize()
        assert torch.equal(values, reference[name.removesuffix(".weight")])


def test_files_are_read_as_tensors_are(written, llama):
    config, _, reference = llama
    source = FilesSource([written("ct") / "model" / "model.safetensors"])
    name = "model.layers.0.mlp.down_proj.weight"
    weight = scan(config, source).weights[name]
    values = rebuild(name, weight.text, weight.build(source), torch.bfloat16).dequantize()
    assert torch.equal(values, reference[name.removesuffix(".weight")])


def test_embeddings_have_a_group_of_their_own(llama):
    config, tensors = dict(llama[0]), dict(llama[1])
    codes = torch.arange(-64, 64, dtype=torch.int8).repeat(32).reshape(64, 64)
    tensors["model.embed_tokens.weight"] = codes
    tensors["model.embed_tokens.weight_scale"] = torch.full((64, 1), 0.5)
    embedding = {
        "targets": ["Embedding"],
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
        "format": "int-quantized",
    }
    config["config_groups"] = {**config["config_groups"], "embedding": embedding}
    found = scan(config, TensorsSource(tensors))
    assert found.table["model.embed_tokens.weight"] == "qint8 64x64"
    assert found.table["model.layers.0.mlp.up_proj.weight"] == "qint4 96x64 group=32"


# ------------------------------------------------------------------ older versions


def test_inspect_tells_the_weights(written):
    report = inspect_directory(written("ct") / "model")
    assert report.format.startswith("compressed-tensors")
    assert {"int4"} < {weight.dtype for weight in report.weights if weight.name.endswith("weight")}
    assert not any("weight_" in weight.name for weight in report.weights)
    assert report.quantized_bytes > 0


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_nested_config_is_read(checkpoint, key):
    config, tensors = only(checkpoint, "int4_group")
    nested = {"quant_method": "compressed-tensors", key: {k: v for k, v in config.items() if k != "quant_method"}}
    assert scan(nested, TensorsSource(tensors)).table == {"int4_group.weight": LINES["int4_group"]}


def test_the_oldest_configs_are_recognized(checkpoint):
    from requanto.checkpoint.foreign.compressed_tensors import recognize

    config, tensors = only(checkpoint, "int4_group")
    description = {"compression_config": {k: v for k, v in config.items() if k != "quant_method"}}
    found = recognize(description, TensorsSource(tensors))
    assert scan(found, TensorsSource(tensors)).table == {"int4_group.weight": LINES["int4_group"]}
    assert recognize({}, TensorsSource(tensors)) is None


@pytest.fixture(scope="module")
def old():
    """(config, tensors, values) of version 0.17.1, written by writers/ct_old.py."""
    source = FilesSource([DATA / "ct_0_17_1.safetensors"])
    tensors = {name: source[name] for name in source if not name.startswith("reference.")}
    reference = {name.partition(".")[2]: source[name] for name in source if name.startswith("reference.")}
    return json.loads(source.metadata["quantization_config"]), tensors, reference


@pytest.mark.parametrize("module", ["int3", "int5", "int6", "int7"])
def test_words_of_whole_codes(old, module):
    config, tensors = only(old, module)
    assert torch.equal(read(config, tensors, module).dequantize().bfloat16(), old[2][module])


@pytest.mark.parametrize("module", ["order4", "order4_zeros", "order3_zeros"])
def test_columns_in_another_order(old, module):
    config, tensors = only(old, module)
    assert scan(config, TensorsSource(tensors)).table[f"{module}.weight"].endswith(" order")
    assert torch.equal(read(config, tensors, module).dequantize().bfloat16(), old[2][module])


def test_a_version_tells_packings_apart_where_the_number_of_words_does_not(checkpoint):
    """90 codes of 3 bits take 9 words in both."""
    config, tensors = only(checkpoint, "int3_odd")
    dense = read(config, tensors, "int3_odd").codes()
    config["version"] = "0.17.1"
    assert not torch.equal(read(config, tensors, "int3_odd").codes(), dense)
    del config["version"]
    with pytest.raises(CheckpointError, match="90 codes of 3 bits take 9 words in both packings"):
        read(config, tensors, "int3_odd")


def test_zero_points_that_are_not_packed(checkpoint):
    config, tensors = only(checkpoint, "int4_zeros")
    expected = read(config, tensors, "int4_zeros")
    zeros = unpack(expected._storage.parts["shift"], 4, 3).to(torch.int8) - 8
    plain = {**tensors, "int4_zeros.weight_zero_point": zeros}
    assert torch.equal(read(config, plain, "int4_zeros").dequantize(), expected.dequantize())
    plain["int4_zeros.weight_zero_point"] = zeros * 0 + 9
    with pytest.raises(CheckpointError, match=r"weight_zero_point holds 9 to 9, expected whole numbers from -8 to 7"):
        read(config, plain, "int4_zeros")


def test_zero_points_of_symmetric_weights_must_be_zero(checkpoint):
    config, tensors = only(checkpoint, "int4_group")
    zeros = torch.zeros(24, 3, dtype=torch.int8)
    tensors = {**tensors, "int4_group.weight_zero_point": zeros}
    read(config, tensors, "int4_group")
    with pytest.raises(CheckpointError, match="is not 0, but the config says symmetric=True"):
        read(config, {**tensors, "int4_group.weight_zero_point": zeros + 1}, "int4_group")


@pytest.mark.parametrize("stored", [torch.arange(96) // 32, torch.full((96,), -1)])
def test_act_order_that_changes_nothing(checkpoint, stored):
    config, tensors = only(checkpoint, "int4_group")
    expected = read(config, tensors, "int4_group").dequantize()
    tensors = {**tensors, "int4_group.weight_g_idx": stored.to(torch.int32)}
    found = scan(config, TensorsSource(tensors))
    assert found.table == {"int4_group.weight": LINES["int4_group"]}
    assert torch.equal(read(config, tensors, "int4_group").dequantize(), expected)


def test_pairs_of_codes_have_the_shape_that_torch_shows(tmp_path):
    """safetensors counts the codes of F4, torch the bytes."""
    codes = torch.zeros(2, 16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"codes": codes}, tmp_path / "a.safetensors")
    source = FilesSource([tmp_path / "a.safetensors"])
    assert source.header("codes").shape == source["codes"].shape == (2, 16)
