"""Gemma's QAT checkpoints: values of Transformers' own layers, static activations, embeddings."""

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign.readers import scan
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild

LAYER = "model.layers.0"


@pytest.fixture
def config():
    return {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": True,
        "module_quant_configs": {r"layers\.\d+\.two": {"num_bits": 2}, "eight|per_layer": {"num_bits": 8}},
        "modules_to_not_convert": ["lm_head"],
    }


@pytest.fixture
def tensors(written):
    return load_file(written("hf") / "gemma.safetensors")


def test_values_are_those_of_transformers(written, config, tensors):
    reference = load_file(written("hf") / "gemma.reference.safetensors")
    source = TensorsSource(tensors)
    found = scan(config, source)
    assert found.table == {
        f"{LAYER}.two.weight": "qint2 24x64",
        f"{LAYER}.four.weight": "qint4 24x64",
        f"{LAYER}.eight.weight": "qint8 24x64",
        "model.embed_tokens.weight": "qint4 32x64",
        "model.embed_tokens_per_layer.weight": "qint8 32x64 group=16",
    }
    for name, weight in found.weights.items():
        parts = weight.build(source)
        assert parts["qdata"].data_ptr() == tensors[weight.sources[0]].data_ptr()
        values = rebuild(name, weight.text, parts, torch.float32).dequantize()
        assert torch.equal(values, reference[name.removesuffix(".weight")])
    assert set(tensors) - found.consumed == {"model.norm.weight"}
    assert found.format == "Gemma QAT (2, 4, 8 bits); scales of a quantized key-value cache are left out"


def test_static_activations(config, tensors):
    """A scale of 0 stands for an input that was not calibrated."""
    found = scan(config, TensorsSource(tensors))
    assert {name: one.type for name, one in found.activations.items()} == {f"{LAYER}.eight": "qint8"}
    assert torch.equal(found.activations[f"{LAYER}.eight"].build(TensorsSource(tensors)), torch.tensor(0.25))
    assert "outputs stay float" in found.weights[f"{LAYER}.four.weight"].note
    assert found.weights[f"{LAYER}.two.weight"].note == ""


FOUR, SCALE = f"{LAYER}.four.weight", f"{LAYER}.four.weight_scale"
BAD = {
    "no scale": (lambda c, t: t.pop(SCALE), "four.weight needs the tensor .*four.weight_scale"),
    "no codes": (lambda c, t: t.pop(FOUR), "four.weight is missing, expected codes"),
    "floats": (lambda c, t: t.update({FOUR: torch.ones(24, 64)}), "four.weight is float32, expected codes"),
    "other bits": (lambda c, t: c.update(num_bits=8), r"is uint8 \(\d+, 32\), expected int8 \[rows, K\]"),
    "bits of 3": (lambda c, t: c.update(num_bits=3), "Gemma's codes have 2, 4 or 8"),
    "a cut scale": (
        lambda c, t: t.update({SCALE: torch.ones(5, 1)}),
        r"four.weight_scale is float32 \(5, 1\), expected .* \(24, 1\)",
    ),
    "NaN": (lambda c, t: t.update({SCALE: torch.full((24, 1), float("nan"))}), "four.weight_scale holds NaN or Inf"),
    "embeddings": (lambda c, t: c.update(quantize_embeddings=False), "quantize_embeddings is not true"),
    "blocks that do not divide": (
        lambda c, t: t.update({"model.embed_tokens.embedding_scale": torch.ones(32, 5)}),
        "a number of blocks that divides 64 columns",
    ),
    "a pattern": (lambda c, t: c.update(module_quant_configs={"(": {}}), "which is no regular expression"),
    "an activation": (
        lambda c, t: t.update({f"{LAYER}.four.input_activation_scale": torch.ones(2)}),
        "four.input_activation_scale is float32 .2,., expected one float",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(made, config, tensors, case):
    change, message = BAD[case]
    change(config, tensors)
    with pytest.raises(CheckpointError, match=message):
        made(scan(config, TensorsSource(tensors)), TensorsSource(tensors))
