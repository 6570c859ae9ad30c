"""Folds in from_pretrained and on the command line: an ordinary checkpoint comes out, which any reader loads."""

import copy
import json
import logging

import pytest
import torch
from tiny_models import TINY, output, save_tiny, tiny_tokenizer
from typer.testing import CliRunner

import requanto
from requanto import QTensor, QuantoConfig
from requanto.cli.app import app


def loaded(directory, name, **options):
    return TINY[name].auto.from_pretrained(directory, **options)


def difference(one, two):
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gemma3"])
def test_a_folded_model_computes_the_same_and_is_saved_as_any_other(name, tmp_path, caplog):
    save_tiny(name, tmp_path / "float")
    inputs = TINY[name].inputs()
    exact = output(loaded(tmp_path / "float", name), inputs)
    config = QuantoConfig(weights="int8", group_size=-1, fold=True, rotation="fold")
    with caplog.at_level(logging.INFO, "requanto"):
        model = loaded(tmp_path / "float", name, quantization_config=config)
    assert "the float weights are loaded as they are" in caplog.text
    assert config.fold is True  # the user's own config is a recipe, for other models too
    own = model.config.quantization_config
    assert own.fold is None
    assert own.rotation is None
    plain = loaded(tmp_path / "float", name, quantization_config=QuantoConfig(weights="int8", group_size=-1))
    # In a Mixtral a token may change its expert; a wrong fold gives more than 1.
    limit = 0.4 if name == "mixtral" else max(0.06, 2 * difference(output(plain, inputs), exact))
    assert difference(output(model, inputs), exact) < limit
    weights = dict(model.named_parameters())
    assert all(not isinstance(w, QTensor) or w.rotation is None for w in weights.values())
    assert set(own.tensors) == set(plain.config.quantization_config.tensors)

    model.save_pretrained(tmp_path / "folded")
    stored = json.loads((tmp_path / "folded" / "config.json").read_text())
    # The norms after Gemma's attention and MLP all multiply by 1 here, so the stream can be rotated.
    assert stored["requanto_folded"] == ["rotation", "value_rotation", "column_scale"]
    assert not {"fold", "rotation"} & set(stored["quantization_config"])
    again = loaded(tmp_path / "folded", name)
    assert torch.equal(output(again, inputs), output(model, inputs))
    again.save_pretrained(tmp_path / "again")
    for file in sorted((tmp_path / "folded").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_quantized_head_that_was_tied_is_quantized_beside_the_table(tmp_path):
    save_tiny("llama-tied", tmp_path / "float")
    config = QuantoConfig(weights="int8", lm_head=True, rotation="fold")
    model = loaded(tmp_path / "float", "llama-tied", quantization_config=config)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert isinstance(head, QTensor)
    assert isinstance(table, QTensor)
    assert head is not table
    model.save_pretrained(tmp_path / "folded")
    inputs = TINY["llama-tied"].inputs()
    assert torch.equal(output(loaded(tmp_path / "folded", "llama-tied"), inputs), output(model, inputs))


def test_dequantizing_gives_a_float_model_that_says_what_was_folded(tmp_path):
    save_tiny("llama", tmp_path / "float")
    inputs = TINY["llama"].inputs()
    exact = output(loaded(tmp_path / "float", "llama"), inputs)
    model = loaded(tmp_path / "float", "llama", quantization_config=QuantoConfig(weights="int8", rotation="fold"))
    model.dequantize().save_pretrained(tmp_path / "floats")
    back = loaded(tmp_path / "floats", "llama")
    assert back.config.requanto_folded == ["rotation", "value_rotation"]
    assert difference(output(back, inputs), exact) < 0.06


def test_what_cannot_be_folded_while_loading_is_refused_before_it_is_loaded(tmp_path):
    save_tiny("llama", tmp_path)
    with pytest.raises(ValueError, match="weights='auto' measures the weights in the files, before anything is folded"):
        loaded(tmp_path, "llama", quantization_config=QuantoConfig(weights="auto", bits=5, fold=True))
    places = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="folding runs the float model on one device"):
        loaded(
            *(tmp_path, "llama"),
            quantization_config=QuantoConfig(weights="int8", fold=True),
            device_map=places,
            offload_folder=tmp_path / "off",
        )


def test_diffusers_asks_for_inputs(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), sample_size=8,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained of Diffusers has no inputs for it"):
        diffusers.UNet2DModel.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8", fold=True))
    sample = {"sample": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": 3}
    model = diffusers.UNet2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        before = model(**sample).sample
        requanto.quantize(model, weights="int8", group_size=None, fold=True, column_scale="std", fold_inputs=sample)
        requanto.freeze(model)
        assert difference(model(**sample).sample, before) < 0.02


@pytest.mark.parametrize("method", [[], ["--method", "gptq", "--samples", "2", "--sequence-length", "16"]])
def test_the_command_line_folds(method, tmp_path):
    save_tiny("llama", tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    arguments = ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--weights", "int8", "--fold"]
    result = CliRunner().invoke(app, [*arguments, "--rotation", "fold", "--json", *method])
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["requanto_folded"] == ["rotation", "value_rotation", "column_scale"]
    inputs = TINY["llama"].inputs()
    exact = output(loaded(tmp_path / "float", "llama"), inputs)
    assert difference(output(loaded(tmp_path / "out", "llama"), inputs), exact) < 0.06


def test_comparing_warns_that_errors_of_layers_contain_the_fold(caplog):
    from requanto.report import compare

    plain, folded = TINY["llama"].build(), TINY["llama"].build()
    compare(plain, TINY["llama"].build(), weights_only=True)
    requanto.quantize(folded, weights="int8", fold=True)
    compare(folded, copy.deepcopy(folded), weights_only=True)
    assert "contain the fold" not in caplog.text
    compare(plain, folded, weights_only=True)
    assert "no folds in A, column_scale in B" in caplog.text


def test_a_wrong_rotation_on_the_command_line_is_named(tmp_path):
    save_tiny("llama", tmp_path / "float")
    result = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "float"), str(tmp_path / "out"), "--rotation", "folded"]
    )
    assert result.exit_code == 1
    assert "rotation must be True, False, 'hadamard'" in result.output.replace("\n", " ")
