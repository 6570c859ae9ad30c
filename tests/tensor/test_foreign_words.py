"""Words that files of other programs need: signed scales, scales in blocks, columns in another order. Against float64."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_weights import ACT_ORDER, EVERY, K_TYPES, ORDERED, Q2_K, Q3_K, Q4_0, Q4_K, Q6_K, bits_of, made, meaning
from torch import nn

from requanto import QTensor
from requanto.tensor.exact import assign
from requanto.tensor.lowrank import State, append, scale_columns, scale_rows
from requanto.tensor.sharding import join_weights, slice_weight
from requanto.tensor.spec import parse_text

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def random(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- what the parts mean


@given(
    st.sampled_from(EVERY),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["", "rank=2", "transposed", "rank=1 transposed"]),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_values_against_float64(form, rows, blocks, words, dtype, seed):
    shape = (256 * blocks, rows) if "transposed" in words else (rows, 256 * blocks)
    weight = made(form, *shape, words=words, seed=seed, dtype=dtype)
    found, wanted = weight.dequantize(torch.float32), meaning(weight)
    assert found.shape == wanted.shape == shape
    assert error(found, wanted) < 1e-6
    assert torch.equal(weight.dequantize(), weight.dequantize(torch.float32).to(dtype))
    spec, rank = parse_text(weight._spec.text(weight.rank), dtype)
    assert (spec, rank) == (weight._spec, weight.rank)


@pytest.mark.parametrize("form", K_TYPES)
def test_values_of_k_types_are_those_of_float32_arithmetic(form):
    """Bit for bit: number times code is exact, and then one product and one difference are rounded, as llama.cpp does."""
    weight = made(form, 3, 512)
    parts, spec = weight.inner_tensors(), weight._spec
    scale = bits_of(parts["scale"], spec.scale_bits, spec.groups) - (2 ** (spec.scale_bits - 1) if spec.signed else 0)
    per_block = spec.groups // spec.scale_blocks
    scale = torch.from_numpy(scale).float() * parts["row_scale"].float().repeat_interleave(per_block, -1)
    codes = torch.from_numpy(bits_of(parts["qdata"], spec.qtype.bits, 512)).float()
    wanted = (codes - (0 if spec.affine else spec.qtype.zero_code)).view(3, spec.groups, -1) * scale.unsqueeze(-1)
    if spec.affine:
        shift = torch.from_numpy(bits_of(parts["shift"], spec.scale_bits, spec.groups)).float()
        wanted = wanted - (shift * parts["row_shift"].float().repeat_interleave(per_block, -1)).unsqueeze(-1)
    assert torch.equal(weight.dequantize(), wanted.view(3, 512))


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (1, 256), (2, 5, 256), (0, 5, 256), (2, 0, 256)])
def test_odd_shapes(form, shape):
    if shape[-1] == 0 and "rotation" in form:
        pytest.skip("nothing to rotate")
    weight = made(form, *shape, words="axis=1" if len(shape) == 3 else "")
    assert weight.dequantize().shape == shape
    assert torch.allclose(weight.dequantize().double(), meaning(weight), rtol=1e-4, atol=1e-4)
    assert torch.equal(weight.clone(), weight)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("qint4 4x256 group=32 affine block=256", "blocks of scales need groups, scales in few bits"),
        ("qint4 4x256 affine scales=6 block=256", "blocks of scales need groups"),
        ("qint4 4x256 group=32 affine scales=6 zeros block=256", "blocks of scales need groups"),
        ("qint4 4x256 group=32 affine scales=6 block=48", "blocks of 48 must consist of whole groups of 32"),
        ("qint4 4x256 group=32 affine scales=6 block=96", "divide rows of 256"),
        ("qint4 4x256 group=32 affine scales=6 block=0", "blocks of 0 must"),
        ("qint4 4x256 group=32 affine scales=6 block=-1", "is no size"),
        ("qint4 4x256 group=32 scales=6 signed", "signed scales are floats, or codes of scales in blocks"),
        ("qnvfp4 4x256 group=16 signed", "signed scales are floats"),
        ("qint4 4x256 group=32 signed signed", "occurs twice"),
        ("qint4 4x256 group=32 order=1", "order=1"),
    ],
)
def test_descriptions_that_mean_nothing_are_refused(form, why):
    with pytest.raises((ValueError, KeyError), match=why):
        parse_text(form, torch.float32)


def test_parts_that_do_not_fit_are_refused():
    weight = made(Q4_K, 4, 512)
    parts = dict(weight.inner_tensors())
    for name, wrong in (
        ("row_scale", parts["row_scale"][:, :1]),
        ("row_shift", parts["row_shift"].repeat(1, 2)),
        ("row_shift", None),
        ("order", torch.arange(512, dtype=torch.int32)),
    ):
        with pytest.raises(ValueError, match=name):
            weight.set_inner(parts | {name: wrong})
    ordered = made(ACT_ORDER, 4, 256)
    with pytest.raises(ValueError, match=r"order is torch.int64 .*expected torch.int32"):
        ordered.set_inner({**ordered.inner_tensors(), "order": ordered.order.long()})


# ---------------------------------------------------------------------- views, copies, joins


@pytest.mark.parametrize("form", EVERY)
def test_views_copies_and_pickles(form):
    weight = made(form, 12, 512)
    whole = weight.dequantize()
    assert torch.equal(weight[2:7].dequantize(), whole[2:7])
    assert torch.equal(weight[torch.tensor([3, 0])].dequantize(), whole[[3, 0]])
    assert torch.equal(weight.t().dequantize(), whole.t())
    buffer = io.BytesIO()
    torch.save(nn.Parameter(weight, requires_grad=False), buffer)
    buffer.seek(0)
    layer = nn.Linear(512, 12, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    state = copy.deepcopy(layer).state_dict()
    for again in (
        copy.deepcopy(weight),
        weight.clone(),
        torch.load(buffer, weights_only=True),
        pickle.loads(pickle.dumps(weight)),
        state["weight"],
        weight.to(torch.bfloat16).to(torch.float32),
    ):
        assert torch.equal(again, weight)
        assert again.spec() == weight.spec()
    into = torch.empty_like(weight)
    into.copy_(weight)
    assert torch.equal(into, weight)
    with pytest.raises(ValueError, match="unlike quantized weights"):
        made("qint8 {}", 12, 512).copy_(weight)
    other = made(form, 12, 512, seed=3)
    if "order" in form:
        with pytest.raises(ValueError, match="is shared with the rest of the weight"):
            weight[3:5].copy_(other[3:5])
    else:
        weight[3:5].copy_(other[3:5])
        assert torch.equal(weight.dequantize(), torch.cat([whole[:3], other.dequantize()[3:5], whole[5:]]))


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("words", ["", "transposed"])
def test_columns(form, words):
    weight = made(form, *((512, 6) if words else (6, 512)), words=words)
    dim = 0 if words else 1
    whole = weight.dequantize()
    found = weight.narrow(dim, 256, 256)  # of an order: the values, with a log line
    assert torch.equal(found.dequantize() if isinstance(found, QTensor) else found, whole.narrow(dim, 256, 256))
    assert isinstance(found, QTensor) is (
        "order" not in form and (weight.group_size is not None or "affine" not in form)
    )
    inside = weight.narrow(dim, 8, 48)
    assert torch.equal(inside.dequantize() if isinstance(inside, QTensor) else inside, whole.narrow(dim, 8, 48))
    if "order" in form:
        with pytest.raises(NotImplementedError, match="w: its columns are stored in another order"):
            slice_weight(weight, dim, 0, 256, "w")
        with pytest.raises(NotImplementedError, match="joining pieces of rows that have parts"):
            join_weights([weight, weight], dim)
    else:
        pieces = [slice_weight(weight, dim, 0, 256, "w"), slice_weight(weight, dim, 256, 512, "w")]
        assert torch.equal(join_weights(pieces, dim), weight)
    if weight.scale_block == 256:
        with pytest.raises(
            NotImplementedError, match=r"w: its rows of 512 .* cannot be sliced at \[0:128\], inside a block"
        ):
            slice_weight(weight, dim, 0, 128, "w")
    joined = torch.cat([weight, weight], dim)
    joined = joined.dequantize() if isinstance(joined, QTensor) else joined
    assert torch.equal(joined, torch.cat([whole, whole], dim))


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("words", ["", "transposed"])
def test_rows_and_experts_are_joined(form, words):
    one, two = (made(form, *((256, 6) if words else (6, 256)), words=words, seed=seed) for seed in (1, 2))
    dim = 1 if words else 0
    values = torch.cat([one.dequantize(), two.dequantize()], dim)
    found = torch.cat([one, two], dim)
    shared = "order" in form or "columns" in form
    assert isinstance(found, QTensor) is not shared  # of different orders only the values can be joined
    assert torch.equal(found.dequantize() if isinstance(found, QTensor) else found, values)
    halves = [slice_weight(one, dim, 0, 2), slice_weight(one, dim, 2, 6)]
    for whole in (torch.cat(halves, dim), join_weights(halves, dim)):
        assert torch.equal(whole, one)
    stacked = torch.stack([one, two])
    assert isinstance(stacked, QTensor)
    assert torch.equal(stacked.dequantize(), torch.stack([one.dequantize(), two.dequantize()]))
    assert torch.equal(torch.cat([stacked, stacked]).dequantize(), torch.cat([stacked.dequantize()] * 2))
    if not words:
        grouped = torch.cat([one, one]).view(2, 6, 256)
        assert torch.equal(grouped.dequantize(), torch.stack([one.dequantize()] * 2))


@pytest.mark.parametrize("words", [("", "order"), ("signed", ""), ("scales=6 block=256", "scales=6 block=128")])
def test_unlike_weights_are_joined_as_values(words):
    forms = [f"qint4 {{}} group=32 affine {word}".strip() for word in words]
    one, two = (made(form, 6, 256, seed=seed) for seed, form in enumerate(forms))
    found = torch.cat([one, two])
    assert not isinstance(found, QTensor)
    assert torch.equal(found, torch.cat([one.dequantize(), two.dequantize()]))


# ---------------------------------------------------------------------- changes


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("words", ["", "transposed", "rank=2"])
def test_merges_are_exact_and_can_be_undone(form, words):
    shape = (256, 12) if "transposed" in words else (12, 256)
    weight = made(form, *shape, words=words)
    original, before = weight.clone(), State.of(weight)
    values = weight.dequantize(torch.float64)
    rows, columns = torch.rand(12) + 0.5, torch.rand(256) + 0.5
    scale_rows(weight, rows)
    values = values * (rows if "transposed" in words else rows.unsqueeze(1)).double()
    assert error(weight.dequantize(torch.float64), values) < 2e-3  # float scales are stored in their own dtype
    values = weight.dequantize(torch.float64)
    scale_columns(weight, columns)
    values = values * (columns.unsqueeze(1) if "transposed" in words else columns).double()
    assert error(weight.dequantize(torch.float64), values) < 1e-6
    up, down = random(12, 2), random(2, 256)
    append(weight, up, down)
    values = values + ((up @ down).mT if "transposed" in words else up @ down)
    assert error(weight.dequantize(torch.float64), values) < 1e-6
    assert error(weight.dequantize(torch.float64), meaning(weight)) < 1e-6
    before.restore(weight)
    assert torch.equal(weight, original)
    weight.mul_(2)
    assert torch.equal(weight.dequantize(torch.float64), 2 * original.dequantize(torch.float64))


@pytest.mark.parametrize("form", [Q4_K, Q6_K, Q4_0, *ORDERED])
def test_values_are_assigned_exactly(form):
    weight = made(form, 12, 256)
    values = weight.dequantize()
    for changed in (
        values * (torch.rand(256) + 0.5),
        values + random(12, 1) @ random(1, 256),
        values * (torch.rand(12, 1) + 1),
    ):
        copied = weight.clone()
        assign(copied, changed)
        assert error(copied.dequantize(), changed) < 1e-5
    weight.add_(random(12, 1) @ random(1, 256))
    assert error(weight.dequantize(), values.double() + (random(12, 1) @ random(1, 256)).double()) < 1e-5


@pytest.mark.parametrize("form", [Q4_0, *(form for form in ORDERED if "block" not in form)])
@pytest.mark.parametrize("words", ["", "transposed", "rank=2", "axis=1"])
def test_float_values_are_quantized_as_the_weight_is(form, words):
    shape = {"transposed": (256, 12), "axis=1": (2, 12, 256)}.get(words, (12, 256))
    weight = made(form, *shape, words=words)
    values = random(*shape)
    weight.copy_(values)
    assert error(weight.dequantize(), values) < 0.15
    plain = weight.dequantize()
    weight.copy_(plain)
    assert error(weight.dequantize(), plain) < 0.08


@pytest.mark.parametrize("form", [Q2_K, Q3_K])
def test_float_values_are_not_rounded_to_blocks(form):
    with pytest.raises(NotImplementedError, match="scales in blocks of 256 are read from files"):
        made(form, 4, 256).copy_(random(4, 256))
