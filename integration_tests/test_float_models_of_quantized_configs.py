"""Float models whose config came from a quantized one: config.json says nothing of quantization, and they reload equal.

The model that the config came from keeps its own. A part of a quantized model saved from memory is a checkpoint of its own.
"""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from small_wholes import shrunk
from tiny_diffusers import TINY as DIFFUSERS

from requanto import QTensor, QuantoConfig
from requanto.integrations.conversion import dequantize_


def same(a: Any, b: Any) -> bool:
    left, right = (dict(model.named_parameters()) for model in (a, b))
    plain = lambda p: p.dequantize() if isinstance(p, QTensor) else p  # noqa: E731
    return left.keys() == right.keys() and all(
        type(p) is type(right[name]) and torch.equal(plain(p), plain(right[name])) for name, p in left.items()
    )


def stored(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for cls in (tf.LlamaForCausalLM, tf.CLIPModel):
        shrunk(cls).save_pretrained(folder / "float")
        config = QuantoConfig(weights="int8")
        cls.from_pretrained(folder / "float", quantization_config=config).save_pretrained(folder / cls.__name__)
    return folder


@pytest.fixture
def quantized(saved: Path) -> Any:
    return tf.LlamaForCausalLM.from_pretrained(saved / "LlamaForCausalLM")


def by_auto(model: Any, folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(folder / "LlamaForCausalLM"))


def base_by_auto(model: Any, folder: Path) -> Any:
    return tf.AutoModel.from_config(model.config)


def whole_of_parts(model: Any, folder: Path) -> Any:
    return tf.AutoModel.from_config(tf.AutoConfig.from_pretrained(folder / "CLIPModel"))


def by_class(model: Any, folder: Path) -> Any:
    return type(model)(model.config)


def of_a_copy(model: Any, folder: Path) -> Any:
    return type(model)(copy.deepcopy(model.config))


def dequantized(model: Any, folder: Path) -> Any:
    return tf.LlamaForCausalLM.from_pretrained(folder / "LlamaForCausalLM").dequantize()


def dequantized_in_place(model: Any, folder: Path) -> Any:
    return dequantize_(tf.LlamaForCausalLM.from_pretrained(folder / "LlamaForCausalLM"))


def by_hand(model: Any, folder: Path) -> Any:
    config = tf.AutoConfig.from_pretrained(folder / "LlamaForCausalLM")
    config.quantization_config = {"quant_method": "quanto", "weights": "int8"}
    return tf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "make", [by_auto, base_by_auto, whole_of_parts, by_class, of_a_copy, dequantized, dequantized_in_place, by_hand]
)
def test_saves_and_reloads_as_float(make, quantized, saved, tmp_path):
    model = make(quantized, saved)
    model.save_pretrained(tmp_path / "out")
    assert stored(tmp_path / "out") is None
    again = type(model).from_pretrained(tmp_path / "out")
    assert same(model, again)
    assert not any(isinstance(p, QTensor) for p in again.parameters())
    # The one whose config it was is quantized still, and says so.
    quantized.save_pretrained(tmp_path / "quantized")
    assert stored(tmp_path / "quantized")["tensors"].keys() == quantized.config.quantization_config.tensors.keys()
    assert same(quantized, tf.LlamaForCausalLM.from_pretrained(tmp_path / "quantized"))


def test_merged_adapters_stay_quantized(quantized, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(quantized, config).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert same(merged, tf.LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_part_saved_from_memory(saved, tmp_path):
    whole = tf.CLIPModel.from_pretrained(saved / "CLIPModel")
    before = whole.config.quantization_config
    for name, part in (("text", whole.text_model), ("vision", whole.vision_model)):
        part.save_pretrained(tmp_path / name)
        assert same(part, type(part).from_pretrained(tmp_path / name))
    base = tf.LlamaForCausalLM.from_pretrained(saved / "LlamaForCausalLM")
    base.model.save_pretrained(tmp_path / "base")  # its config is the whole model's too
    assert same(base.model, tf.LlamaModel.from_pretrained(tmp_path / "base"))
    assert whole.config.quantization_config is before
    for model in (whole, base):
        model.save_pretrained(tmp_path / "whole")
        table = {name for name, p in model.named_parameters() if isinstance(p, QTensor)}
        assert stored(tmp_path / "whole")["tensors"].keys() == table
        assert same(model, type(model).from_pretrained(tmp_path / "whole"))


def test_diffusers(tmp_path):
    DIFFUSERS["flux"].make(torch.float32).save_pretrained(tmp_path / "float")
    cls = type(DIFFUSERS["flux"].make(torch.float32))
    quantized = cls.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig(weights="int8"))
    quantized.save_pretrained(tmp_path / "int8")
    configs = [quantized.config, copy.deepcopy(quantized.config), cls.load_config(tmp_path / "int8")]
    models = [cls.from_config(config) for config in configs]
    models.append(cls.from_pretrained(tmp_path / "int8").dequantize())
    for model in models:
        model.save_pretrained(tmp_path / "out")
        assert stored(tmp_path / "out") is None
        assert same(model, cls.from_pretrained(tmp_path / "out"))
    quantized.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(tmp_path / "int8")
