"""Scales and shifts in few bits: what the codes mean, what they cost, edge cases, and every operation on such a weight."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint import CheckpointError, flatten, rebuild, spec_text
from requanto.config.config import format_version_of
from requanto.dtypes.bit_packing import unpack
from requanto.scales.compact import round_scales
from requanto.tensor.lowrank import State, scale_rows
from requanto.tensor.sharding import join_weights, slice_weight

#: (type, symmetric, bits of scales)
FORMS = [
    ("int4", None, 8),
    ("int4", None, 4),
    ("int4", True, 6),
    ("int2", None, 4),
    ("int2", True, 5),
    ("int8", None, 8),
    ("float8", None, 7),
]


def weights(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # Rows and groups of different sizes, as real weights have them.
    spread = torch.rand(*shape[:-1], 1, generator=generator) + 0.1
    return (0.02 * spread * torch.randn(*shape, generator=generator)).to(dtype)


def make(form, *shape, group=32, **options):
    kind, symmetric, bits = form
    return QTensor.quantize(weights(*shape), kind, group_size=group, symmetric=symmetric, scale_bits=bits, **options)


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("form", FORMS)
def test_what_the_stored_parts_mean(form):
    """The documented formula, in float64, from the stored bytes alone."""
    tensor, bits = make(form, 6, 160), form[2]
    parts = tensor.inner_tensors()
    assert parts["scale"].dtype == torch.uint8
    assert parts["row_scale"].shape == (6, 1)

    def codes(part):
        return (part if bits == 8 else unpack(part, bits, 5)).double()

    scale = (codes(parts["scale"]) * parts["row_scale"].double()).repeat_interleave(32, 1)
    values = tensor.codes().double()
    if tensor.affine:
        step = 2.0 ** (tensor.qtype.bits - bits)
        values = values - (codes(parts["shift"]) * step).repeat_interleave(32, 1)
    elif tensor.qtype.is_packed:
        values = values - 2 ** (tensor.qtype.bits - 1)
    assert relative(tensor.dequantize(torch.float64), scale * values) < 1e-6
    assert tensor.scale.dtype == torch.float32
    assert tensor.scale.shape == (6, 5)


@pytest.mark.parametrize("kind", ["int4", "int2", "int8", "float8"])
@pytest.mark.parametrize("symmetric", [None, True])
def test_eight_bits_lose_next_to_nothing(kind, symmetric):
    symmetric = None if kind in ("int8", "float8") else symmetric
    weight = weights(64, 256)
    full = QTensor.quantize(weight, kind, group_size=32, symmetric=symmetric)
    few = QTensor.quantize(weight, kind, group_size=32, symmetric=symmetric, scale_bits=8)
    assert relative(few.dequantize(), weight) <= 1.03 * relative(full.dequantize(), weight)
    assert few.nbytes < full.nbytes


def test_codes_are_chosen_after_the_scales_were_rounded():
    """No weight is more than half a step (a rounded one) from its value, except beyond the ends of the range."""
    weight = weights(32, 256)
    tensor = QTensor.quantize(weight, "int4", group_size=32, scale_bits=4)
    step = tensor.scale.repeat_interleave(32, 1)
    codes = tensor.codes()
    inside = (codes > 0) & (codes < 15)
    assert ((tensor.dequantize() - weight).abs() <= 0.5001 * step)[inside].all()


@pytest.mark.parametrize(
    ("kind", "group", "bits", "cost"), [("int4", 64, 8, 4.25), ("int4", 32, 4, 4.25), ("int2", 16, 4, 2.5)]
)
def test_what_they_cost(kind, group, bits, cost):
    tensor = QTensor.quantize(weights(16, 1024, dtype=torch.bfloat16), kind, group_size=group, scale_bits=bits)
    assert tensor.bits_per_weight == cost + 16 / 1024  # and the row's own scale
    assert f"scales in {bits} bits" in repr(tensor)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_groups_on_one_side_of_zero(kind, bits):
    """The range reaches to 0 then: coarser, and never worse than its step."""
    weight = torch.stack([torch.linspace(1.0, 1.5, 64), -torch.linspace(1.0, 1.5, 64)])
    tensor = QTensor.quantize(weight, kind, group_size=32, scale_bits=bits)
    assert (tensor.dequantize() - weight).abs().max() <= 0.5 * 1.5 / (2**tensor.qtype.bits - 1) * 1.15


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_and_rows_of_zeros_stay_zero(form, dtype):
    kind, symmetric, bits = form
    weight = weights(4, 128, dtype=dtype)
    weight[0] = 0
    weight[1, 32:64] = 0
    tensor = QTensor.quantize(weight, kind, group_size=32, symmetric=symmetric, scale_bits=bits)
    values = tensor.dequantize()
    assert torch.equal(values[0], weight[0])
    assert torch.equal(values[1, 32:64], weight[1, 32:64])
    assert relative(values[2:], weight[2:]) < (0.8 if kind == "int2" else 0.2)


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_scales_of_any_size(value):
    weight = weights(4, 128) * value
    assert relative(QTensor.quantize(weight, "int4", group_size=32, scale_bits=8).dequantize(), weight) < 0.12


def test_equal_weights_are_kept():
    weight = torch.full((2, 64), 0.5)
    assert relative(QTensor.quantize(weight, "int4", group_size=32, scale_bits=8).dequantize(), weight) < 0.005


def test_a_small_group_beside_a_large_one_has_a_scale():
    scale = torch.tensor([[1.0, 1e-9, 0.0]])
    codes = round_scales(scale, None, requanto.qtypes["qint4"], 8).scale
    assert codes.tolist() in ([[255, 1, 0]], [[254, 1, 0]])  # as the rounding of the row's own scale has it


def test_nan_is_refused():
    weight = weights(4, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or Inf in 1 of 8 groups"):
        QTensor.quantize(weight, "int4", group_size=32, scale_bits=8)


def test_one_scale_a_row_stays_as_it_is():
    tensor = QTensor.quantize(weights(4, 64), "int8", scale_bits=8)
    assert tensor.scale_bits is None
    assert tensor.scale.dtype == torch.float32


@pytest.mark.parametrize("value", [3, 9, 8.0, "8", True])
def test_bits_out_of_range(value):
    with pytest.raises(ValueError, match="scale_bits must be 4 to 8, or 16 or None"):
        QTensor.quantize(weights(4, 64), "int4", scale_bits=value)
    with pytest.raises(ValueError, match="scale_bits must be 4 to 8, or 16 or None"):
        QuantoConfig(weights="int4", scale_bits=value)


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize("form", FORMS)
def test_products_and_gradients(form):
    tensor, x = make(form, 12, 96), weights(7, 96, seed=1).requires_grad_()
    meaning = tensor.dequantize(torch.float64)
    out = F.linear(x, tensor)
    assert relative(out, x.double() @ meaning.T) < 1e-6
    out.sum().backward()
    assert relative(x.grad, meaning.sum(0).expand(7, -1)) < 1e-6
    with torch.no_grad():
        assert relative(x[:, :12] @ tensor, x[:, :12].double() @ meaning) < 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_views_copies_and_files(form):
    tensor = make(form, 12, 128)
    whole = tensor.dequantize()
    assert torch.equal(tensor[2:7].dequantize(), whole[2:7])
    assert torch.equal(tensor[:, 32:96].dequantize(), whole[:, 32:96])
    assert torch.equal(tensor[torch.tensor([3, 0])].dequantize(), whole[[3, 0]])
    assert torch.equal(tensor.t().dequantize(), whole.t())
    assert tensor.to(torch.bfloat16).scale_bits == tensor.scale_bits
    buffer = io.BytesIO()
    torch.save(nn.Parameter(tensor, requires_grad=False), buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(tensor), tensor.clone(), torch.load(buffer, weights_only=True)):
        assert torch.equal(again, tensor)
        assert again.spec() == tensor.spec()
    into = torch.empty_like(tensor)
    into.copy_(tensor)
    assert torch.equal(into, tensor)
    into.copy_(weights(12, 128))  # a float source is quantized as the target is
    assert torch.equal(into, tensor)
    with pytest.raises(ValueError, match="unlike quantized weights"):
        QTensor.quantize(weights(12, 128), form[0], group_size=32, symmetric=form[1]).copy_(tensor)


@pytest.mark.parametrize("form", FORMS)
def test_experts_and_embeddings(form):
    experts = make(form, 3, 12, 64)
    assert torch.equal(experts[1].dequantize(), experts.dequantize()[1])
    x, ends = weights(9, 64, seed=2), torch.tensor([2, 2, 9], dtype=torch.int32)
    out = F.grouped_mm(x.bfloat16(), experts.to(torch.bfloat16).transpose(1, 2), offs=ends)
    wanted = torch.cat(
        [x[:2].double() @ experts.dequantize()[0].T.double(), x[2:].double() @ experts.dequantize()[2].T.double()]
    )
    assert relative(out, wanted) < 1e-2
    table, rows = make(form, 12, 64), torch.tensor([[0, 11], [5, 5]])
    assert torch.equal(F.embedding(rows, table), table.dequantize()[rows])


@pytest.mark.parametrize("form", FORMS)
def test_a_cut_inside_a_group(form):
    """Tensor parallelism: both halves keep the group's scale and the row's."""
    tensor = make(form, 6, 96)
    left, right = slice_weight(tensor, 1, 0, 48), slice_weight(tensor, 1, 48, 96)
    assert torch.equal(torch.cat([left.dequantize(), right.dequantize()], 1), tensor.dequantize())
    joined = join_weights([left, right], 1)
    assert torch.equal(joined.dequantize(), tensor.dequantize())
    assert torch.equal(join_weights([slice_weight(tensor, 1, 0, 32), slice_weight(tensor, 1, 32, 96)], 1), tensor)
    assert torch.equal(join_weights([tensor[:2], tensor[2:]], 0), tensor)


@pytest.mark.parametrize("form", FORMS)
def test_scaling_rows_is_exact_and_can_be_undone(form):
    """What merging DoRA does."""
    tensor, factor = make(form, 6, 96), torch.rand(6) + 0.5
    before, meaning = State.of(tensor), tensor.dequantize(torch.float64)
    scale_rows(tensor, factor)
    assert relative(tensor.dequantize(torch.float64), meaning * factor.double().unsqueeze(1)) < 1e-6
    before.restore(tensor)
    assert torch.equal(tensor.dequantize(torch.float64), meaning)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_it_is_one_graph(form, backend):
    if backend == "inductor" and form != FORMS[1]:
        pytest.skip("one form through the whole compiler: the product is one operator in all of them")
    torch._dynamo.reset()
    layer = nn.Linear(64, 12).requires_grad_(False)
    layer.weight = nn.Parameter(make(form, 12, 64), requires_grad=False)
    x = weights(3, 64, seed=1)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))


def test_packed_for_the_cpu_it_is_the_same_and_turns_back():
    layer = nn.Linear(1024, 1024, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(QTensor.quantize(weights(1024, 1024), "int4", scale_bits=4), requires_grad=False)
    plain = layer.weight.clone()
    stored, x = layer.weight.nbytes, weights(1, 1024, seed=1)
    wanted = x.double() @ plain.dequantize(torch.float64).T
    assert relative(layer(x), wanted) < 1e-2  # x is rounded
    assert layer.weight.nbytes <= 1.02 * stored
    assert torch.equal(copy.deepcopy(layer.weight), plain)


# ---------------------------------------------------------------------- stored


@pytest.mark.parametrize("form", FORMS)
def test_there_and_back_in_the_format(form):
    tensor = make(form, 6, 96)
    line = spec_text(tensor)
    assert line.endswith(f"scales={form[2]}")
    parts = {key.removeprefix("w_"): part for key, part in flatten({"w": tensor}).items()}
    assert torch.equal(rebuild("w", line, parts, torch.float32), tensor)
    with pytest.raises(CheckpointError, match=r"needs the tensors .*w_row_scale"):
        rebuild("w", line, {k: v for k, v in parts.items() if k != "row_scale"}, torch.float32)
    with pytest.raises(CheckpointError, match=r"w_scale: found torch\.float32 .*, expected torch\.uint8"):
        rebuild("w", line, parts | {"scale": parts["scale"].float()}, torch.float32)
    parts["row_scale"].fill_(float("inf"))
    with pytest.raises(CheckpointError, match="w_row_scale holds NaN or Inf"):
        rebuild("w", line, parts, torch.float32)


def test_only_what_needs_it_is_of_version_2():
    few, full = (QTensor.quantize(weights(4, 128), "int4", scale_bits=bits) for bits in (8, None))
    assert format_version_of({"a": spec_text(full)}) == 1
    assert format_version_of({"a": spec_text(full), "b": spec_text(few)}) == 2
    assert "scale_bits" not in QuantoConfig(weights="int4").to_dict()  # what version 1 wrote, to the byte
    assert QuantoConfig(weights="int4", scale_bits=16) == QuantoConfig(weights="int4")
    config = QuantoConfig(weights="int4", modules={"*.0": {"weights": "int2", "scale_bits": 4}}, scale_bits=8)
    assert QuantoConfig.from_dict(config.to_dict()) == config
    assert (config.choice_for(None).scale_bits, config.choice_for("*.0").scale_bits) == (8, 4)


# ---------------------------------------------------------------------- quantize, freeze, requantize


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))


@pytest.mark.parametrize("weights_type", ["int4", "int2"])
def test_quantize_map_and_requantize(weights_type):
    model, x = network(), torch.randn(5, 64)
    requanto.quantize(model, weights=weights_type, group_size=16, scale_bits=8)
    unfrozen = requanto.quantization_map(model)
    assert unfrozen["0"]["scale_bits"] == 8
    model(x).sum().backward()  # training sees what freeze will keep
    trained = model(x)
    requanto.freeze(model)
    torch.testing.assert_close(model(x), trained)
    assert model[0].weight.scale_bits == 8
    qmap = requanto.quantization_map(model)
    assert qmap["2"] == unfrozen["2"] | {"symmetric": False}
    for state in (model.state_dict(), flatten(model.state_dict())):
        again = requanto.requantize(network(), state, qmap)
        assert torch.equal(again(x), model(x))
    broken = {name: {k: v for k, v in entry.items() if k != "scale_bits"} for name, entry in qmap.items()}
    with pytest.raises(CheckpointError, match=r"0\.weight is .* according to the map \(scale_bits=None\)"):
        requanto.requantize(network(), flatten(model.state_dict()), broken)


def test_an_optimizer_has_its_own_scales():
    with pytest.raises(ValueError, match="optimum-quanto's, which does not support scale_bits"):
        requanto.quantize(network(), weights="int4", optimizer=requanto.MaxOptimizer(), scale_bits=8)
