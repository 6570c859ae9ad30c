"""Calibration, observers and quantized activations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from requanto import explain
from requanto.dtypes.qtypes import qfloat8, qint8
from requanto.linear.cpu import library
from requanto.model.calibrate import Calibration
from requanto.model.quantize import freeze, quantization_map, quantize
from requanto.model.requantize import requantize
from requanto.nn import QActivation, QLayerNorm
from requanto.scales.observers import MseObserver, PercentileObserver, absmax_scale


class Net(nn.Module):
    """relu keeps codes, silu does not; LayerNorm feeds a Linear."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        x = F.relu(self.a(x))
        if x.sum() > -1e9:  # data-dependent: nothing could trace it
            x = x + F.silu(self.b(x))
        return self.c(self.norm(x))


def net(**arguments):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 64)
    wanted = model(x).detach()
    return quantize(model, **arguments), x, wanted


def relative(out, wanted):
    return float((out.detach() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.03), ("float8", 0.08)])
@pytest.mark.parametrize("frozen", [False, True], ids=["float", "frozen"])
def test_activations_are_quantized_on_the_fly_until_calibrated(kind, limit, frozen):
    model, x, wanted = net(weights="int8", activations=kind)
    if frozen:
        freeze(model)
    out = model(x)
    assert 1e-4 < relative(out, wanted) < limit
    # One token's values do not depend on its neighbours: each has its own scale.
    torch.testing.assert_close(model(x[:1]), out[:1], atol=1e-4, rtol=1e-4)
    outlier = torch.cat([x[:1], 1000 * x[1:2]])
    torch.testing.assert_close(model(outlier)[:1], out[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.06), ("float8", 0.1)])
@pytest.mark.parametrize("frozen_first", [False, True])
def test_calibration_finds_static_scales(kind, limit, frozen_first):
    model, x, wanted = net(weights="int8", activations=kind)
    if frozen_first:
        freeze(model)
    with Calibration():
        model(x)
    freeze(model)
    torch.testing.assert_close(model.a.input_scale, absmax_scale(x, model.a.activation_qtype))
    assert isinstance(model.norm, QLayerNorm)
    assert relative(model(x), wanted) < limit
    # Static: an input beyond what calibration saw saturates.
    assert relative(model(1e6 * x), model(1e8 * x)) < 1e-2


def test_streamline_keeps_output_codes_only_where_they_are_read():
    model, x, _ = net(weights="int8", activations="int8")
    with Calibration():
        model(x)
    # a -> relu (keeps codes) -> b reads them; b -> silu is float; norm -> c reads them; c is the result
    assert [m.quantizes_output for m in (model.a, model.b, model.norm, model.c)] == [True, False, True, False]
    assert isinstance(model.a(x), QActivation)
    assert type(model(x)) is torch.Tensor
    model, x, _ = net(weights="int8", activations="int8")
    with Calibration(streamline=False):
        model(x)
    assert isinstance(model(x), QActivation)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_momentum_given_is_the_one_used_for_inputs_and_outputs(momentum):
    layer = quantize(nn.Linear(8, 8), weights="int8", activations="int8")
    one, two = torch.randn(4, 8), 5 * torch.randn(4, 8)
    with Calibration(momentum=momentum):
        layer(one)
        first_out = layer.output_scale.clone()
        out = layer.weight.detach()  # not under test
        layer(two)
    scales = [absmax_scale(t) for t in (one, two)]
    torch.testing.assert_close(layer.input_scale, momentum * scales[0] + (1 - momentum) * scales[1])
    assert out.shape == (8, 8)
    if momentum == 0:
        assert not torch.equal(layer.output_scale, first_out)


def test_scales_are_saved_and_reloaded_with_what_streamlining_found():
    model, x, _ = net(weights="int8", activations="int8")
    with Calibration():
        model(x)
    freeze(model)
    wanted = model(x)
    with torch.device("meta"):
        empty = Net()
    requantize(empty, model.state_dict(), quantization_map(model))
    assert torch.equal(empty(x), wanted)
    assert not empty.b.quantizes_output
    other, _, _ = net(weights="int8", activations="int8")
    freeze(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), wanted)
    assert torch.equal(copy.deepcopy(model)(x), wanted)


def test_observers_are_chosen_by_name_or_given_as_a_function():
    seen = []

    def mine(values, kind):
        seen.append(kind)
        return values.abs().mean()

    layer = quantize(nn.Linear(8, 8), weights="int8", activations="int8")
    x = torch.randn(4, 8)
    with Calibration(observer=mine):
        layer(x)
    assert seen == [qint8, qint8]
    torch.testing.assert_close(layer.input_scale, x.abs().mean())
    with pytest.raises(ValueError, match="unknown observer 'median'; known: absmax, percentile, mse"):
        Calibration(observer="median")


