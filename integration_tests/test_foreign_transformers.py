"""A checkpoint that another library quantized, in Transformers: who opens it, and what works on it afterwards."""

import copy
import json
import logging
import shutil
import zlib

import pytest
import torch
from foreign_files import edit_config, write_gptq
from safetensors.torch import load_file, save_file
from test_joined_weights import MODELS
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint.foreign.readers import OUT_OF_REACH
from requanto.checkpoint.format import CheckpointError
from requanto.report.convert_foreign import convert_checkpoint
from requanto.report.inspect import inspect_directory

pytestmark = pytest.mark.usefixtures("exact")

IDS = torch.arange(12).view(1, -1)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small Llama in GPTQ's format, and its dequantized weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    directory = tmp_path_factory.mktemp("gptq")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory, write_gptq(directory)


@pytest.fixture
def damaged(original, tmp_path):
    """A copy to damage."""
    shutil.copytree(original[0], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def who(monkeypatch):
    """Sets ``requanto.settings.foreign`` for one test."""
    return lambda value: monkeypatch.setattr(requanto.settings, "foreign", value)


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_opened(model, floats, dtype=torch.float32):
    for name, values in floats.items():
        weight = model.get_parameter(name)
        assert isinstance(weight, QTensor), name
        assert weight.dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(weight.dequantize(), values), name


def test_it_opens_where_its_library_is_missing_with_a_line_in_the_log(original, caplog):
    directory, floats = original
    with caplog.at_level("INFO"):
        model = AutoModelForCausalLM.from_pretrained(directory)
    assert_opened(model, floats)
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in lines if "quantized by another library (gptq)" in line and "Requanto opens it" in line]
    ids = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert ids.shape == (1, 16)


def test_logits_are_those_of_the_dequantized_weights(original, tmp_path):
    directory, floats = original
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    shutil.copytree(directory, tmp_path / "float")
    edit_config(tmp_path / "float", quantization_config=None)

    def change(tensors):
        for key in [key for key in tensors if key.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")]:
            del tensors[key]
        tensors.update(floats)

    edit(tmp_path / "float", change)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "float").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_takes_the_dtype_that_is_asked_for(original, dtype):
    assert_opened(AutoModelForCausalLM.from_pretrained(original[0], dtype=dtype), original[1], dtype)


def test_never(original, who):
    who("never")
    with pytest.raises(ImportError, match=r"gptq|optimum"):
        AutoModelForCausalLM.from_pretrained(original[0])


def test_a_config_of_ours_asks_for_requanto_whatever_the_setting(original, who, caplog):
    who("never")
    model = AutoModelForCausalLM.from_pretrained(original[0], quantization_config=QuantoConfig())
    assert_opened(model, original[1])
    caplog.clear()
    AutoModelForCausalLM.from_pretrained(original[0], quantization_config=QuantoConfig(weights="int2", lm_head=True))
    assert "weights='int2', lm_head=True of quantization_config is not used" in caplog.text


def test_always_takes_it_from_a_library_that_would_open_it(original, who, monkeypatch, caplog):
    from requanto.integrations import transformers_foreign

    monkeypatch.setattr(transformers_foreign, "_reason", lambda *args: None)
    with pytest.raises(ImportError):  # its library's turn, which is not installed here
        AutoModelForCausalLM.from_pretrained(original[0])
    who("always")
    caplog.clear()
    assert_opened(AutoModelForCausalLM.from_pretrained(original[0]), original[1])
    assert "does not open it here" not in caplog.text


@pytest.mark.parametrize("value", ["yes", None, True])
def test_other_values_of_the_setting_are_refused(value):
    with pytest.raises(ValueError, match="'auto', 'always', 'never'"):
        requanto.settings.foreign = value


def test_saved_it_has_our_format_and_the_same_codes(original, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original[0])
    model.save_pretrained(tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format"]) == ("quanto", "requanto")
    assert_opened(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), original[1])


