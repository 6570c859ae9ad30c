"""A quantized model runs wherever the float model does: classes of the installed Transformers, made small by rules.

The named ones read a weight in some way of their own. The rest is drawn from all classes, always the same ones; to draw
others, or all of them: ``REQUANTO_MODELS=1000 pytest integration_tests/test_every_model.py``.
"""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from shrunk_models import Case, cases, families, inputs, run
from torch import nn

from requanto import QTensor, QuantoConfig

pytestmark = pytest.mark.usefixtures("exact")

DRAWN = int(os.environ.get("REQUANTO_MODELS", "12"))

#: Classes that do more with a weight than a layer's forward.
READERS = [
    Case("siglip", "SiglipModel"),  # nn.MultiheadAttention in the pooling head, a table of positions
    Case("bridgetower", "BridgeTowerModel"),
    Case("bit", "BitModel"),  # standardized kernels
    Case("bailing_hybrid", "BailingHybridForCausalLM"),  # a kernel handed to a function
    Case("chinese_clip", "ChineseCLIPModel"),  # zeroes a row of a loaded table
    Case("clipseg", "CLIPSegModel"),
    Case("whisper", "WhisperForConditionalGeneration"),  # a table of positions, whole and by rows
    Case("deberta-v2", "DebertaV2Model"),  # relative embeddings as input of layers
    Case("deepseek_v4", "DeepseekV4ForCausalLM"),  # a grouped projection
    Case("wavlm", "WavLMModel"),  # projections handed to a function
    Case("opt", "OPTForCausalLM"),
    Case("rwkv", "RwkvForCausalLM"),  # halves weights before its first forward
]


def drawn() -> list[Case]:
    found = [case for family in families() for case in cases(family)]
    random.Random(0).shuffle(found)
    return [case for case in found if case not in READERS][:DRAWN]


@pytest.mark.parametrize(
    "options",
    [{"weights": "int8"}, {"weights": "int4", "embeddings": True, "lm_head": True, "convolutions": True}],
    ids=["int8", "int4-all"],
)
@pytest.mark.parametrize("case", [*READERS, *drawn()], ids=lambda case: case.class_name)
def test_a_quantized_model_runs_where_the_float_model_does(case: Case, options: dict[str, Any], tmp_path: Path) -> None:
    try:
        model = case.build()
        arguments = inputs(model)
        assert run(model, arguments)
        model.save_pretrained(tmp_path / "float")
    except Exception as error:
        assert case not in READERS
        pytest.skip(f"the float model is not to be had by rules: {type(error).__name__}")
    try:
        quantized = case.cls.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig(**options)).eval()
    except ValueError as error:
        if "nothing to quantize" not in str(error):
            raise
        pytest.skip("no layer of a kind that is quantized")
    assert any(isinstance(parameter, QTensor) for parameter in quantized.parameters())
    found, reference = run(quantized, arguments), copy.deepcopy(quantized)
    for module in reference.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, QTensor):
                module._parameters[name] = nn.Parameter(parameter.dequantize(), requires_grad=False)
    wanted = run(reference, arguments)
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        if one.shape == two.shape and two.isfinite().all():
            assert (one - two).norm() <= 2e-3 * two.norm() + 1e-6
    quantized.save_pretrained(tmp_path / "quantized")
    again = case.cls.from_pretrained(tmp_path / "quantized").eval()
    for one, two in zip(run(again, arguments), found, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True, atol=1e-6, rtol=1e-5)