def test_percentile_and_mse_observers_give_an_outlier_less_weight():
    torch.manual_seed(0)
    values = torch.randn(100_000)
    values[0] = 100.0
    assert PercentileObserver(99.9)(values, qint8) < absmax_scale(values) / 10

    def error(scale):
        return float(((values / scale).round().clamp(-128, 127) * scale - values).square().mean())

    for observer in (MseObserver(), MseObserver(10)):
        assert error(observer(values, qint8)) < error(absmax_scale(values))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.floats(1e-3, 1e3), st.sampled_from([qint8, qfloat8]))
def test_every_observer_gives_a_positive_scale_no_larger_than_absmax(count, spread, kind):
    values = spread * torch.randn(count, generator=torch.Generator().manual_seed(count))
    top = absmax_scale(values, kind) * 1.0001
    for observer in (absmax_scale, PercentileObserver(), MseObserver(8)):
        assert 0 < float(observer(values, kind)) <= top


def test_calibrating_a_weight_only_model_is_an_error():
    model = quantize(nn.Sequential(nn.Linear(8, 8)), weights="int8")
    freeze(model)
    with pytest.raises(ValueError, match="nothing was calibrated"), Calibration():
        model(torch.randn(1, 8))


def test_samples_with_nan_and_batches_of_zeros():
    layer = quantize(nn.Linear(8, 8, bias=False), weights="int8", activations="int8")
    layer.name = "up"
    with pytest.raises(ValueError, match="the input of up contains NaN"), Calibration():
        layer(torch.full((1, 8), float("nan")))
    layer = quantize(nn.Linear(8, 8, bias=False), weights="int8", activations="int8")
    with Calibration():
        layer(torch.zeros(1, 8))
    assert torch.equal(layer(torch.zeros(1, 8)), torch.zeros(1, 8))


def test_an_error_inside_leaves_no_hooks_behind():
    from torch.nn.modules import module as torch_module

    before = len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)
    with pytest.raises(RuntimeError, match="mine"), Calibration():
        raise RuntimeError("mine")
    assert (len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)) == before


def test_weights_are_quantized_once_for_all_batches_and_scales_are_those_of_the_frozen_model(monkeypatch):
    model, x, _ = net(weights="float8", activations="float8")
    frozen = copy.deepcopy(model)
    freeze(frozen)
    batches = [x, 2 * x, torch.randn_like(x)]
    for calibrated in (model, frozen):
        with Calibration(), torch.no_grad():
            for batch in batches:
                calibrated(batch)
    for one, two in zip(model.buffers(), frozen.buffers(), strict=True):
        torch.testing.assert_close(one, two)  # a packed weight's sums have another order

    calls = []
    quantized = type(model.a).quantized
    monkeypatch.setattr(type(model.a), "quantized", lambda *arguments: calls.append(1) or quantized(*arguments))
    with torch.no_grad(), Calibration():
        for batch in batches:
            model(batch)
    assert len(calls) == 3  # linear layers
    with torch.no_grad():
        before = model(x)
        model.c.weight.data.mul_(2)  # a change that leaves no trace on the tensor's version
        assert not torch.equal(model(x), before)
    with Calibration():
        model(x).sum().backward()
    assert model.a.weight.grad is not None


def test_bad_momentum_is_refused():
    with pytest.raises(ValueError, match="momentum"):
        Calibration(momentum=1)


def test_gradients_reach_weights_through_quantized_activations():
    model, x, _ = net(weights="int8", activations="int8")
    with Calibration():
        model(x)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_activations_alone_can_be_quantized():
    model, x, wanted = net(activations="int8")
    assert 1e-4 < relative(model(x), wanted) < 0.03
    assert quantization_map(model)["a"] == {"weights": "none", "activations": "qint8"}


def test_explain_knows_static_scales():
    model = quantize(nn.Sequential(nn.Linear(256, 256).bfloat16()), weights="int8", activations="int8")
    freeze(model)
    x = torch.randn(4, 256).bfloat16()
    (dynamic,) = explain(model, rows=4)
    assert dynamic.weight == "int8, int8 activations"
    with Calibration():
        model(x)
    (static,) = explain(model, rows=4)
    assert static.weight == "int8, int8 activations with a static scale"
    with torch.no_grad():
        model(x)
    assert explain(model, rows=4) == [static]
    assert static.layout == model[0].weight.layout_name
    if library.find() is not None:
        assert static.implementation == "cpu-coded"