def test_a_state_dict_instead_of_files(original):
    config = AutoConfig.from_pretrained(original[0])
    state = load_file(original[0] / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert_opened(model, original[1])


def test_the_config_of_a_model_that_was_opened_opens_its_directory_again(original, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original[0])
    assert_opened(AutoModelForCausalLM.from_pretrained(original[0], config=model.config), original[1])
    model.save_pretrained(tmp_path)
    assert_opened(AutoModelForCausalLM.from_pretrained(tmp_path, config=model.config), original[1])


def test_a_part_of_the_model_loads(original):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(original[0])
    assert_opened(model, {name.removeprefix("model."): values for name, values in original[1].items()})


def test_on_disk_and_back(original, tmp_path):
    place = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    place |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    expected = AutoModelForCausalLM.from_pretrained(original[0])
    model = AutoModelForCausalLM.from_pretrained(original[0], device_map=place, offload_folder=tmp_path / "off")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


#: the order of a weight's columns by its name: as GPTQ's desc_act gives it, the same for weights of one input
ORDERS = {
    "none": lambda name: None,
    "inputs": lambda name: zlib.crc32(name.replace(".w3.", ".w1.").encode()),
    "each": lambda name: zlib.crc32(name.encode()),
}


@pytest.mark.parametrize("order", ORDERS)
def test_experts_are_joined(order, tmp_path, caplog):
    torch.manual_seed(0)
    MODELS["mixtral"]().save_pretrained(tmp_path)
    floats = write_gptq(tmp_path, only=".experts.", seed_of=ORDERS[order])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        # weights of one input in unlike orders have no order in common
        assert isinstance(experts.gate_up_proj, QTensor) is (order != "each")
        assert isinstance(experts.down_proj, QTensor)
        for expert in range(4):
            stored = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            gate, down, up = (floats[f"{stored}.w{number}.weight"] for number in (1, 2, 3))
            assert torch.equal(experts.gate_up_proj.dequantize()[expert], torch.cat([gate, up]))
            assert torch.equal(experts.down_proj.dequantize()[expert], down)
    assert ("cannot be joined without rounding" in caplog.text) is (order == "each")
    model(IDS)


@pytest.mark.parametrize("width", [64, 96])
def test_conv1d_layers_of_gpt2_are_stored_as_linear_ones(width, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "n_positions": 64, "n_embd": width, "n_layer": 1, "n_head": 4, "n_inner": width}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gptq")
    floats = write_gptq(tmp_path / "gptq", conv1d=".c_")
    convert_checkpoint(tmp_path / "gptq", tmp_path / "converted")
    for directory in (tmp_path / "gptq", tmp_path / "converted"):
        model = AutoModelForCausalLM.from_pretrained(directory)
        for name, values in floats.items():
            weight = model.get_parameter(name)
            assert isinstance(weight, QTensor)
            assert torch.equal(weight.dequantize(), values.t())
        model(IDS)


def test_lora_trains_and_merges_exactly(original):
    import peft

    model = AutoModelForCausalLM.from_pretrained(original[0])
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    loss = adapted(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if p.requires_grad)
    with torch.no_grad():
        before = adapted.eval()(IDS).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, before, rtol=1e-4, atol=1e-4)
    assert isinstance(merged.get_parameter("model.layers.0.self_attn.q_proj.weight"), QTensor)


def test_other_things_that_a_quantized_model_does(original):
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(original[0]))
    assert_opened(model, original[1])
    assert "int4" in str(requanto.explain(model))
    name = "model.layers.0.mlp.up_proj.weight"
    floats = AutoModelForCausalLM.from_pretrained(original[0]).dequantize()
    assert torch.equal(floats.get_parameter(name), original[1][name])


# ---------------------------------------------------------------------- the command line


def test_convert_writes_the_same_codes_without_the_model_class(original, tmp_path):
    edit_config(shutil.copytree(original[0], tmp_path / "odd"), architectures=["NoSuchModel"])
    result = convert_checkpoint(tmp_path / "odd", tmp_path / "ours")
    assert [(part.quantized, part.dequantized) for part in result.parts] == [(14, 0)]
    assert "GPTQ" in result.parts[0].format
    edit_config(tmp_path / "ours", architectures=["LlamaForCausalLM"])
    assert_opened(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), original[1])
    assert (tmp_path / "ours" / "generation_config.json").is_file()


def test_convert_into_a_folder_of_the_checkpoint_counts_its_own_files(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").stat().st_size
    result = convert_checkpoint(tmp_path / "model", tmp_path / "model" / "ours")
    assert result.bytes_before == weights
    assert result.bytes_after == (tmp_path / "model" / "ours" / "model.safetensors").stat().st_size


def test_convert_says_what_it_does_not_convert(original, tmp_path):
    with pytest.raises(ValueError, match="choose another"):
        convert_checkpoint(original[0], original[0])
    convert_checkpoint(original[0], tmp_path / "ours")
    with pytest.raises(ValueError, match="Requanto's format already"):
        convert_checkpoint(tmp_path / "ours", tmp_path / "again")
    LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path / "ours")).save_pretrained(tmp_path / "float")
    edit_config(tmp_path / "float", quantization_config=None)
    with pytest.raises(ValueError, match="is not quantized"):
        convert_checkpoint(tmp_path / "float", tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="no file"):
        convert_checkpoint(tmp_path / "none.gguf", tmp_path / "again")


