"""Scales in few bits and of columns, rotated and corrected weights in both libraries: quantized, saved, loaded, moved."""

import json

import accelerate
import pytest
import torch
import transformers as tf
from made_weights import with_foreign_weights
from tiny_diffusers import TINY as TINY_DIFFUSERS
from tiny_models import TINY, output, save_tiny

from requanto import QTensor, QuantoConfig
from requanto.integrations.diffusers_hooks import load_file, save_file
from requanto.report.inspect import inspect_directory

#: by name, the options of a QuantoConfig and a word of the line that describes such a weight
OPTIONS = {
    "scales in 8 bits": ({"weights": "int4", "group_size": 16, "scale_bits": 8, "column_scale": False}, "scales=8"),
    "rotated": ({"weights": "int4", "rotation": 16, "column_scale": False}, "rotation=16"),
    "corrected": (
        {"weights": "int2", "low_rank": 4, "scale_bits": 8, "group_size": 16, "column_scale": False},
        "rank=4",
    ),
    "scales in 4 bits": ({"weights": "int2", "group_size": 16, "scale_bits": 4, "column_scale": False}, "scales=4"),
    "scales of columns": ({"weights": "int4", "group_size": 16, "column_scale": "root"}, "columns"),
}


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("float"))


def load(directory, **options):
    return tf.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def answer(model):
    return output(model, TINY["llama"].inputs())


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", OPTIONS)
def test_transformers_there_and_back(name, float_dir, tmp_path):
    options, word = OPTIONS[name]
    model = load(float_dir, quantization_config=QuantoConfig(**options))
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == (3 if word == "columns" else 2)
    assert all(word in line.split() for line in stored["tensors"].values())
    again = load(tmp_path / "one")
    assert torch.equal(answer(again), answer(model))
    again.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    found = {w.name: w.bytes for w in inspect_directory(tmp_path / "one").weights}
    assert found["model.layers.0.mlp.up_proj.weight"] == model.model.layers[0].mlp.up_proj.weight.nbytes


def test_forms_of_other_programs_there_and_back(float_dir, tmp_path):
    model = with_foreign_weights(load(float_dir, quantization_config=QuantoConfig(weights="int4")))
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 4
    assert {word for line in stored["tensors"].values() for word in line.split()} >= {"signed", "block=64", "order"}
    again = load(tmp_path / "one")
    wanted = answer(model)
    assert torch.isfinite(wanted).all()
    assert torch.equal(answer(again), wanted)
    again.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert torch.equal(answer(accelerate.disk_offload(again, tmp_path / "off", execution_device="cpu")), wanted)


def test_a_module_may_differ(float_dir, tmp_path):
    modules = {"*.mlp": {"scale_bits": 4, "column_scale": "std"}}
    config = QuantoConfig(weights="int4", group_size=16, column_scale=False, modules=modules)
    model = load(float_dir, quantization_config=config)
    model.save_pretrained(tmp_path)
    layer = load(tmp_path).model.layers[0]
    assert (layer.mlp.up_proj.weight.scale_bits, layer.self_attn.q_proj.weight.scale_bits) == (4, None)
    assert layer.mlp.up_proj.weight.column.shape == (64,)
    assert layer.self_attn.q_proj.weight.column is None


def test_what_version_1_can_say_is_written_as_version_1(float_dir, tmp_path):
    load(float_dir, quantization_config=QuantoConfig(weights="int4", column_scale=False)).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 1
    assert "scale_bits" not in stored


@pytest.mark.parametrize("name", OPTIONS)
def test_offloaded_to_disk_it_is_the_same(name, float_dir, tmp_path):
    model = load(float_dir, quantization_config=QuantoConfig(**OPTIONS[name][0]))
    wanted = answer(model)
    assert torch.equal(answer(accelerate.disk_offload(model, tmp_path, execution_device="cpu")), wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_diffusers_there_and_back(name, tmp_path):
    tiny, (options, word) = TINY_DIFFUSERS["flux"], OPTIONS[name]
    tiny.make().save_pretrained(tmp_path / "float")
    model = tiny.cls.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig(**options))
    model.save_pretrained(tmp_path / "one")
    again = tiny.cls.from_pretrained(tmp_path / "one")
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert any(isinstance(parameter, QTensor) for parameter in first.values())
    assert all(torch.equal(parameter, second[key]) for key, parameter in first.items())
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == (3 if word == "columns" else 2)
    assert word in next(iter(stored["tensors"].values()))
    # Group offloading to disk keeps its own files.
    quantized = {key: value for key, value in first.items() if isinstance(value, QTensor)}
    save_file(quantized, str(tmp_path / "group.safetensors"))
    loaded = load_file(str(tmp_path / "group.safetensors"))
    assert all(torch.equal(loaded[key], value) for key, value in quantized.items())
