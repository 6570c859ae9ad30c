"""NVFP4 and MX weights as tensors: parts, slices, joins, changes, and inputs that are rounded in blocks."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig, qtypes
from requanto.linear import choose, linear
from requanto.linear.registry import problem_of
from requanto.scales.blocks import round_blocks
from requanto.tensor import exact
from requanto.tensor.sharding import join_weights, slice_weight

TYPES = ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"]
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("kind", TYPES)
def test_parts_copies_and_descriptions(kind):
    weight = QTensor.quantize(randn(24, 64), kind)
    names = ["qdata", "scale", "row_scale"] if kind == "nvfp4" else ["qdata", "scale"]
    assert list(weight.inner_tensors()) == names
    assert weight._spec.words == f"q{kind} group={weight.group_size}"
    assert (weight.scale_bits, weight.shift, weight.codebook) == (None, None, None)
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(buffer, weights_only=True))
    for again in (*copies, weight.to(torch.bfloat16), weight.clone()):
        assert torch.equal(again, weight)
        assert torch.equal(again.scale, weight.scale)
    with pytest.raises(AttributeError, match="a scale that is stored in 8 bits cannot be set"):
        weight.scale = torch.ones_like(weight.scale)
    with pytest.raises(ValueError, match=f"w: scale_bits=4 does not fit q{kind}"):
        QTensor.quantize(randn(24, 64), kind, scale_bits=4, name="w")
    with pytest.raises(ValueError, match="symmetric"):
        QTensor.quantize(randn(24, 64), kind, symmetric=False)


@pytest.mark.parametrize("kind", TYPES)
def test_slices_and_joins_keep_every_value(kind):
    weight = QTensor.quantize(randn(24, 128), kind)
    whole = weight.dequantize()
    assert torch.equal(weight[3:9].dequantize(), whole[3:9])
    assert isinstance(weight[:, 32:96], QTensor)
    assert torch.equal(weight[:, 32:96].dequantize(), whole[:, 32:96])
    for dim in (0, 1):
        pieces = [slice_weight(weight, dim, 0, 8), slice_weight(weight, dim, 8, weight.shape[dim])]
        assert torch.equal(torch.cat([p.dequantize() for p in pieces], dim), whole)
        assert torch.equal(join_weights(pieces, dim).dequantize(), whole)
    # Weights whose tensors had other numbers, as the joined projections of attention.
    other = QTensor.quantize(30 * randn(8, 128, seed=1), kind)
    joined = torch.cat([weight, other])
    assert isinstance(joined, QTensor)
    assert torch.equal(joined.dequantize(), torch.cat([whole, other.dequantize()]))
    experts = torch.stack([weight, QTensor.quantize(5 * randn(24, 128, seed=2), kind)])
    assert torch.equal(experts[0].dequantize(), whole)


@pytest.mark.parametrize("kind", TYPES)
def test_rows_times_factors(kind):
    weight = QTensor.quantize(randn(24, 64), kind)
    before = weight.dequantize()
    factors = torch.exp2(torch.arange(24) % 5 - 2.0)
    exact.assign(weight, before * factors[:, None])
    assert torch.equal(weight.dequantize(), before * factors[:, None])
    assert not weight.rank
    weight.mul_(0.5)
    assert torch.equal(weight.dequantize(), before * factors[:, None] * 0.5)
    factors = 1 + torch.rand(24, 1, generator=torch.Generator().manual_seed(0))
    if kind == "nvfp4":
        exact.assign(weight, before * factors)
        torch.testing.assert_close(weight.dequantize(), before * factors)
    else:  # its scales are powers of two
        kept = weight.dequantize()
        with pytest.raises(NotImplementedError, match="changed without loss"):
            exact.assign(weight, before * factors)
        with pytest.raises(NotImplementedError, match="multiplied by powers of two only"):
            requanto.tensor.lowrank.scale_rows(weight, torch.full((24,), 1.3))
        assert torch.equal(weight.dequantize(), kept)
        exact.assign(weight, kept * 1.3)  # as a factor of all columns
        torch.testing.assert_close(weight.dequantize(), kept * 1.3)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activation", [None, "nvfp4", "mxfp8"])
@pytest.mark.parametrize("dtype", LIMITS)
def test_a_gemm_is_that_of_the_rounded_inputs(kind, activation, dtype):
    for shape, options in (
        ((17, 80), {}),
        ((64, 96), {"rotation": 32, "column_scale": "root"}),
        ((40, 32), {"low_rank": 2}),
    ):
        weight = QTensor.quantize(randn(*shape, dtype=dtype) / 9, kind, **options)
        x, bias = randn(2, 3, shape[1], seed=4, dtype=dtype), randn(shape[0], seed=5, dtype=dtype)
        if activation is not None:
            weight.activation = activation
        with torch.no_grad():
            found = F.linear(x, weight, bias)
        wide = weight.without_lowrank().dequantize(torch.float64)
        seen = x
        if "rotation" in options:
            # x is multiplied by the column scale, then rotated, then rounded.
            seen = requanto.scales.rotation.rotate((x * weight.column).to(dtype), 32)
            wide = weight.stored_values().double()
        seen = seen if activation is None else round_blocks(seen, requanto.dtypes.qtypes.resolve_qtype(activation))
        want = seen.double() @ wide.T + bias.double()
        if weight.rank:
            want += x.double() @ (weight.up.double() @ weight.down.double()).T
        assert found.dtype == dtype
        assert relative(found, want) < LIMITS[dtype]
        again = F.linear(x.requires_grad_(), weight, bias)  # as in training
        assert relative(again.detach(), want) < LIMITS[dtype]


def test_gradients_pass_the_rounding_and_other_ways_to_call_agree(exact):
    weight = QTensor.quantize(randn(16, 64), "int4")
    x = randn(5, 64, seed=1).requires_grad_()
    plain = torch.autograd.grad(F.linear(x, weight).sum(), x)[0]
    weight.activation = "nvfp4"
    assert torch.equal(torch.autograd.grad(F.linear(x, weight).sum(), x)[0], plain)
    x = x.detach()
    want = F.linear(x, weight)
    compiled = torch.compile(lambda value: F.linear(value, weight), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), want)
    torch.testing.assert_close(torch.func.vmap(lambda row: F.linear(row, weight))(x.view(5, 1, 64)).view(5, 16), want)
    assert relative(torch.func.grad(lambda value: F.linear(value, weight).sum())(x), plain) < 1e-6
    assert torch.equal(linear(x, weight), want)
    layer = nn.Linear(64, 16, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    with torch.no_grad():
        for _ in range(3):  # no later call may run a cached plan, which would skip the rounding
            assert torch.equal(layer(x), want)
    assert problem_of(weight, x.dtype, 5, weight.activation).activation is None
    assert choose(problem_of(weight, x.dtype, 5, weight.activation)).implementation.name.startswith("cpu")
    weight.activation = None
    assert not torch.equal(F.linear(x, weight), want)
    with pytest.raises(ValueError, match=r"nvfp4 activations have a scale for each block.*static input_scale"):
        linear(x, weight, activation=qtypes["qnvfp4"], input_scale=torch.ones(()))


def test_experts_embeddings_and_convolutions():
    experts = QTensor.quantize(randn(3, 16, 64), "nvfp4")
    x, offsets = randn(7, 64, seed=1), torch.tensor([2, 2, 7], dtype=torch.int32)
    found = F.grouped_mm(x, experts.transpose(1, 2), offs=offsets)
    values = experts.dequantize()
    assert relative(found, torch.cat([x[:2] @ values[0].T, x[2:] @ values[2].T])) < 1e-6
    table = QTensor.quantize(randn(20, 48), "mxfp4")
    assert torch.equal(F.embedding(torch.tensor([[3, 19]]), table), table.dequantize()[[3, 19]][None])
    kernel = QTensor.quantize(randn(8, 4, 3, 3), "nvfp4")
    image = randn(1, 4, 9, 9, seed=2)
    assert relative(F.conv2d(image, kernel), F.conv2d(image, kernel.dequantize())) < 1e-6
    assert kernel.group_size is None  # 36 weights a row: no block of 8 or 16 divides them


# ---------------------------------------------------------------------- a model


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 32)).to(dtype)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_quantize_with_activations_save_and_map(kind, tmp_path):
    made = model()
    x = randn(3, 64)
    requanto.quantize(made, weights=kind, activations=kind)
    before = made(x)  # rounded in each forward, until it is frozen
    requanto.freeze(made)
    assert torch.allclose(made(x), before, atol=1e-5)
    state, types = made.state_dict(), requanto.quantization_map(made, digests=True)
    fresh = model()
    requanto.requantize(fresh, {name: value.clone() for name, value in state.items()}, types)
    assert torch.equal(fresh(x), made(x))
    with pytest.raises(ValueError, match="nothing to calibrate; static scales are for int8"), requanto.Calibration():
        made(x)
    assert f"{kind} activations" in str(requanto.explain(made))


def test_configs():
    config = QuantoConfig(weights="nvfp4", activations="mxfp8", modules={"a.*": {"activations": "nvfp4"}})
    assert (config.weights, config.activations) == ("nvfp4", "mxfp8_e4m3")
    assert QuantoConfig.from_dict(config.to_dict()) == config
    assert config.choice_for("a.*").activations is qtypes["qnvfp4"]
    with pytest.raises(ValueError, match="must be None, 'int8', 'float8', 'nvfp4' or an MX type"):
        QuantoConfig(activations="nf4")
    with pytest.raises(ValueError, match="scale_bits=4 does not fit qmxfp4, whose scales have 8 bits"):
        QuantoConfig(weights="mxfp4", scale_bits=4)
    with pytest.raises(ValueError, match="'hqq' does not fit qnvfp4, which takes minmax or mse"):
        QuantoConfig(weights="nvfp4", method="hqq")
    with pytest.raises(ValueError, match="activations are quantized to int8, float8, nvfp4 or an MX type"):
        requanto.quantize(model(), weights="int8", activations="int4")


def test_bits_of_a_weight():
    for kind, bits in (("mxfp4", 4.25), ("mxfp6", 6.25), ("mxfp8", 8.25), ("nvfp4", 4.5 + 32 / 1024)):
        assert QTensor.quantize(randn(8, 1024), kind).bits_per_weight == bits


def test_a_budget_may_choose_them():
    made = model(torch.bfloat16)
    with torch.no_grad():
        made[0].weight.copy_(torch.randn(48, 64) * torch.exp(randn(48, 64, seed=8)))
    how = {"candidates": ["mxfp4", "nvfp4", "int4:16", "mxfp8"], "scale_bits": 6, "progress": False}
    requanto.quantize(made, weights="auto", bits=8.5, **how)
    requanto.freeze(made)
    kinds = {made[0].weight.qtype.name, made[3].weight.qtype.name}
    assert kinds == {"qmxfp8_e4m3"}


def test_they_have_no_column_scale_unless_it_is_asked_for():
    for asked, found in ((None, False), ("root", True)):
        made = nn.Sequential(nn.Linear(64, 4096, bias=False))
        requanto.quantize(made, weights="nvfp4", column_scale=asked)
        requanto.freeze(made)
        assert made[0].weight._spec.column is found