def test_convert_leaves_out_what_describes_the_other_format(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "model")
    for name in ("hf_quant_config.json", "quantize_config.json", "quantization_config.json", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    convert_checkpoint(tmp_path / "model", tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert "tokenizer.json" in names
    assert not [name for name in names if "quant" in name and not name.startswith(".")]


def test_convert_does_not_call_a_pickle_a_float_model(damaged, tmp_path):
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*Pickles .* are not opened"):
        convert_checkpoint(damaged, tmp_path / "ours")


def test_a_conversion_that_fails_leaves_what_was_there(damaged, tmp_path):
    edit(damaged, lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"].fill_(float("nan")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        convert_checkpoint(damaged, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_inspect_tells_what_a_foreign_checkpoint_holds(original):
    report = inspect_directory(original[0])
    assert "GPTQ" in report.format
    weight = next(one for one in report.weights if one.name == "model.layers.0.mlp.up_proj.weight")
    assert (weight.dtype, weight.shape, weight.group_size) == ("int4", (128, 64), 32)
    assert weight.bits == 4 + 20 / 32
    assert report.total_bytes == sum(value.nbytes for value in load_file(original[0] / "model.safetensors").values())


# ---------------------------------------------------------------------- bad input


def refused(directory, match):
    with pytest.raises(CheckpointError, match=match):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=QuantoConfig())


def test_a_missing_tensor(damaged):
    edit(damaged, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
    refused(damaged, r"layers\.1\.mlp\.up_proj\.scales")


def test_scales_that_are_no_numbers(damaged):
    edit(damaged, lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"].fill_(float("nan")))
    refused(damaged, r"(?s)layers\.1\.mlp\.up_proj.*NaN.*up_proj\.scales")


def test_a_truncated_file(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((CheckpointError, OSError, ValueError), match=r"safetensors|truncated|incomplete"):
        AutoModelForCausalLM.from_pretrained(damaged, quantization_config=QuantoConfig())


@pytest.mark.parametrize("renamed", ["model.layers.1.mlp.down_proj.", ".mlp.down_proj."], ids=["one", "all"])
def test_renamed_tensors_give_no_random_weights(damaged, renamed):
    def change(tensors):
        for key in [key for key in tensors if renamed in key]:
            tensors[key.replace("down_proj", "out_proj")] = tensors.pop(key)

    edit(damaged, change)
    refused(damaged, r"layers\.\d\.mlp\.down_proj\.weight is not in the files.*mlp\.out_proj\.weight is in the files")


def test_a_lost_layer_gives_no_random_weights(damaged):
    edit(damaged, lambda tensors: [tensors.pop(key) for key in [*tensors] if ".layers.1.mlp.up_proj" in key])
    refused(damaged, r"layers\.1\.mlp\.up_proj\.weight is not in the files")


def test_a_head_that_the_files_lack_is_new(original):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(original[0], num_labels=3)
    assert model.score.weight.shape == (3, 64)
    assert_opened(model, original[1])


def test_floats_beside_codes(damaged):
    edit(damaged, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.ones(128, 64)}))
    refused(damaged, r"layers\.1\.mlp\.up_proj\.weight.*mixed")


def test_a_config_without_its_tensors(damaged):
    edit_config(damaged, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"})
    refused(damaged, r"awq|AWQ|qweight")


@pytest.mark.parametrize("method", sorted(OUT_OF_REACH))
def test_formats_out_of_reach_are_refused_by_name(damaged, method):
    edit_config(damaged, quantization_config={"quant_method": method})
    refused(damaged, f"{method}.*What reads it: ")


@pytest.mark.parametrize("method", ["exl3", "qtip"])
def test_formats_out_of_reach_that_transformers_does_not_know_give_no_random_weights(damaged, method):
    edit_config(damaged, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=f"{method}.*What reads it: "):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("asked", [{}, {"quantization_config": QuantoConfig()}])
def test_an_unknown_method_gives_no_random_weights(damaged, asked):
    edit_config(damaged, quantization_config={"quant_method": "quux"})
    with pytest.raises(CheckpointError, match=r"'quux', which Requanto does not know; it reads .*gptq"):
        AutoModelForCausalLM.from_pretrained(damaged, **asked)


def test_a_config_that_was_lost_gives_no_random_weights(damaged):
    edit_config(damaged, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"qweight and \d+ more.*quantization_config=QuantoConfig\(\)"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("scale", ["weight_scale", "SCB"])
def test_codes_that_have_the_name_of_the_weight_are_not_taken_for_it(damaged, scale):
    """Files of compressed-tensors' int8 or of LLM.int8() whose config was lost."""
    edit_config(damaged, quantization_config=None)
    state = LlamaForCausalLM(AutoConfig.from_pretrained(damaged)).state_dict()
    name = "model.layers.0.mlp.up_proj"
    state[f"{name}.weight"] = (state[f"{name}.weight"] * 100).to(torch.int8)
    state[f"{name}.{scale}"] = torch.ones(128, dtype=torch.float32)
    save_file(state, damaged / "model.safetensors", metadata={"format": "pt"})
    for asked in ({}, {"quantization_config": QuantoConfig()}):
        with pytest.raises(CheckpointError, match=rf"scales of weights \({name}\.{scale} and 0 more\)"):
            AutoModelForCausalLM.from_pretrained(damaged, **asked)


def test_a_config_in_a_file_beside_it(damaged, original, caplog):
    """quantize_config.json, as AutoGPTQ wrote it; and no file at all, which says too little."""
    config = json.loads((damaged / "config.json").read_text())["quantization_config"]
    edit_config(damaged, quantization_config=None)
    (damaged / "quantize_config.json").write_text(json.dumps(config))
    assert_opened(AutoModelForCausalLM.from_pretrained(damaged), original[1])
    assert "Transformers does not know the format" in caplog.text


def test_pickles_are_not_opened(damaged):
    torch.save(load_file(damaged / "model.safetensors"), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    refused(damaged, "is a pickle.*safe_serialization")
