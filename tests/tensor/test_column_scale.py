"""Weights with a column scale: views, copies, joins, shards, merges, and changes of their values."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from requanto import QTensor, prepare
from requanto.tensor import lowrank
from requanto.tensor.joining import UnlikeWeights, concatenate
from requanto.tensor.sharding import join_weights, slice_weight
from requanto.tensor.spec import WeightSpec, parse_text

KINDS = ["int8", "int4", "float8", "nf4", "codebook4"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(kind="int4", shape=(96, 128), **how) -> QTensor:
    weight = random(*shape) * (random(shape[-1], seed=1) / 2).exp()
    return QTensor.quantize(weight.mT if how.get("transposed") else weight, kind, **{"column_scale": "root", **how})


@given(
    group=st.sampled_from([None, 16]),
    bits=st.sampled_from([None, 4]),
    rotation=st.sampled_from([None, 16]),
    rank=st.sampled_from([0, 3]),
    transposed=st.booleans(),
)
def test_the_text_there_and_back(group, bits, rotation, rank, transposed):
    weight = quantized(
        group_size=group, scale_bits=bits, rotation=rotation, low_rank=rank or None, transposed=transposed
    )
    text = weight._spec.text(rank)
    assert text.split()[-1] == "columns"
    assert parse_text(text, torch.float32) == (weight._spec, rank)
    again = QTensor._of(
        WeightSpec.from_words(weight._spec.words, weight.canonical_shape, weight.dtype), weight.inner_tensors()
    )
    assert torch.equal(again, weight)


def test_a_scale_of_another_shape_or_a_missing_one_is_refused():
    weight = quantized()
    parts = weight.inner_tensors()
    with pytest.raises(ValueError, match=r"column is torch.float32 \(64,\), expected .* \(128,\)"):
        QTensor._of(weight._spec, {**parts, "column": parts["column"][:64]})
    with pytest.raises(ValueError, match="needs its column"):
        QTensor._of(weight._spec, {name: part for name, part in parts.items() if name != "column"})
    with pytest.raises(ValueError, match="has no column"):
        QTensor._of(weight._spec.replace(column=False), parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_views_have_the_values_of_the_whole(kind, transposed):
    weight = quantized(kind, transposed=transposed)
    values = weight.dequantize()
    assert torch.equal(weight.t().dequantize(), values.t())
    for dim in (0, 1):
        step = weight.shape[dim] // 2
        for index, piece in enumerate(weight.split(step, dim)):
            assert isinstance(piece, QTensor)
            wanted = values.narrow(dim, index * step, step)
            assert torch.equal(piece.dequantize(), wanted)
            x = random(3, piece.shape[1])
            torch.testing.assert_close(F.linear(x, piece), x @ wanted.T, rtol=1e-4, atol=1e-4)
        shards = [slice_weight(weight, dim, s, e) for s, e in ((0, 32), (32, weight.shape[dim]))]
        assert torch.equal(join_weights(shards, dim).dequantize(), values)
    if not transposed:
        assert torch.equal(weight[torch.tensor([5, 1])].dequantize(), values[[5, 1]])
        assert torch.equal(weight[7], values[7])


def test_experts_one_by_one_and_rows_in_groups():
    weight = quantized(shape=(4, 32, 64), group_size=16)
    values = weight.dequantize()
    assert torch.equal(weight[2].dequantize(), values[2])
    assert torch.equal(weight[1:3].dequantize(), values[1:3])
    assert torch.equal(weight[:, 8:16].dequantize(), values[:, 8:16])
    assert torch.equal(weight[:, :, 16:48].dequantize(), values[:, :, 16:48])
    assert torch.equal(weight[torch.tensor([3, 0])].dequantize(), values[[3, 0]])
    assert all(torch.equal(one.dequantize(), value) for one, value in zip(weight.unbind(), values))
    assert torch.equal(torch.stack(list(weight.unbind())).dequantize(), values)
    assert torch.equal(torch.cat([weight[:1], weight[1:]]).dequantize(), values)
    rows = quantized(shape=(96, 64), group_size=16)
    grouped = rows.view(3, 32, 64)
    assert torch.equal(grouped.dequantize(), rows.dequantize().view(3, 32, 64))
    with pytest.raises(NotImplementedError, match="with a column scale, which all groups share"):
        grouped.copy_(grouped.clone())


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind):
    weight = quantized(kind)
    stream = io.BytesIO()
    torch.save(weight, stream)
    stream.seek(0)
    for again in (
        weight.clone(),
        copy.deepcopy(weight),
        copy.copy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.load(stream, weights_only=True),
        weight.to(torch.bfloat16).to(torch.float32),
        QTensor(
            **weight.inner_tensors(),
            **{k: getattr(weight, k) for k in ("qtype", "shape", "dtype", "axis", "group_size", "transposed")},
        ),
    ):
        assert torch.equal(again, weight)
        assert torch.equal(again.dequantize(), weight.dequantize())
    assert not torch.equal(quantized(kind, column_scale="std"), weight)
    meta = weight.to("meta")
    assert meta.column.is_meta
    assert torch.empty_like(weight).column.shape == (128,)


def test_writes():
    weight, other = quantized(), quantized(column_scale="std")
    weight.copy_(other)
    assert torch.equal(weight, other)
    weight.copy_(random(96, 128, seed=3))  # a whole weight of floats gets a scale of its own
    assert not torch.equal(weight.column, other.column)
    assert float((weight.dequantize() - random(96, 128, seed=3)).norm() / random(96, 128, seed=3).norm()) < 0.12
    part = weight[:32]
    before, rest = weight.column.clone(), weight.dequantize()[32:]
    part.copy_(random(32, 128, seed=4) / 4)  # rows share the scale of the whole
    assert torch.equal(weight.column, before)
    assert torch.equal(weight.dequantize()[32:], rest)
    assert torch.equal(weight.dequantize()[:32], part.dequantize())
    assert float((part.dequantize() - random(32, 128, seed=4) / 4).norm() / (random(32, 128, seed=4) / 4).norm()) < 0.12
    with pytest.raises(ValueError, match="its column is shared with the rest"):
        part.copy_(other[:32])
    half = weight[:, :64]
    half.copy_(other[:, :64])
    assert torch.equal(weight.dequantize()[:, :64], other.dequantize()[:, :64])
    with pytest.raises(ValueError, match="copy_ between unlike quantized weights"):
        weight.copy_(quantized(column_scale=False))


@pytest.mark.parametrize("shape", [(16, 128), (3, 16, 128)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_of_few_rows_keeps_its_column_scale_when_floats_are_written(shape, transposed):
    given_scale = (random(*shape[:-2], 128, seed=2) / 2).exp()
    weight = quantized("int8", shape, column_scale=given_scale, transposed=transposed)
    column, values = weight.column.clone(), random(*weight.shape, seed=3)
    weight.copy_(values)
    assert torch.equal(weight.column, column)
    assert float((weight.dequantize() - values).norm() / values.norm()) < 0.02


def test_what_can_be_joined():
    column = (random(128, seed=2) / 4).exp()
    one, two = (QTensor.quantize(random(64, 128, seed=i), "int4", column_scale=column) for i in (0, 1))
    for dim in (0, 1):
        joined = concatenate([one, two], dim)
        assert torch.equal(joined.dequantize(), torch.cat([one.dequantize(), two.dequantize()], dim))
    other = quantized(shape=(64, 128))
    assert torch.equal(concatenate([one, other], 1).dequantize(), torch.cat([one.dequantize(), other.dequantize()], 1))
    with pytest.raises(UnlikeWeights, match="rows of quantized weights with different column scales"):
        concatenate([one, other], 0)
    for dim in (0, 1):
        with pytest.raises(UnlikeWeights, match="with and without a column scale"):
            concatenate([one, quantized(shape=(64, 128), column_scale=False)], dim)
    values = torch.cat([one, other])  # as values, which is logged
    assert torch.equal(values, torch.cat([one.dequantize(), other.dequantize()]))


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_is_added_in_the_basis_of_the_weight(packed, float_arithmetic):
    layer = nn.Linear(256, 320, bias=False)
    layer.weight = nn.Parameter(quantized("int4", (320, 256)), requires_grad=False)
    if packed:
        prepare(layer, smallest=0)
    weight, before = layer.weight, layer.weight.dequantize()
    up, down = random(320, 4, seed=5), random(4, 256, seed=6)
    lowrank.append(weight, up, down)
    torch.testing.assert_close(weight.dequantize(), before + up @ down)
    x = random(3, 256, seed=7)
    torch.testing.assert_close(layer(x), x @ (before + up @ down).T, rtol=1e-4, atol=1e-3)
    lowrank.scale_rows(weight, torch.full((320,), 1.5))
    torch.testing.assert_close(weight.dequantize(), 1.5 * (before + up @ down))
    folded = lowrank.fold(weight)
    assert folded.rank == 0
    assert torch.equal(folded.column, weight.column)
    loss = (folded.dequantize() - weight.dequantize()).norm() / weight.dequantize().norm()
    assert float(loss) < 0.15
