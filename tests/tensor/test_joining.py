"""torch.cat, stack, split and list operators on quantized weights: exact, or an error that says why not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reversed_layout import REVERSED
from torch import nn

import requanto
from requanto import QTensor
from requanto.tensor.joining import UnlikeWeights, concatenate
from requanto.tensor.lowrank import append

KINDS = ["int8", "int4", "int3", "float8", "nf4", "mxfp4"]


def quantized(*shape: int, kind: str = "int4", seed: int = 0, rank: int = 0, packed: bool = False, **how) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    weight = QTensor.quantize(torch.randn(*shape, generator=generator), kind, **how)
    if rank:
        lead, length = weight.lead, weight.row_length
        append(weight, torch.randn(*lead, rank), torch.randn(*lead[:-1], rank, length))
    if packed:
        weight.pack(REVERSED)
    return weight


def check(function, pieces) -> QTensor:
    before = [piece.clone() for piece in pieces]
    joined = function(pieces)
    assert isinstance(joined, QTensor)
    expected = function([piece.dequantize(torch.float64) for piece in pieces])
    # A low-rank term is a float product: with zeros added to its factors the sum may be rounded differently.
    tolerance = 1e-6 if any(piece.rank for piece in pieces) else 0
    torch.testing.assert_close(joined.dequantize(torch.float64), expected, rtol=0, atol=tolerance)
    assert all(torch.equal(piece, old) for piece, old in zip(pieces, before))
    return joined


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows(kind, packed):
    pieces = [quantized(rows, 96, kind=kind, seed=rows, packed=packed) for rows in (5, 1, 16)]
    joined = check(torch.cat, pieces)
    assert (joined.group_size, joined.qtype) == (pieces[0].group_size, pieces[0].qtype)
    x = torch.randn(3, 96)
    torch.testing.assert_close(
        nn.functional.linear(x, joined), torch.cat([nn.functional.linear(x, piece) for piece in pieces], -1)
    )


@given(
    kind=st.sampled_from(KINDS),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    groups=st.lists(st.sampled_from([None, 8, 16, 32, 96]), min_size=4, max_size=4),
    ranks=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    transposed=st.booleans(),
    rotation=st.sampled_from([None, 32]),
)
def test_any_rows(kind, rows, groups, ranks, transposed, rotation):
    shapes = [(96, count) if transposed else (count, 96) for count in rows]
    pieces = [
        quantized(*shape, kind=kind, seed=i, rank=rank, group_size=group, transposed=transposed, rotation=rotation)
        for i, (shape, rank, group) in enumerate(zip(shapes, ranks, groups))
    ]
    check(lambda parts: torch.cat(parts, -1 if transposed else 0), pieces)


@given(
    kind=st.sampled_from(KINDS),
    columns=st.lists(st.sampled_from([8, 32, 64, 96]), min_size=1, max_size=4),
    groups=st.lists(st.sampled_from([None, 8]), min_size=4, max_size=4),
    ranks=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    transposed=st.booleans(),
)
def test_any_columns(kind, columns, groups, ranks, transposed):
    shapes = [(length, 6) if transposed else (6, length) for length in columns]
    pieces = [
        quantized(*shape, kind=kind, seed=i, rank=rank, group_size=group, transposed=transposed)
        for i, (shape, rank, group) in enumerate(zip(shapes, ranks, groups))
    ]
    check(lambda parts: torch.cat(parts, -2 if transposed else 1), pieces)


@pytest.mark.parametrize("kind", [*KINDS, "codebook4"])
@pytest.mark.parametrize("ranks", [(0, 0), (2, 0), (1, 3)])
def test_experts(kind, ranks):
    if kind == "codebook4":
        whole = quantized(4, 6, 64, kind=kind)
        pieces = [whole[:2], whole[2:]]  # slices of one weight share its codebook
    else:
        pieces = [quantized(2, 6, 64, kind=kind, seed=i, rank=rank) for i, rank in enumerate(ranks)]
    for dim in (0, 1, -1):
        check(lambda parts, dim=dim: torch.cat(parts, dim), pieces)
    if kind != "codebook4":
        check(torch.stack, [quantized(6, 64, kind=kind, seed=i, rank=rank) for i, rank in enumerate(ranks)])


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions(kind):
    check(torch.cat, [quantized(count, 8, 3, 3, kind=kind, seed=count) for count in (4, 2)])
    with pytest.raises(UnlikeWeights, match=r"convolution.*along its rows"):
        concatenate([quantized(4, 8, 3, 3, kind=kind)] * 2, 1)


@pytest.mark.parametrize("kind", [*KINDS, "codebook4"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_was_split_is_joined_again(kind, packed):
    whole = quantized(12, 128, kind=kind, packed=packed)
    for parts, dim in ((whole.chunk(3), 0), (whole.split([5, 7]), 0), (torch.split(whole, 64, 1), 1)):
        again = torch.cat(list(parts), dim)
        assert torch.equal(again.dequantize(), whole.dequantize())


def test_scales_in_few_bits():
    pieces = [quantized(rows, 128, group_size=16, scale_bits=6, seed=rows) for rows in (3, 4)]
    assert check(torch.cat, pieces).scale_bits == 6
    with pytest.raises(UnlikeWeights, match=r"scales in 6 bits"):
        concatenate([pieces[0], pieces[0]], 1)


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        ({"kind": "int8"}, {"kind": "int4"}, r"different qtype \(qint8 and qint4\).*dequantize"),
        ({"symmetric": True}, {"symmetric": False}, "different affine"),
        ({"rotation": 32}, {}, "different rotation"),
        ({"scale_bits": 6, "group_size": 8}, {"group_size": 8}, "different scale_bits"),
        ({"kind": "codebook4"}, {"kind": "codebook4", "seed": 1}, "codebooks of their own"),
        ({"transposed": True}, {}, "different transposed"),
    ],
)
def test_the_values_of_unlike_weights_are_joined(one, two, message, caplog):
    pieces = [quantized(64, 64, **one), quantized(64, 64, **two)]
    with pytest.raises(UnlikeWeights, match=message):
        concatenate(pieces, 0)
    for join in (torch.cat, torch.stack):
        joined = join(pieces)
        assert type(joined) is torch.Tensor
        assert torch.equal(joined, join([piece.dequantize() for piece in pieces]))
    assert caplog.text.count("reads the values") == 2  # once for each weight


def test_a_float_among_them_and_other_shapes():
    weight = quantized(4, 64)
    with pytest.raises(UnlikeWeights, match=r"1 quantized and 1 float tensors.*dequantize"):
        concatenate([weight, torch.randn(4, 64)], 0)
    with pytest.raises(RuntimeError, match=r"sizes must match except in axis 0"):
        torch.cat([weight, quantized(4, 32)])
    with pytest.raises(UnlikeWeights, match=r"ends inside a byte"):
        concatenate([quantized(4, 33, group_size=None), quantized(4, 33, group_size=None)], 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "codebook4"])
def test_foreach_copy(kind, packed):
    source, target = quantized(4, 64, kind=kind, seed=1), quantized(4, 64, kind=kind, packed=packed)
    floats = torch.zeros(3)
    torch._foreach_copy_([target, floats], [source, torch.ones(3)])
    assert torch.equal(target, source)
    assert torch.equal(floats, torch.ones(3))


@pytest.mark.parametrize("packed", [False, True])
def test_copying_a_merged_adapter_into_a_weight_without(packed):
    source, target = quantized(16, 64, rank=2, seed=1), quantized(16, 64, packed=packed)
    alias = target.detach()
    target.copy_(source)
    assert torch.equal(alias, source)
    source.up.zero_()
    assert target.up.abs().min() > 0
    target.copy_(quantized(16, 64, seed=2))
    assert alias.rank == 0
    with pytest.raises(ValueError, match="unlike"):
        quantized(16, 64)[:8].copy_(quantized(16, 64, rank=2)[:8])


def test_quantized_models_join(tmp_path):
    layers = [nn.Linear(64, 32, bias=False) for _ in range(2)]
    for layer in layers:
        requanto.quantize(layer, weights="int4")
        requanto.freeze(layer)
    both = nn.Linear(64, 64, bias=False)
    both.load_state_dict({"weight": torch.cat([layer.weight for layer in layers])}, assign=True)
    x = torch.randn(2, 64)
    torch.testing.assert_close(both(x), torch.cat([layer(x) for layer in layers], -1))
