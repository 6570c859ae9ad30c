"""SignRound lowers the error of what a block puts out, from either start."""

import copy

import pytest

pytest.importorskip("transformers")

import tiny_models
import torch
from whole_models import error, logits, nearest, quiet, token_samples

import requanto
from requanto.config.config import LayerOptions
from requanto.config.plan import PlannedWeight
from requanto.methods.layers import Layer
from requanto.methods.scaling import nearest as round_nearest
from requanto.methods.tuning import SignRound, Tuned, distance


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_it_beats_what_it_starts_from(start):
    model, samples = tiny_models.TINY["llama"].build(), token_samples(8)
    expected = logits(model, samples)
    plain = copy.deepcopy(model)
    if start == "nearest":
        nearest(plain, weights="int2", exclude="lm_head")
    else:
        requanto.quantize(plain, weights="int2", exclude="lm_head", calibration=samples, **quiet)
    options = {"start": start, "iterations": 30, "batch": 4, "rate": 0.005}
    requanto.quantize(
        model,
        weights="int2",
        exclude="lm_head",
        calibration=samples,
        method="signround",
        method_options=options,
        **quiet,
    )
    assert error(model, samples, expected) < (0.8 if start == "nearest" else 0.98) * error(plain, samples, expected)
    assert not [m for m in model.modules() if "weight" in m.__dict__]


def test_float_codes_are_refused():
    with pytest.raises(ValueError, match="signround needs a type with integer codes, but weight is to be qfloat8"):
        requanto.quantize(torch.nn.Linear(8, 8), "float8", calibration=[torch.ones(2, 8)], method="signround")


@pytest.mark.parametrize(("kind", "symmetric"), [("int4", None), ("int2", None), ("int4", True), ("int8", None)])
def test_learning_begins_at_the_start_and_gradients_are_those_of_the_formula(kind, symmetric):
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 6, bias=False)
    layer = Layer("weight", PlannedWeight(LayerOptions(kind, 16, symmetric), 0, False, "linear"), [(linear, "weight")])
    grid, weight = layer.grid(), layer.weight()
    start = round_nearest(weight, torch.ones(32), grid, 16, 8)
    tuned = Tuned(layer, grid, start, weight)
    torch.testing.assert_close(tuned.rounded().values, start.values)
    tuned.begin()
    torch.testing.assert_close(tuned.leaf.detach(), start.values)
    tuned.leaf.grad = torch.randn(6, 32)
    tuned.end()
    wanted = tuned.leaf.grad.view(6, 2, 16) * start.scale[..., None]
    inside = (tuned.place > grid.low) & (tuned.place < grid.high)  # a clamped code has nowhere to go
    torch.testing.assert_close(tuned.offset.grad[inside], wanted[inside])
    codes = grid.codes(start.values.view(6, 2, 16), tuned.scale, tuned.shift)
    torch.testing.assert_close(tuned.stretch.grad, (wanted * codes).sum(-1, keepdim=True))
    if tuned.move is not None:
        torch.testing.assert_close(tuned.move.grad, -wanted.sum(-1, keepdim=True))


def test_the_tokens_with_the_largest_errors_do_not_count():
    target = torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(0))
    found = target + 0.1 * torch.randn(4, 50, 8, generator=torch.Generator().manual_seed(1))
    plain = float(distance([found], {0: target}))
    found[1, 7] += 100  # one of 200 tokens
    found.requires_grad_()
    assert float(distance([found], {0: target})) > 10 * plain
    filtered = distance([found], {0: target}, 0.005)
    assert float(filtered) == pytest.approx(plain, rel=0.05)
    filtered.backward()
    assert bool((found.grad[1, 7] == 0).all())
    assert bool((found.grad[1, 8] != 0).all())
    few = [found[0, :4]], {0: target[0, :4]}  # they all count
    assert float(distance(*few, 0.005)) == pytest.approx(float(distance(*few)))
    with pytest.raises(ValueError, match="ignored must be at least 0 and below 1"):
        SignRound(ignored=1.0)
