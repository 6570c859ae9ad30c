"""What the config alone tells of a directory."""

import pytest
import torch

from requanto.checkpoint.foreign.directory import is_conv1d
from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, transpose_conv1d
from requanto.checkpoint.foreign.source import TensorsSource


@pytest.mark.parametrize(
    ("description", "name", "expected"),
    [
        ({"model_type": "gpt2"}, "transformer.h.0.attn.c_attn.weight", True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, "h.0.mlp.c_proj.weight", True),
        ({"model_type": "gpt2"}, "lm_head.weight", False),
        ({"model_type": "gpt_bigcode"}, "transformer.h.0.attn.c_attn.weight", False),
        ({}, "c_attn.weight", False),
    ],
)
def test_layers_that_a_config_tells_of(description, name, expected):
    assert is_conv1d(description, name) is expected


def test_dequantized_weights_of_such_layers_are_transposed_and_stored_floats_are_not():
    values = torch.arange(6, dtype=torch.float32, device="cpu").view(2, 3)
    found = ForeignCheckpoint("")
    for name, reason in (("a", "it has no place"), ("b", "")):
        found.floats[name] = ForeignFloat(values.shape, values.dtype, (), lambda source: values, reason)
    transpose_conv1d(found, lambda name: True)
    made, stored = (found.floats[name].build(TensorsSource({})) for name in "ab")
    assert torch.equal(made, values.t())
    assert made.shape == found.floats["a"].shape
    assert torch.equal(stored, values)
