"""Whole zero points: what the stored parts mean, what they cost, and every operation on such a weight."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint import CheckpointError, flatten, rebuild, spec_text
from requanto.checkpoint.foreign.quanto_files import from_qtensor, to_qtensor
from requanto.config.config import format_version_of
from requanto.dtypes.bit_packing import unpack
from requanto.scales.compact import around_zero, fit_scale, whole_zeros
from requanto.scales.search import minmax
from requanto.tensor.lowrank import State, scale_rows
from requanto.tensor.sharding import join_weights, slice_weight

#: (type, group, bits of scales)
FORMS = [
    ("int4", 32, None),
    ("int4", 32, 8),
    ("int4", None, None),
    ("int3", 32, None),
    ("int2", 32, 4),
    ("uint8", 32, None),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(*shape[:-1], 1, generator=generator) + 0.1
    return (0.02 * spread * torch.randn(*shape, generator=generator)).to(dtype)


def make(form, *shape, dtype=torch.float32, **options):
    kind, group, bits = form
    return QTensor.quantize(
        weights(*shape, dtype=dtype), kind, group_size=group, scale_bits=bits, zero_point="integer", **options
    )


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_stored_parts_mean(form, dtype):
    """The documented formula, in float64, from the stored bytes alone."""
    tensor = make(form, 6, 160, dtype=dtype)
    parts, bits, groups = tensor.inner_tensors(), tensor.qtype.bits, 160 // (form[1] or 160)
    assert parts["shift"].dtype == torch.uint8
    assert parts["shift"].shape == (6, -(-groups * bits // 8))
    assert "zeros" in spec_text(tensor).split()

    def codes(part, count):
        return (part if count == 8 else unpack(part, count, groups)).double()

    scale = parts["scale"].double() if form[2] is None else codes(parts["scale"], form[2]) * parts["row_scale"].double()
    zeros = codes(parts["shift"], bits)
    each = 160 // groups
    wanted = scale.repeat_interleave(each, 1) * (tensor.codes().double() - zeros.repeat_interleave(each, 1))
    assert relative(tensor.dequantize(torch.float64), wanted) < 1e-6
    assert tensor.scale.dtype == tensor.shift.dtype == torch.float32
    torch.testing.assert_close(tensor.shift.double(), tensor.scale.double() * zeros, rtol=1e-6, atol=0)


@given(
    st.sampled_from(FORMS),
    st.integers(1, 5),
    st.sampled_from([32, 64, 160]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_zero_is_exact_and_no_weight_is_far_from_its_value(form, rows, length, dtype, seed):
    kind, group, bits = form
    weight = weights(rows, length, seed=seed, dtype=dtype)
    weight[:, ::3] = 0
    tensor = QTensor.quantize(weight, kind, group_size=group, scale_bits=bits, zero_point="integer", search="minmax")
    values = tensor.dequantize(torch.float32)
    assert not values[:, ::3].any()
    if bits is None:  # half a step, and another half at the ends, which the rounded zero point and the refit move
        step = tensor.scale.repeat_interleave(length // tensor.groups, 1)
        assert ((values - weight.float()).abs() <= 1.6 * step).all()


@pytest.mark.parametrize(("kind", "most"), [("int4", 1.06), ("int3", 1.15)])
def test_little_is_lost_beside_float_shifts(kind, most):
    weight = weights(64, 512)
    whole, floats = (QTensor.quantize(weight, kind, zero_point=value) for value in ("integer", "float"))
    assert relative(whole.dequantize(), weight) < most * relative(floats.dequantize(), weight)
    assert not floats.zeros


def test_what_they_cost():
    tensor = QTensor.quantize(weights(16, 1024, dtype=torch.bfloat16), "int4", zero_point="integer")
    assert tensor.bits_per_weight == 4 + (16 + 4) / 64
    assert "whole zero points" in repr(tensor)
    few = QTensor.quantize(weights(16, 1024, dtype=torch.bfloat16), "int4", zero_point="integer", scale_bits=8)
    assert few.bits_per_weight == 4 + (8 + 4) / 64 + 16 / 1024


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_zeros_of_one_sign_and_of_equal_weights(form, dtype):
    weight = weights(5, 128, dtype=dtype)
    weight[0] = 0
    weight[1, 32:64] = 0
    weight[2] = weight[2].abs() + 0.01
    weight[3] = 0.5
    kind, group, bits = form
    tensor = QTensor.quantize(weight, kind, group_size=group, scale_bits=bits, zero_point="integer")
    values = tensor.dequantize()
    assert not values[0].any()
    assert not values[1, 32:64].any()
    assert relative(values[3], weight[3]) < 0.005
    assert relative(values[2], weight[2]) < {8: 0.03, 4: 0.2, 3: 0.3, 2: 0.5}[tensor.qtype.bits]


def test_the_scale_is_fitted_to_the_rounded_zero_point():
    weight = weights(64, 512)
    kind = requanto.qtypes["qint4"]
    scale, shift = around_zero(*minmax(weight.view(64, 8, 64), kind, True), kind)
    zeros = whole_zeros(scale, shift, kind)

    def error(scale):
        values = (weight.view(64, 8, 64) / scale.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, 15)
        values = (values - zeros.unsqueeze(-1)) * scale.unsqueeze(-1)
        return (weight.view(64, 8, 64).abs().sqrt() * (values - weight.view(64, 8, 64)).square()).sum(-1)

    fitted = fit_scale(weight.view(64, 8, 64), scale, zeros, kind)
    assert error(fitted).sum() < 0.97 * error(scale).sum()
    stored = QTensor.quantize(weight, "int4", zero_point="integer", search="minmax")
    torch.testing.assert_close(stored.scale, fitted)


def test_weights_on_such_a_grid_lose_nothing():
    """As those of GPTQ, AWQ and ONNX files are."""
    first = QTensor.quantize(weights(32, 256), "int4", zero_point="integer", search="minmax")
    values = first.dequantize()
    again = QTensor.quantize(values, "int4", zero_point="integer")
    assert relative(again.dequantize(), values) < 1e-6


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize("form", FORMS)
def test_gemms_and_gradients(form):
    tensor, x = make(form, 12, 96), weights(7, 96, seed=1).requires_grad_()
    meaning = tensor.dequantize(torch.float64)
    out = F.linear(x, tensor)
    assert relative(out, x.double() @ meaning.T) < 1e-6
    out.sum().backward()
    assert relative(x.grad, meaning.sum(0).expand(7, -1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_packed_for_the_cpu(dtype, rows):
    layer = nn.Linear(1024, 512, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(
        make(("int4", 64, None), 512, 1024, dtype=dtype, column_scale=True), requires_grad=False
    )
    plain, x = layer.weight.clone(), weights(rows, 1024, seed=1, dtype=dtype)
    wanted = x.double() @ plain.dequantize(torch.float64).T
    for _ in range(3):
        assert relative(layer(x), wanted) < 1e-2  # x is rounded
    assert torch.equal(copy.deepcopy(layer.weight), plain)
    layer.weight.unpack()
    assert torch.equal(layer.weight.inner_tensors()["shift"], plain.inner_tensors()["shift"])


@pytest.mark.parametrize("form", FORMS)
def test_views_copies_and_files(form):
    tensor = make(form, 12, 128)
    whole = tensor.dequantize()
    assert torch.equal(tensor[2:7].dequantize(), whole[2:7])
    assert torch.equal(tensor[:, 32:96].dequantize(), whole[:, 32:96])
    assert torch.equal(tensor[torch.tensor([3, 0])].dequantize(), whole[[3, 0]])
    assert torch.equal(tensor.t().dequantize(), whole.t())
    buffer = io.BytesIO()
    torch.save(nn.Parameter(tensor, requires_grad=False), buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(tensor), tensor.clone(), torch.load(buffer, weights_only=True)):
        assert torch.equal(again, tensor)
        assert again.spec() == tensor.spec()
        assert again.zeros
    into = torch.empty_like(tensor)
    into.copy_(weights(12, 128))  # a float source is quantized as the target is
    assert relative(into.dequantize(), tensor.dequantize()) < 1e-6
    with pytest.raises(ValueError, match="unlike quantized weights"):
        QTensor.quantize(weights(12, 128), form[0], group_size=form[1], scale_bits=form[2]).copy_(tensor)
    with pytest.raises(AttributeError, match=r"a shift that is stored in . bits cannot be set"):
        tensor.shift = tensor.shift


@pytest.mark.parametrize("form", FORMS)
def test_experts_and_embeddings(form):
    experts = make(form, 3, 12, 64)
    assert torch.equal(experts[1].dequantize(), experts.dequantize()[1])
    table, rows = make(form, 12, 64), torch.tensor([[0, 11], [5, 5]])
    assert torch.equal(F.embedding(rows, table), table.dequantize()[rows])


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_inside_a_group(form):
    tensor = make(form, 6, 96)
    left, right = slice_weight(tensor, 1, 0, 48), slice_weight(tensor, 1, 48, 96)
    assert torch.equal(torch.cat([left.dequantize(), right.dequantize()], 1), tensor.dequantize())
    assert torch.equal(join_weights([left, right], 1).dequantize(), tensor.dequantize())
    assert torch.equal(join_weights([tensor[:2], tensor[2:]], 0), tensor)
    assert torch.equal(torch.cat([tensor[:2], tensor[2:]]).dequantize(), tensor.dequantize())


@pytest.mark.parametrize("form", FORMS)
def test_scaling_rows_is_exact_and_can_be_undone(form):
    tensor, factor = make(form, 6, 96), torch.rand(6) + 0.5
    before, meaning = State.of(tensor), tensor.dequantize(torch.float64)
    scale_rows(tensor, factor)
    assert relative(tensor.dequantize(torch.float64), meaning * factor.double().unsqueeze(1)) < 1e-6
    before.restore(tensor)
    assert torch.equal(tensor.dequantize(torch.float64), meaning)
    tensor.mul_(2)
    assert torch.equal(tensor.dequantize(torch.float64), 2 * meaning)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_it_is_one_graph(form):
    torch._dynamo.reset()
    layer = nn.Linear(64, 12).requires_grad_(False)
    layer.weight = nn.Parameter(make(form, 12, 64), requires_grad=False)
    x = weights(3, 64, seed=1)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


# ---------------------------------------------------------------------- stored


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_in_the_format(form):
    tensor = make(form, 6, 96)
    line = spec_text(tensor)
    assert format_version_of({"w": line}) == 3
    parts = {key.removeprefix("w_"): part for key, part in flatten({"w": tensor}).items()}
    assert torch.equal(rebuild("w", line, parts, torch.float32), tensor)
    with pytest.raises(CheckpointError, match=r"w_shift: found torch\.float32 .*, expected torch\.uint8"):
        rebuild("w", line, parts | {"shift": parts["shift"].float()}, torch.float32)
    with pytest.raises(CheckpointError, match="zeros are whole zero points of affine codes"):
        rebuild("w", line.replace(" affine", ""), parts, torch.float32)


def test_optimum_quantos_format_takes_them_as_float_shifts():
    tensor = make(("int4", 128, None), 12, 256)
    again = to_qtensor(from_qtensor(tensor, "w"), tensor.qtype, tensor.shape, "w")
    assert not again.zeros
    assert relative(again.dequantize(), tensor.dequantize()) < 1e-6


def test_in_a_config():
    assert "zero_point" not in QuantoConfig(weights="int4").to_dict()  # earlier versions read such a config
    assert QuantoConfig(weights="int4", zero_point="float") == QuantoConfig(weights="int4")
    config = QuantoConfig(weights="int4", zero_point="integer", modules={"*.0": "int8", "*.1": {"zero_point": None}})
    assert QuantoConfig.from_dict(config.to_dict()) == config
    assert [config.choice_for(p).zero_point for p in (None, "*.0", "*.1")] == ["integer", None, None]


@pytest.mark.parametrize("value", ["whole", True, 1, ""])
def test_another_value_is_refused(value):
    for function in (
        lambda: QTensor.quantize(weights(4, 64), "int4", zero_point=value),
        lambda: QuantoConfig(weights="int4", zero_point=value),
        lambda: QuantoConfig(weights="int4", modules={"a": {"zero_point": value}}),
        lambda: requanto.quantize(nn.Linear(64, 64), "int4", zero_point=value),
    ):
        with pytest.raises(ValueError, match=r"zero_point.* must be 'integer', 'float' or None, found"):
            function()


@pytest.mark.parametrize(
    "how", [{"kind": "int8"}, {"kind": "nf4"}, {"kind": "int4", "symmetric": True}, {"kind": "uint1"}]
)
def test_types_without_a_shift_are_refused(how):
    kind = how.pop("kind")
    with pytest.raises(ValueError, match=f"zero_point='integer' needs a type with a shift.* found q?{kind}"):
        QTensor.quantize(weights(4, 64), kind, zero_point="integer", **how)
    with pytest.raises(ValueError, match="zero_point='integer' needs a type with a shift"):
        QuantoConfig(weights=kind, zero_point="integer", **how).choice_for(None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))


@pytest.mark.parametrize("bits", [None, 8])
def test_quantize_map_and_requantize(bits):
    model, x = network(), torch.randn(5, 64)
    requanto.quantize(model, weights="int4", group_size=16, scale_bits=bits, zero_point="integer")
    unfrozen = requanto.quantization_map(model)
    assert unfrozen["0"]["zero_point"] == "integer"
    trained = model(x)
    requanto.freeze(model)
    torch.testing.assert_close(model(x), trained)
    assert model[0].weight.zeros
    qmap = requanto.quantization_map(model)
    for state in (model.state_dict(), flatten(model.state_dict())):
        assert torch.equal(requanto.requantize(network(), state, qmap)(x), model(x))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_with_samples(method, bits):
    model, x = network(), torch.randn(200, 64)
    wanted = model(x).detach()
    options = {"iterations": 5} if method == "signround" else {}
    requanto.quantize(
        model, "int4", group_size=16, scale_bits=bits, zero_point="integer", method=method, method_options=options,
        calibration=[x], progress=False,
    )  # fmt: skip
    assert model[0].weight.zeros
    plain = network()
    requanto.quantize(plain, "int4", group_size=16, scale_bits=bits, zero_point="integer")
    requanto.freeze(plain)
    assert relative(model(x), wanted) < relative(plain(x), wanted)
