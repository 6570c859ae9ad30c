"""Fused experts with samples: each sees its own tokens, few tokens are enough, and all parts are put together again."""

import copy
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import tiny_models
from whole_models import error, logits, quiet, token_samples

from requanto.config.config import QuantoConfig
from requanto.methods import quantize_with_samples
from requanto.methods.experts import ExpertInputs, eager_experts
from requanto.methods.selection import find_layers
from requanto.report.calibrated import planned_for
from requanto.tensor.qtensor import QTensor


def built(name):
    model = tiny_models.TINY[name].build()
    model.set_experts_implementation("grouped_mm")
    return model


def only_experts(model, **options):
    """The plan of the fused experts, without the other layers."""
    planned = planned_for(model, QuantoConfig(**options))
    return {name: choice for name, choice in planned.items() if choice.kind == "experts"}


def rounded(model, planned):
    for name, choice in planned.items():
        parameter = model.get_parameter(name)
        parameter.data.copy_(choice.quantize(parameter, name).dequantize())
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixtral", {"weights": "int2", "group_size": 16}),
        ("gpt-oss", {"weights": "codebook3", "group_size": 16, "scale_bits": 4}),  # [experts, K, N]
        ("gpt-oss", {"weights": "int3", "group_size": 16, "column_scale": "root", "rotation": 16, "low_rank": 2}),
    ],
)
def test_calibrated_experts_beat_rounded_ones(name, options):
    model, samples = built(name), token_samples(4)
    expected = logits(model, samples)
    plain = error(rounded(copy.deepcopy(model), only_experts(model, **options)), samples, expected)
    planned = only_experts(model, **options)
    quantize_with_samples(model, planned, samples, "gptq", **quiet)
    found = {name: p for name, p in model.named_parameters() if isinstance(p, QTensor)}
    assert found.keys() == planned.keys()
    assert error(model, samples, expected) < 0.85 * plain
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}
    for parameter in found.values():
        assert parameter.column is not None or "column_scale" not in options
        assert (parameter.up is not None) == ("low_rank" in options)


def test_every_expert_sees_the_tokens_that_are_routed_to_it():
    model, samples = built("mixtral"), token_samples(2)
    layers = find_layers(model, only_experts(model, weights="int4"))[1]
    module, routed, seen = layers[0].places[0][0], [], {}

    def take(layer, expert, given):
        if layer is layers[0]:
            seen.setdefault(expert, []).append(given)

    hook = module.register_forward_pre_hook(lambda module, args: routed.append(args[:2]))
    with eager_experts(layers), ExpertInputs(layers, take):
        logits(model, samples)
    hook.remove()
    for expert in range(4):
        expected = torch.cat([states[(index == expert).any(-1)] for states, index in routed])
        found = torch.cat(seen[expert])  # in the order of another table
        torch.testing.assert_close(found.t() @ found, expected.t() @ expected, rtol=1e-4, atol=1e-3)


def test_experts_with_few_tokens_are_named_and_the_result_does_not_depend_on_how_many_fit_at_once(caplog, monkeypatch):
    model, samples = built("mixtral"), token_samples(1, 8)
    planned = only_experts(model, weights="int2", group_size=16)
    weights = []
    for most in (2**31, 1):  # all experts at once, and one at a time
        monkeypatch.setattr("requanto.methods.experts.MOST_BYTES", most)
        copied = copy.deepcopy(model)
        quantize_with_samples(copied, planned, samples, "gptq", **quiet)
        weights.append({n: p.dequantize() for n, p in copied.named_parameters() if isinstance(p, QTensor)})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert "4 of 4 experts saw fewer than 64 tokens" in caplog.text
    assert "(the fewest: 0)" not in caplog.text  # every expert has some
    assert "layers.0.mlp.experts.gate_up_proj" in caplog.text


class NoExperts(nn.Module):
    """Experts that no sample reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(16, 16), SomeExperts()

    def forward(self, x):
        return self.first(x)


class SomeExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 16, 16))


def test_experts_that_no_sample_reaches_are_named(caplog, tmp_path):
    from requanto.config.plan import plan

    torch.manual_seed(0)
    for _ in range(2):  # the second run continues from the finished layers of the first
        model = copy.deepcopy(NoExperts())
        torch.manual_seed(0)
        planned = plan(model, QuantoConfig(weights="int4", group_size=16))
        with caplog.at_level(logging.WARNING):
            torch.nn.init.constant_(model.experts.up_proj, 0.5)
            torch.nn.init.constant_(model.first.weight, 0.5)
            quantize_with_samples(model, planned, [torch.ones(4, 16)], "gptq", resume=tmp_path, **quiet)
        assert isinstance(model.experts.up_proj, QTensor)
    assert "experts.up_proj never saw an input: quantized without samples" in caplog.text
