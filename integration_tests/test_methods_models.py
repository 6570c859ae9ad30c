"""Quantization with samples on every tiny architecture, and through save_pretrained."""

import copy

import pytest
import tiny_diffusers
import tiny_models
import torch
from torch import nn

import requanto
from requanto.methods.chains import Chain
from requanto.tensor.qtensor import QTensor


def left_float(model):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return [*names, *(n for n in ("lm_head", "classifier") if n in dict(model.named_modules()))] or None


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", tiny_models.TINY)
def test_gptq_takes_every_architecture_block_by_block(name, monkeypatch):
    """Decoders, encoders, both, experts, vision, speech: no list of names, one engine."""
    tiny = tiny_models.TINY[name]
    model, inputs = tiny.build(), tiny.inputs()
    expected = tiny_models.output(model, inputs)
    plain = copy.deepcopy(model)
    requanto.quantize(plain, weights="int4", exclude=left_float(model))
    requanto.freeze(plain)
    captured = []
    original = Chain.capture

    def capture(self, *arguments):
        captured.append(original(self, *arguments))
        return captured[-1]

    monkeypatch.setattr(Chain, "capture", capture)
    options = {"method_options": {"rounds": 1}, "progress": False}
    requanto.quantize(model, weights="int4", exclude=left_float(model), calibration=[inputs], method="gptq", **options)
    assert captured
    assert all(records is not None for records in captured)
    error = relative(tiny_models.output(model, inputs), expected)
    assert error < 0.6 * relative(tiny_models.output(plain, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_model_saves_and_loads(tmp_path, dtype):
    tiny, source = tiny_models.TINY["llama"], tiny_models.save_tiny("llama", tmp_path / "float")
    model, inputs = tiny.auto.from_pretrained(source, dtype=dtype).eval(), tiny.inputs()
    requanto.quantize(model, "int4", exclude="lm_head", group_size=32, calibration=[inputs], progress=False)
    expected = tiny_models.output(model, inputs)
    for directory in (tmp_path / "one", tmp_path / "two"):  # and what was loaded is saved again
        model.save_pretrained(directory)
        model = tiny.auto.from_pretrained(directory).eval()
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, QTensor)
        assert torch.equal(tiny_models.output(model, inputs), expected)


def test_a_diffusers_model_saves_and_loads(tmp_path):
    tiny = tiny_diffusers.TINY["pixart"]
    model = tiny.make()
    only = {"exclude": [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]}
    requanto.quantize(model, "int4", method="awq", calibration=lambda model: tiny.run(model), progress=False, **only)
    expected = tiny.run(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.run(tiny.cls.from_pretrained(tmp_path)), expected)
