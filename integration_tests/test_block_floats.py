"""NVFP4 and MX types in Transformers and PEFT: loaded, saved, generated with, adapted; inputs rounded in blocks."""

import copy
import json

import peft
import pytest
import torch
import transformers as tf
from tiny_models import TINY, output, save_tiny

import requanto
from requanto import QTensor, QuantoConfig
from requanto.cli.app import app
from requanto.report.inspect import inspect_directory

OPTIONS = {
    "nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
    "mxfp4": {"weights": "mxfp4", "activations": "mxfp8"},
    "mxfp8": {"weights": "mxfp8", "method": "minmax"},
    "composed": {"weights": "nvfp4", "rotation": 16, "column_scale": "root", "low_rank": 2, "embeddings": True},
}


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("float"))


def load(directory, **options):
    return tf.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def answer(model):
    return output(model, TINY["llama"].inputs())


@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back(name, float_dir, tmp_path):
    options = OPTIONS[name]
    model = load(float_dir, quantization_config=QuantoConfig(**options))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, QTensor)
    assert weight.qtype.name.startswith(f"q{options['weights']}")
    plain = load(float_dir)
    distance = float((answer(model) - answer(plain)).norm() / answer(plain).norm())
    assert 0 < distance < 0.7
    model.save_pretrained(tmp_path / "one")
    stored = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 3
    again = load(tmp_path / "one")
    assert torch.equal(answer(again), answer(model))
    again.save_pretrained(tmp_path / "two")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    found = {w.name: w.bytes for w in inspect_directory(tmp_path / "one").weights}
    assert found["model.layers.0.mlp.up_proj.weight"] == weight.nbytes
    ids = TINY["llama"].inputs()["input_ids"]
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(ids, **kwargs), model.generate(ids, **kwargs))
    if "activations" in options:
        kept = [w.activation for w in again.parameters() if isinstance(w, QTensor)]
        assert {kind.name.removeprefix("q").split("_")[0] for kind in kept} == {options["activations"]}
        for parameter in again.parameters():
            if isinstance(parameter, QTensor):
                parameter.activation = None
        assert not torch.equal(answer(again), answer(model))


@pytest.mark.parametrize("weights", ["nvfp4", "mxfp4"])
def test_adapters(weights, float_dir, float_arithmetic):
    model = load(float_dir, quantization_config=QuantoConfig(weights=weights))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    want = answer(adapted)
    merged = adapted.merge_and_unload()
    assert isinstance(merged.model.layers[0].self_attn.q_proj.weight, QTensor)
    torch.testing.assert_close(answer(merged), want, rtol=1e-3, atol=1e-4)
    config.use_dora = True
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for name, value in adapted.named_parameters():
        value.data *= 1.1 if "magnitude" in name else 1
    want = answer(adapted)
    if weights == "nvfp4":
        torch.testing.assert_close(answer(adapted.merge_and_unload()), want, rtol=1e-3, atol=1e-4)
        return
    with pytest.raises(NotImplementedError, match="multiplied by powers of two only"):
        adapted.merge_and_unload()
    assert torch.equal(answer(adapted), want)


def test_the_command_line(float_dir, tmp_path):
    from typer.testing import CliRunner

    command = ["quantize", str(float_dir), str(tmp_path / "out"), "--weights", "mxfp4", "--activations", "nvfp4"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    model = load(tmp_path / "out")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.qtype.name, weight.activation.name) == ("qmxfp4", "qnvfp4")
    assert "mxfp4" in CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).output
    lines = str(requanto.explain(model, rows=2)).splitlines()
    assert any("mxfp4, group 32, nvfp4 activations" in line for line in lines)
