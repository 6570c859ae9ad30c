"""A class that reads a checkpoint saved by another one: towers and text models of multimodal checkpoints, other heads.

What the float checkpoint gives by the library's own renamings, the quantized one gives too: the same weights, the same ones
missing. Where the float checkpoint leaves layers random, the quantized one is refused.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from small_wholes import classes_beside, shrunk
from tiny_models import TINY, output, save_tiny
from transformers.models.auto import modeling_auto

import requanto
from requanto import CheckpointError, QTensor, QuantoConfig
from requanto.integrations.transformers import RequantoHfQuantizer
from requanto.integrations.transformers_parts import find_counterpart

# Whole models, and how many of the classes beside each a float checkpoint of it serves without a layer missing, at least.
WHOLE = {
    "CLIPModel": 5,
    "SiglipModel": 3,
    "WhisperForConditionalGeneration": 4,
    "BertForMaskedLM": 8,
    "T5ForConditionalGeneration": 5,
    "BartForConditionalGeneration": 5,
    "Llama4ForConditionalGeneration": 2,
    "Qwen2_5_VLForConditionalGeneration": 2,
    "Qwen3_5ForConditionalGeneration": 3,
    "LlavaForConditionalGeneration": 2,
    "Gemma3ForConditionalGeneration": 3,
    "Gemma4ForConditionalGeneration": 2,
    "PaliGemmaForConditionalGeneration": 2,
    "Idefics3ForConditionalGeneration": 2,
    "InternVLForConditionalGeneration": 2,
    "Mistral3ForConditionalGeneration": 2,
    "Qwen2AudioForConditionalGeneration": 1,
    "Kimi_K25ForConditionalGeneration": 2,
    "MixtralForCausalLM": 4,
}


def every_whole_model() -> Iterator[str]:
    """REQUANTO_TEST_FAMILIES=all: each class that the library lists as multimodal, encoder-decoder, or base model."""
    if os.environ.get("REQUANTO_TEST_FAMILIES") != "all":
        yield from WHOLE
        return
    kinds = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL")
    listed: dict[str, None] = dict.fromkeys(WHOLE)
    for kind in kinds:
        for names in getattr(modeling_auto, f"{kind}_MAPPING_NAMES", {}).values():
            listed |= dict.fromkeys([names] if isinstance(names, str) else names)
    yield from listed


def values(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    return parameter.inner_tensors() if isinstance(parameter, QTensor) else {"": parameter}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = values(a), values(b)
    return left.keys() == right.keys() and all(torch.equal(value, right[part]) for part, value in left.items())


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


def load(cls: type, folder: Path, **options: Any) -> tuple[Any, set[str]]:
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    return model, set(info["missing_keys"])


@pytest.mark.parametrize("name", list(every_whole_model()))
def test_each_class_reads_what_it_reads_of_the_float_checkpoint(name, tmp_path):
    whole = getattr(tf, name)
    try:
        model = shrunk(whole)
    except Exception as error:
        if name in WHOLE:
            raise
        pytest.skip(f"not built from its default config: {error}")
    model.save_pretrained(tmp_path / "float")
    quantized = whole.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig(weights="int8"))
    quantized.save_pretrained(tmp_path / "int8")
    # Which weight of the whole model one of a part is, by its values: they are all different.
    key = lambda p: (tuple(p.shape), float(p.detach().double().sum()))  # noqa: E731
    names = {key(p): n for n, p in model.named_parameters()}
    of_whole, served = parameters(quantized), 0
    for part in classes_beside(whole):
        try:
            plain, plain_missing = load(part, tmp_path / "float")
        except Exception:  # the library itself cannot
            continue
        if any(p for p in plain_missing if ".layers." in f".{p}" or ".layer." in f".{p}" or ".block" in f".{p}"):
            with pytest.raises(CheckpointError, match="would have random weights"):
                load(part, tmp_path / "int8")
            continue
        found, missing = load(part, tmp_path / "int8")
        assert missing == plain_missing, part
        for own, parameter in plain.named_parameters():
            source = names.get(key(parameter))
            if own not in missing and source is not None:
                assert same(parameters(found)[own], of_whole[source]), (part, own, source)
        assert any(isinstance(p, QTensor) for p in found.parameters()) or not any(
            isinstance(of_whole[names[key(p)]], QTensor) for p in plain.parameters() if key(p) in names
        )
        found.save_pretrained(tmp_path / "part")
        again, still = load(part, tmp_path / "part")
        assert not still, part
        for own, parameter in parameters(found).items():
            assert same(parameter, parameters(again)[own]), (part, own)
        if part.config_class is whole.config_class and part is not whole:  # the reverse: the part into the whole
            plain.save_pretrained(tmp_path / "plain-part")
            back, lost = load(whole, tmp_path / "part")
            assert lost == load(whole, tmp_path / "plain-part")[1], part
            kept = {n for n in parameters(back) if n not in lost and isinstance(of_whole[n], QTensor)}
            assert all(same(parameters(back)[n], of_whole[n]) for n in kept), part
        served += 1
    assert served >= WHOLE.get(name, 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    model = shrunk(tf.CLIPModel)
    model.save_pretrained(folder / "float")
    config = QuantoConfig(weights="int4", group_size=32)
    tf.CLIPModel.from_pretrained(folder / "float", quantization_config=config).save_pretrained(folder / "int4")
    return folder / "int4"


def test_the_config_of_a_part_however_it_is_given(clip):
    wanted = parameters(tf.CLIPTextModel.from_pretrained(clip))
    whole = tf.AutoConfig.from_pretrained(clip)
    assert whole.text_config.quantization_config["part"]  # what config.json says there, for a library without Requanto
    for config in (whole.text_config, tf.CLIPTextConfig.from_pretrained(clip)):
        found = tf.CLIPTextModel.from_pretrained(clip, config=config)
        assert all(same(p, wanted[name]) for name, p in parameters(found).items())
        assert found.config.quantization_config.tensors.keys() == {
            n for n, p in wanted.items() if isinstance(p, QTensor)
        }
    assert whole.text_config.quantization_config["part"]  # the caller's object is unchanged
    loaded = tf.CLIPModel.from_pretrained(clip)
    assert not hasattr(loaded.config.text_config, "quantization_config")
    assert not hasattr(loaded.vision_model.config, "quantization_config")
    # Of a float checkpoint, the mark is no obstacle.
    assert not hasattr(
        tf.CLIPTextModel.from_pretrained(clip.parent / "float", config=whole.text_config).config, "quantization_config"
    )
    # A float model loaded next is float, and a sub-config of it has nothing of the one before.
    assert not hasattr(tf.CLIPTextConfig.from_pretrained(clip.parent / "float"), "quantization_config")
    plain = tf.CLIPTextModel.from_pretrained(clip.parent / "float")
    assert not any(isinstance(p, QTensor) for p in plain.parameters())


def test_a_state_dict_for_a_part(clip):
    state, whole = load_file(clip / "model.safetensors"), tf.AutoConfig.from_pretrained(clip)
    wanted = parameters(tf.CLIPTextModel.from_pretrained(clip))
    with pytest.raises(CheckpointError, match="that of the whole model"):
        tf.CLIPTextModel.from_pretrained(None, config=whole.text_config, state_dict=state)
    whole.text_config.quantization_config = whole.quantization_config
    found = tf.CLIPTextModel.from_pretrained(None, config=whole.text_config, state_dict=state)
    assert all(same(p, wanted[name]) for name, p in parameters(found).items())


def test_sizes_for_a_device_map_of_a_part(clip, monkeypatch):
    sizes = {}
    original = RequantoHfQuantizer.param_element_size

    def recorded(self, model, name, parameter):
        sizes[name] = original(self, model, name, parameter)
        return sizes[name]

    monkeypatch.setattr(RequantoHfQuantizer, "param_element_size", recorded)
    found = tf.CLIPVisionModel.from_pretrained(clip, device_map="auto", max_memory={"cpu": "1GB"})
    quantized = {name for name, p in parameters(found).items() if isinstance(p, QTensor)}
    assert len(quantized) == 12
    assert all(0.5 < sizes[name] < 1 for name in quantized)
    assert all(size >= 4 for name, size in sizes.items() if name not in quantized)
    # After loading, the table has the names of the part.
    assert all(0.5 < original(found.hf_quantizer, found, name, torch.empty(64, 64)) < 1 for name in quantized)


def test_renamed_keys_and_key_mapping(tmp_path):
    source = save_tiny("llama", tmp_path / "float")
    model = tf.LlamaForCausalLM.from_pretrained(source, quantization_config=QuantoConfig(weights="int8"))
    model.save_pretrained(tmp_path / "int8")
    state = load_file(tmp_path / "int8" / "model.safetensors")
    renamed = {key.replace("model.layers", "net.blocks"): value for key, value in state.items()}
    save_file(renamed, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="key_mapping"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path / "int8")
    found = tf.LlamaForCausalLM.from_pretrained(tmp_path / "int8", key_mapping={"net.blocks": "model.layers"}).eval()
    inputs = TINY["llama"].inputs()
    assert torch.equal(output(found, inputs), output(model.eval(), inputs))
    # A rule that names a whole weight means its stored parts too.
    one = {key.replace("model.layers.0.mlp.up_proj", "first.up"): value for key, value in state.items()}
    save_file(one, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    mapping = {r"^first\.up\.weight$": "model.layers.0.mlp.up_proj.weight"}
    found = tf.LlamaForCausalLM.from_pretrained(tmp_path / "int8", key_mapping=mapping).eval()
    assert torch.equal(output(found, inputs), output(model.eval(), inputs))


def test_a_class_of_another_family_is_refused_with_the_one_to_load(tmp_path):
    source = save_tiny("llava", tmp_path / "float")
    whole = TINY["llava"].auto.from_pretrained(source, quantization_config=QuantoConfig(weights="int8"))
    whole.save_pretrained(tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"transformers\.LlavaForConditionalGeneration\.from_pretrained"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path / "int8")


def test_a_class_that_reads_no_quantized_weight_is_refused(tmp_path):
    source = save_tiny("llama", tmp_path / "float")
    whole = TINY["llama"].auto.from_pretrained(source, quantization_config=QuantoConfig(weights="int8"))
    whole.save_pretrained(tmp_path / "int8")
    with pytest.raises(
        CheckpointError, match=r"reads none of the 14 .*transformers\.LlamaForCausalLM\.from_pretrained"
    ):
        tf.GPT2LMHeadModel.from_pretrained(tmp_path / "int8")


def test_a_float_part_may_have_a_new_head(tmp_path):
    """None of its weights is quantized: only the other part's are."""
    model = shrunk(tf.CLIPModel)
    model.save_pretrained(tmp_path / "float")
    config = QuantoConfig(weights="int8", modules_to_not_convert=["vision_model"])
    tf.CLIPModel.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(tmp_path / "int8")
    found, missing = load(tf.CLIPForImageClassification, tmp_path / "int8", num_labels=3)
    assert missing == {"classifier.weight", "classifier.bias"}
    assert not any(isinstance(p, QTensor) for p in found.parameters())


