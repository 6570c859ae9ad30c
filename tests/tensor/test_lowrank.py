"""The low-rank term: every product, copy, cut and stored form carries it; what does not fit is refused."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import requanto
from requanto import QTensor
from requanto.checkpoint.format import CheckpointError, flatten, rebuild, spec_text
from requanto.tensor.lowrank import add_dense, append, compress, fold, fold_lowrank, lowrank_matmul, scale_rows

KINDS = ["int8", "int4", "int2", "float8", "int3", "nf4", "codebook3", "nvfp4"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def make(kind: str, shape=(96, 128), transposed: bool = False, rank: int = 4) -> tuple[QTensor, torch.Tensor]:
    """A weight with a term, and its float value computed here."""
    generator = torch.Generator().manual_seed(0)
    weight = QTensor.quantize(torch.randn(shape, generator=generator), kind, transposed=transposed)
    up = torch.randn(*weight.lead, rank, generator=generator)
    down = torch.randn(*weight.lead[:-1], rank, weight.row_length, generator=generator)
    term = (up.double() @ down.double()).reshape(weight.canonical_shape)
    value = weight.dequantize(torch.float64) + (term.mT if transposed else term)
    append(weight, up, down)
    return weight, value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_product_has_the_term(kind, transposed):
    torch._dynamo.reset()
    weight, value = make(kind, transposed=transposed)
    x = torch.randn(5, weight.shape[1], dtype=torch.float64)
    y = torch.randn(5, weight.shape[0], dtype=torch.float64)
    assert relative(weight.dequantize(), value) < 1e-6
    assert relative(F.linear(x.float(), weight), x @ value.T) < 1e-5
    assert relative(y.float() @ weight, y @ value) < 1e-5
    assert relative(weight @ x.float().T, value @ x.T) < 1e-5
    assert relative(torch.addmm(torch.zeros(weight.shape[1]), y.float(), weight), y @ value) < 1e-5
    needs_grad = x.float().requires_grad_()
    F.linear(needs_grad, weight).sum().backward()
    assert relative(needs_grad.grad, torch.ones(5, weight.shape[0], dtype=torch.float64) @ value) < 1e-5
    out = torch.compile(lambda x: F.linear(x, weight), backend="eager", fullgraph=True)(x.float())
    assert relative(out, x @ value.T) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_embeddings_and_convolutions(kind, transposed):
    weight, value = make(kind, (3, 32, 64), transposed)
    x = torch.randn(7, 64)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    expected = torch.zeros(7, 32, dtype=torch.float64)
    for expert, rows in enumerate((slice(0, 2), slice(2, 2), slice(2, 6))):
        expected[rows] = x[rows].double() @ value[expert].T
    assert relative(F.grouped_mm(x, weight.transpose(-1, -2), offs=offsets), expected) < 1e-5
    assert relative(weight[1].dequantize(), value[1]) < 1e-6
    assert relative(weight[torch.tensor([2, 0])].dequantize(), value[[2, 0]]) < 1e-6
    assert relative(torch.bmm(x.expand(3, 7, 64), weight.transpose(-1, -2)), x.double() @ value.mT) < 1e-5
    if not transposed:
        table, rows = make(kind)
        assert relative(F.embedding(torch.tensor([[5, 9]]), table), rows[[5, 9]][None]) < 1e-6
        kernel, value = make(kind, (16, 8, 3, 3))
        image = torch.randn(1, 8, 6, 6)
        assert relative(F.conv2d(image, kernel), F.conv2d(image.double(), value)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_copies_moves_and_cuts_carry_the_term(kind):
    weight, value = make(kind)
    for other in (copy.deepcopy(weight), weight.detach(), weight.clone(), pickle.loads(pickle.dumps(weight))):
        assert other.rank == 4
        assert torch.equal(other, weight)
    assert relative(weight.to(torch.bfloat16).dequantize(), value) < 1e-2
    assert relative(weight[16:32].dequantize(), value[16:32]) < 1e-6
    assert relative(weight[:, 64:].dequantize(), value[:, 64:]) < 1e-6 if weight.group_size else True
    assert relative(weight.t().dequantize(), value.T) < 1e-6
    into = torch.empty_like(weight)
    into.copy_(weight)
    assert torch.equal(into, weight)
    into.copy_(weight.without_lowrank())
    assert torch.equal(into, weight.without_lowrank())


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_form(kind):
    weight, _ = make(kind)
    text, parts = spec_text(weight), {k[2:]: v for k, v in flatten({"w": weight}).items()}
    assert text.endswith("rank=4")
    assert {"up", "down"} < set(parts)
    assert torch.equal(rebuild("w", text, parts, torch.float32), weight)
    with pytest.raises(CheckpointError, match="w_up"):
        rebuild("w", text, {k: v for k, v in parts.items() if k != "up"}, torch.float32)
    with pytest.raises(CheckpointError, match="expected"):
        rebuild("w", text.replace("rank=4", "rank=3"), parts, torch.float32)
    with pytest.raises(CheckpointError, match="NaN"):
        rebuild("w", text, parts | {"up": parts["up"] * float("nan")}, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_changes_of_low_rank_are_exact_and_cancel(kind):
    weight = QTensor.quantize(torch.randn(96, 128), kind)
    before = weight.dequantize().double()
    delta = torch.randn(96, 3) @ torch.randn(3, 128) * 1e-3
    weight += delta
    assert weight.rank == 3
    assert relative(weight.dequantize().double() - before, delta) < 1e-4  # 1e-3 of the weight, in float32
    weight -= delta
    assert weight.rank == 0
    assert torch.equal(weight.dequantize().double(), before)
    with pytest.raises(NotImplementedError, match="rank 96"):
        weight += torch.randn(96, 128)
    with pytest.raises(ValueError, match="NaN"):
        add_dense(weight, torch.full((96, 128), float("nan")))
    assert weight.rank == 0


def test_compress_keeps_what_does_not_cancel():
    weight, value = make("int4")
    up, down = weight.up.clone(), weight.down.clone()
    append(weight, -up[:, :2], down[:2])
    compress(weight)
    assert weight.rank == 2
    assert relative(weight.dequantize(), value - up[:, :2].double() @ down[:2].double()) < 1e-5


def test_rows_are_scaled_without_touching_codes():
    weight, value = make("int4")
    codes, factor = weight.qdata.clone(), torch.rand(96) + 0.5
    scale_rows(weight, factor)
    assert torch.equal(weight.qdata, codes)
    assert relative(weight.dequantize(), value * factor.double()[:, None]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_folding_rounds_and_says_how_much_it_lost(kind):
    weight, value = make(kind)
    folded = fold(weight)
    assert folded.rank == 0
    assert spec_text(folded) == spec_text(weight).removesuffix(" rank=4")
    step = 2.0 ** (1 - {"float8": 4}.get(kind, weight.qtype.bits))
    assert relative(folded.dequantize(), value) < step
    layer = torch.nn.Linear(128, 96)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    lost = fold_lowrank(layer)
    assert lost["weight"] == pytest.approx(
        float((folded.dequantize().double() - value).norm() / (value - weight_only(kind)).norm()), rel=1e-3
    )
    assert layer.weight.rank == 0
    assert fold_lowrank(layer) == {}


def weight_only(kind: str) -> torch.Tensor:
    return make(kind)[0].without_lowrank().dequantize(torch.float64)


def test_terms_that_do_not_fit_are_refused():
    weight, _ = make("int4")
    with pytest.raises(ValueError, match="together"):
        weight.set_lowrank(weight.up, None)
    with pytest.raises(ValueError, match="does not fit"):
        weight.set_lowrank(weight.up, weight.down[:, 1:])
    with pytest.raises(ValueError, match="does not fit"):
        weight.with_inner(
            {**weight.inner_tensors(), "qdata": weight.qdata[:8], "scale": weight.scale[:8], "shift": weight.shift[:8]},
            shape=(8, 128),
        )


def test_gradients_reach_factors_in_training():
    weight, value = make("int4")
    up, down = weight.up.clone().requires_grad_(), weight.down.clone().requires_grad_()
    trained = weight.with_inner({**weight.inner_tensors(), "up": up, "down": down})
    x = torch.randn(5, 128)
    F.linear(x, trained).square().sum().backward()
    reference = [t.detach().double().requires_grad_() for t in (up, down)]
    base = value - reference[0].detach() @ reference[1].detach()
    (x.double() @ (base + reference[0] @ reference[1]).T).square().sum().backward()
    assert relative(up.grad, reference[0].grad) < 1e-5
    assert relative(down.grad, reference[1].grad) < 1e-5
    assert lowrank_matmul(x, weight).shape == (5, 96)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True])
def test_requantize_keeps_the_term_or_folds_it_when_asked(kind, flat):
    model = torch.nn.Sequential(torch.nn.Linear(128, 96))
    requanto.freeze(requanto.quantize(model, weights=kind))
    append(model[0].weight, torch.randn(96, 4), torch.randn(4, 128))
    state, expected = model.state_dict(), model[0].weight.clone()
    state, qmap = flatten(state) if flat else state, requanto.quantization_map(model)
    kept = requanto.requantize(torch.nn.Sequential(torch.nn.Linear(128, 96)), state, qmap)
    assert torch.equal(kept[0].weight, expected)
    folded = requanto.requantize(torch.nn.Sequential(torch.nn.Linear(128, 96)), state, qmap, fold_lowrank=True)
    assert torch.equal(folded[0].weight, fold(expected))


def test_requantize_refuses_half_a_term():
    model = torch.nn.Sequential(torch.nn.Linear(128, 96))
    requanto.freeze(requanto.quantize(model, weights="int4"))
    append(model[0].weight, torch.randn(96, 4), torch.randn(4, 128))
    state, qmap = flatten(model.state_dict()), requanto.quantization_map(model)
    del state["0.weight_up"]
    with pytest.raises(CheckpointError, match="together"):
        requanto.requantize(torch.nn.Sequential(torch.nn.Linear(128, 96)), state, qmap)
