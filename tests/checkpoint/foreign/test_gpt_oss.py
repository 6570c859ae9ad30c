"""Experts of gpt-oss in MXFP4: values and layout of Transformers' own function."""

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign.readers import scan
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild

CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def tensors(written):
    return load_file(written("hf") / "gpt_oss.safetensors")


def test_values_are_those_of_transformers(written, tensors):
    reference = load_file(written("hf") / "gpt_oss.reference.safetensors")
    source = TensorsSource(tensors)
    found = scan(CONFIG, source)
    assert found.table == {
        f"{EXPERTS}.gate_up_proj": "qmxfp4 3x96x64 group=32 axis=1 transposed",
        f"{EXPERTS}.down_proj": "qmxfp4 3x32x96 group=32 axis=1 transposed",
    }
    for name, weight in found.weights.items():
        made = rebuild(name, weight.text, weight.build(source), torch.bfloat16)
        assert made.shape == reference[name].shape
        assert torch.equal(made.dequantize(), reference[name])
    assert set(tensors) - found.consumed == {
        f"{EXPERTS}.gate_up_proj_bias",
        f"{EXPERTS}.down_proj_bias",
        "model.layers.0.self_attn.q_proj.weight",
    }


def test_bytes_are_not_copied(tensors):
    weight = scan(CONFIG, TensorsSource(tensors)).weights[f"{EXPERTS}.down_proj"]
    parts = weight.build(TensorsSource(tensors))
    assert parts["qdata"].data_ptr() == tensors[f"{EXPERTS}.down_proj_blocks"].data_ptr()
    assert parts["scale"].data_ptr() == tensors[f"{EXPERTS}.down_proj_scales"].data_ptr()


BLOCKS, SCALES = f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"
BAD = {
    "no scales": (lambda t: t.pop(SCALES), "down_proj needs the tensor .*down_proj_scales"),
    "no blocks": (lambda t: t.pop(BLOCKS), "down_proj_scales needs the tensor .*down_proj_blocks"),
    "cut blocks": (lambda t: t.update({BLOCKS: t[BLOCKS][..., :8]}), r"expected uint8 \[experts, rows, K / 32, 16\]"),
    "cut scales": (
        lambda t: t.update({SCALES: t[SCALES][:, :5]}),
        r"down_proj_scales is uint8 \(3, 5, 1\), expected uint8 \(3, 96",
    ),
    "float scales": (lambda t: t.update({SCALES: t[SCALES].float()}), "down_proj_scales is float32"),
    "NaN": (lambda t: t.update({SCALES: torch.full_like(t[SCALES], 255)}), "down_proj_scale holds NaN"),
    "a float beside": (
        lambda t: t.update({f"{EXPERTS}.down_proj": torch.ones(1)}),
        "files of two checkpoints are mixed",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(made, tensors, case):
    change, message = BAD[case]
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        made(scan(CONFIG, TensorsSource(tensors)), TensorsSource(tensors))


def test_a_config_that_leaves_experts_float_is_refused(tensors):
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert leaves .*_proj float"):
        scan({**CONFIG, "modules_to_not_convert": [EXPERTS]}, TensorsSource(tensors))
