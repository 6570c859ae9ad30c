"""optimum-quanto's tensors and modules under its names; the same numbers come out of the real package in
integration_tests/test_quanto_files.py."""

import copy
import io

import pytest
import torch
from torch import nn

from requanto.integrations import optimum_quanto as oq
from requanto.integrations.optimum_quanto.quantize import requantize
from requanto.scales.quanto import group_size_rule


def test_packing_is_split_along_the_first_axis():
    codes = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.uint8)
    packed = oq.PackedTensor.pack(codes, 4)
    assert packed._data.tolist() == [[0b01000000, 0b01010001], [0b00000010, 0b00000011]]
    assert torch.equal(packed.unpack(), codes)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("bits", [2, 4])
def test_packing_keeps_every_number_of_rows(rows, bits):
    codes = torch.randint(0, 2**bits, (rows, 6), dtype=torch.uint8)
    assert torch.equal(oq.PackedTensor.pack(codes, bits).unpack(), codes)


@pytest.mark.parametrize(
    ("shape", "group"),
    [((4, 128), None), ((4, 256), 128), ((4, 160), 32), ((4, 192), 96), ((4, 130), None), ((8, 32, 3, 3), 96)],
)
def test_the_group_rule(shape, group):
    assert group_size_rule(shape) == group


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("kind", ["qint2", "qint4"])
@pytest.mark.parametrize("shape", [(1, 2, 7, 20), (2, 1, 5, 16), (1, 1, 1, 6)])
def test_cache_tensors_of_any_size_are_quantized_in_groups(shape, kind, axis):
    torch.manual_seed(0)
    t = torch.randn(shape)
    scale, shift = oq.MaxOptimizer()(t, oq.qtypes[kind], axis, 64)
    q = oq.quantize_weight(t, oq.qtypes[kind], axis, scale, shift, 64)
    assert q.shape == t.shape
    # Rounding to 2^b - 1 steps between minimum and maximum is off by half a step at the most.
    assert (q.dequantize() - t).abs().max() <= scale.max() / 2 + 1e-6


def test_weights_refuse_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"group_size \(48\) must divide the 64"):
        oq.MaxOptimizer()(torch.randn(4, 64), oq.qint4, 0, 48)


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4", "qint2"])
def test_a_frozen_layer_copies_moves_casts_and_pickles(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    oq.quantize(model, weights=oq.qtypes[kind])
    oq.freeze(model)
    x = torch.randn(3, 64)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    with torch.inference_mode():
        assert torch.equal(model(x), wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), wanted)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half[0].weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4", "qint2"])
def test_state_dict_keys_and_requantize(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 1))
    oq.quantize(model, weights=kind, exclude="2" if kind in ("qint2", "qint4") else None)
    oq.freeze(model)
    state = model.state_dict()
    small = kind in ("qint2", "qint4")
    parts = {"_data._data", "_scale", "_shift"} if small else {"_data", "_scale"}
    assert {key.removeprefix("0.weight.") for key in state if key.startswith("0.weight")} == parts
    assert state["0.input_scale"] == state["0.output_scale"] == 1
    if not small:
        assert state["2.weight._scale"].shape == ()
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 1))
    requantize(other, state, oq.quantization_map(model))
    x = torch.randn(3, 256)
    assert torch.equal(other(x), model(x))
    assert oq.quantization_map(other) == oq.quantization_map(model)


def test_training_with_quantized_weights_and_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    oq.quantize(model, weights="qint8", activations="qint8")
    x = torch.randn(32, 16)
    with oq.Calibration():
        model(x)
    first = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = model(x)
    (out.dequantize() if hasattr(out, "qtype") else out).square().mean().backward()
    optimizer.step()
    assert not torch.equal(first, model[0].weight)
    oq.freeze(model)
    assert isinstance(model[0].weight, oq.WeightQBytesTensor)


def test_quantizing_a_frozen_model_to_another_type_is_an_error():
    model = nn.Sequential(nn.Linear(16, 4))
    oq.quantize(model, weights="qint8")
    oq.freeze(model)
    with pytest.raises(ValueError, match="already frozen as qint8"):
        oq.quantize(model, weights="qint4")
    assert oq.quantization_map(model)["0"]["weights"] == "qint8"


def test_a_layer_with_one_output_can_be_quantized_to_four_bits():
    layer = nn.Linear(64, 1)  # optimum-quanto 0.2.7 gives NaN here
    reference = layer.weight.detach().clone()
    oq.quantize(layer, weights="qint4")
    oq.freeze(layer)
    assert (layer.weight.dequantize() - reference).abs().max() < 0.02


@pytest.mark.parametrize("call", [lambda a: a.t(), lambda a: a.view(-1), lambda a: a[1:], lambda a: a * 2, torch.relu])
def test_activations_keep_their_codes_where_that_is_exact(call):
    t = torch.randn(6, 4)
    a = oq.quantize_activation(t, oq.qint8, oq.absmax_scale(t))
    out = call(a)
    assert isinstance(out, oq.ActivationQBytesTensor)
    torch.testing.assert_close(out.dequantize(), call(a.dequantize()))
    assert type(torch.exp(a)) is torch.Tensor


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4", "qint2"])
def test_rows_of_zeros_stay_zero(kind):
    layer = nn.Linear(64, 4)  # optimum-quanto 0.2.7 gives NaN for float8
    layer.weight.data[1] = 0
    oq.quantize(layer, weights=kind)
    oq.freeze(layer)
    assert torch.equal(layer.weight.dequantize()[1], torch.zeros(64))
    assert torch.isfinite(layer.weight.dequantize()).all()
