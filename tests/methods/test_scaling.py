"""Folds are exact where they are found, and AWQ and SmoothQuant gain by them."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import tiny_models
from whole_models import error, logits, nearest, quiet, token_samples

import requanto
from requanto.config.config import LayerOptions
from requanto.config.plan import PlannedWeight, weight_kind
from requanto.methods.fold import find_folds
from requanto.methods.layers import Layer
from requanto.tensor.qtensor import QTensor


def uneven(name, dtype=torch.float32):
    """A tiny model whose norms make some channels much larger than others, as those of large models do."""
    model = tiny_models.TINY[name].build(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 1:
                weight.mul_(torch.randn(weight.shape, generator=generator).exp())
    return model


def layers_of(block):
    found = {}
    for name, module in block.named_modules():
        kind = weight_kind(module, "weight", module.weight) if hasattr(module, "weight") else None
        if kind is not None:
            planned = PlannedWeight(LayerOptions("int4"), kind[1], kind[2], kind[0])
            found[name] = Layer(f"{name}.weight", planned, [(module, "weight")])
    return found


class Block(nn.Module):
    """A norm that two layers read, an MLP with a product, and a residual that reads the last norm."""

    def __init__(self, act="silu", leak=False, plus_one=False):
        super().__init__()
        self.norm = nn.RMSNorm(16) if not plus_one else PlusOne(16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.act, self.leak = getattr(nn.functional, act), leak

    def forward(self, x):
        normed = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed)) + (normed if self.leak else 0)
        return x + self.fc2(self.act(self.fc1(x)))


class PlusOne(nn.RMSNorm):
    """Gemma's norm: 1 + weight."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, 1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["norm", "up", None, None]),
        ({"plus_one": True}, ["norm", "up", None, None]),
        ({"act": "relu"}, ["norm", "up", None, "fc1"]),  # relu(s x) = s relu(x)
        ({"leak": True}, [None, "up", None, None]),  # the norm's output goes elsewhere, too
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folds_are_found_where_they_are_exact(options, expected, dtype):
    torch.manual_seed(0)
    block = Block(**options).to(dtype)
    x = torch.randn(3, 7, 16, dtype=dtype)
    before, state = block(x), copy.deepcopy(block.state_dict())
    parameters = dict(block.named_parameters())
    layers = layers_of(block)
    sources = [[layers["gate"], layers["up"]], [layers["down"]], [layers["fc1"]], [layers["fc2"]]]
    with torch.no_grad():
        folds = find_folds(block, sources, list(layers.values()), lambda: [block(x)])
    names = {module: name for name, module in block.named_modules()}
    names |= {layer: name for name, layer in layers.items()}
    assert [None if fold is None else names[fold.producer] for fold in folds] == expected
    # Looking changes nothing.
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert all(parameters[name] is p for name, p in block.named_parameters())
    with torch.no_grad():
        for fold in folds:
            if fold is not None:
                fold.apply(torch.rand(fold.consumers[0].columns) * 3 + 0.3)
        for layer in layers.values():
            layer.set_values(layer.weight())
    after = block(x)
    assert not torch.equal(block.state_dict()["down.weight"], state["down.weight"])
    torch.testing.assert_close(after, before, **({"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_awq_beats_rounding_to_nearest(name, rounding):
    model, samples = uneven(name), token_samples()
    expected = logits(model, samples)
    skip = {"exclude": [p for p in ("lm_head", "classifier") if any(n == p for n, _ in model.named_modules())] or None}
    plain = error(nearest(copy.deepcopy(model), weights="int4", **skip), samples, expected)
    options = {"rounding": rounding}
    requanto.quantize(model, weights="int4", calibration=samples, method="awq", method_options=options, **skip, **quiet)
    assert error(model, samples, expected) < (0.9 if rounding == "nearest" else 0.7) * plain


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_smoothquant_helps_inputs_of_8_bits(name):
    model, samples = uneven(name), token_samples()
    expected = logits(model, samples)
    choice = {"weights": "int8", "activations": "int8", "exclude": "lm_head"}
    plain = error(nearest(copy.deepcopy(model), **choice), samples, expected)
    requanto.quantize(model, calibration=samples, method="smoothquant", **choice, **quiet)
    quantized = [p for p in model.parameters() if isinstance(p, QTensor)]
    assert all(p.activation.name == "qint8" for p in quantized)
    assert error(model, samples, expected) < 0.8 * plain


def test_smoothquant_asks_for_activations():
    with pytest.raises(ValueError, match="give activations='int8'"):
        requanto.quantize(nn.Linear(8, 8), "int8", calibration=[torch.ones(2, 8)], method="smoothquant")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("awq", {"trials": 1}, "trials must be 2 or more"),
        ("awq", {"rounding": "up"}, "rounding must be"),
        ("smoothquant", {"alpha": 2}, "alpha must be between"),
        ("signround", {"iterations": 0}, "iterations and batch"),
        ("signround", {"start": "zero"}, "start must be"),
    ],
)
def test_options_out_of_range(method, options, message):
    with pytest.raises(ValueError, match=message):
        requanto.quantize(
            nn.Linear(8, 8), "int8", calibration=[torch.ones(2, 8)], method=method, method_options=options
        )
