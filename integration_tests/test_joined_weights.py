"""Experts that a checkpoint stores one by one, each quantized, in models that keep all of them in one parameter."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import requanto
from requanto import QTensor
from requanto.checkpoint.digests import digests_of
from requanto.checkpoint.format import flatten, rebuild, table_of
from requanto.config.config import QuantoConfig

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    ),
}


def write(model: torch.nn.Module, directory: Path, options: Callable[[str], dict] = lambda name: {}) -> dict:
    """Saves a model with each expert's weights quantized on their own.

    Args:
        options: further options of `QTensor.quantize` for a weight of that name.
    """
    model.save_pretrained(directory)
    made = {}
    for name, value in load_file(directory / "model.safetensors").items():
        made[name] = QTensor.quantize(value, "int4", group_size=32, **options(name)) if ".experts." in name else value
    config = QuantoConfig(weights="int4")
    config.record(table_of(made.items()), digests_of(made))
    save_file(flatten(made), directory / "model.safetensors", metadata={"format": "pt"})
    description = json.loads((directory / "config.json").read_text())
    description["quantization_config"] = config.to_dict()
    (directory / "config.json").write_text(json.dumps(description))
    return made


@pytest.mark.parametrize("name", MODELS)
def test_experts_stored_one_by_one_are_joined_without_rounding(name, tmp_path, float_arithmetic):
    torch.manual_seed(0)
    made = write(MODELS[name]().eval(), tmp_path / "q")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    experts = {n: p for n, p in loaded.named_parameters() if ".experts." in n}
    assert len(experts) == 4
    assert all(isinstance(p, QTensor) and p.dim() == 3 for p in experts.values())
    floats = {n: v.dequantize() if isinstance(v, QTensor) else v for n, v in made.items()}
    save_file(floats, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    description = json.loads((tmp_path / "q" / "config.json").read_text())
    del description["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(description))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    for n, p in experts.items():
        torch.testing.assert_close(p.dequantize(), expected.get_parameter(n), rtol=0, atol=0)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for n, p in experts.items():
        assert torch.equal(again.get_parameter(n).qdata, p.qdata)


def test_experts_of_unlike_types_become_float_with_a_line_in_the_log(tmp_path, caplog):
    torch.manual_seed(0)
    write(MODELS["mixtral"]().eval(), tmp_path, lambda n: {"symmetric": True} if ".experts.1." in n else {})
    with caplog.at_level("WARNING"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "cannot be joined without rounding" in caplog.text
    assert not any(isinstance(p, QTensor) for n, p in loaded.named_parameters() if ".experts." in n)


def test_a_damaged_expert_is_found(tmp_path):
    torch.manual_seed(0)
    write(MODELS["mixtral"]().eval(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(key for key in state if ".experts.2." in key and key.endswith("_qdata"))
    state[name][0, 0] ^= 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(requanto.CheckpointError, match=r"experts\.2\..*digest"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("left", ["experts.1.", ".up_proj.", "experts.0.w3."], ids=["expert", "part", "matrix"])
def test_experts_of_which_some_are_stored_as_floats_become_floats(name, left, tmp_path, caplog):
    left = {"mixtral": left.replace("up_proj", "w3"), "qwen3": left.replace("w3", "up_proj")}[name]
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    write(model, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    model.save_pretrained(tmp_path / "float")
    floats = load_file(tmp_path / "float" / "model.safetensors")
    description = json.loads((tmp_path / "q" / "config.json").read_text())
    for key in [key for key in floats if ".experts." in key]:
        parts = {
            part: tensors.pop(f"{key}_{part}") for part in ("qdata", "scale", "shift") if f"{key}_{part}" in tensors
        }
        if left in key:
            tensors[key] = floats[key]
            del description["quantization_config"]["tensors"][key], description["quantization_config"]["digests"][key]
        else:
            text = description["quantization_config"]["tensors"][key]
            floats[key] = rebuild(key, text, parts, torch.float32).dequantize()
            tensors |= {f"{key}_{part}": value for part, value in parts.items()}
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "q" / "config.json").write_text(json.dumps(description))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    for parameter, value in wanted.named_parameters():
        found = loaded.get_parameter(parameter)
        assert torch.equal(found.dequantize() if isinstance(found, QTensor) else found, value), parameter
    assert "are floats" in caplog.text