def test_a_head_of_another_size(tmp_path):
    model = shrunk(tf.BertForSequenceClassification)
    requanto.quantize(model, weights="int8", exclude=())
    requanto.freeze(model)
    assert isinstance(model.classifier.weight, QTensor)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds shape"):
        tf.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    found, missing = load(tf.BertForSequenceClassification, tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert missing <= {"classifier.weight", "classifier.bias"}
    assert not isinstance(found.classifier.weight, QTensor)
    assert same(found.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_static_activations_of_a_part(tmp_path):
    model = shrunk(tf.CLIPModel)
    requanto.quantize(model, weights="int8", activations="int8")
    ids = torch.arange(3, 11)[None]
    with requanto.Calibration(), torch.no_grad():
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32))
    requanto.freeze(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model.text_model(ids).last_hidden_state
        found = tf.CLIPTextModel.from_pretrained(tmp_path)(ids).last_hidden_state
    assert torch.equal(found, wanted)


def test_counterparts():
    unread = ["language_model.model.layers.0.mlp.up_proj.weight", "vision.head.dense.weight", "text.lm_head.weight"]
    assert find_counterpart(["model.layers.0.mlp.up_proj.weight"], unread) == (
        "model.layers.0.mlp.up_proj.weight",
        unread[0],
    )
    assert find_counterpart(["lm_head.weight"], unread) == ("lm_head.weight", unread[2])
    # A new head, other layers, or a name that ends alike by chance.
    assert (
        find_counterpart(["score.weight", "model.layers.7.mlp.up_proj.weight", "pooler.dense.weight"], unread) is None
    )
