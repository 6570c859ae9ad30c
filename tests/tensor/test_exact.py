"""Changing a quantized weight to given values: exact, or refused and unchanged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reversed_layout import REVERSED

from requanto import QTensor
from requanto.tensor import exact, lowrank

KINDS = {
    "int8": {},
    "int4": {"group_size": 16},
    "nf4": {"group_size": 16, "low_rank": 2},
    "float8": {},
    "int3": {"group_size": 16, "scale_bits": 6},
    "int2": {"group_size": 16, "rotation": True},
}
SHAPES = [(24, 32), (40, 64), (3, 24, 32), (20, 8, 3, 3)]


def make(kind: str, shape: tuple[int, ...], transposed: bool, seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    options = dict(KINDS[kind])
    if len(shape) == 4:
        options.pop("rotation", None)
        options["group_size"] = None
        options.pop("scale_bits", None)
    return QTensor.quantize(values.mT if transposed else values, kind, transposed=transposed, **options)


def parts(weight: QTensor) -> dict[str, torch.Tensor]:
    return {name: part.clone() for name, part in weight.inner_tensors().items()}


def rows_of(weight: QTensor, values: torch.Tensor) -> torch.Tensor:
    return (values.mT if weight.transposed else values).reshape(*weight.lead, weight.row_length)


def seen(weight: QTensor, rows: torch.Tensor) -> torch.Tensor:
    values = rows.reshape(weight.canonical_shape)
    return values.mT if weight.transposed else values


def error(weight: QTensor, wanted: torch.Tensor) -> float:
    return float((weight.dequantize(torch.float32) - wanted).norm() / wanted.norm())


@given(
    kind=st.sampled_from(sorted(KINDS)),
    shape=st.sampled_from(SHAPES),
    transposed=st.booleans(),
    rank=st.integers(1, 4),
    size=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_change_of_low_rank_is_stored(kind, shape, transposed, rank, size, seed):
    weight = make(kind, shape, transposed and len(shape) == 2)
    generator = torch.Generator().manual_seed(seed)
    old = rows_of(weight, weight.dequantize(torch.float32))
    lead = old.shape[:-2]
    up = torch.randn(*lead, old.shape[-2], rank, generator=generator)
    delta = size * up @ torch.randn(*lead, rank, old.shape[-1], generator=generator)
    wanted = seen(weight, old + delta)
    codes = weight.codes().clone()
    exact.assign(weight, wanted)
    assert error(weight, wanted) < 2e-6
    assert torch.equal(weight.codes().view(torch.uint8), codes.view(torch.uint8))
    found = rows_of(weight, weight.dequantize(torch.float32)) - old
    assert float((found - delta).norm()) < 2e-6 * float(delta.norm() + old.norm())


@given(
    kind=st.sampled_from(sorted(KINDS)),
    shape=st.sampled_from(SHAPES[:3]),
    transposed=st.booleans(),
    negative=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_factors_of_rows_are_stored_and_scales_stay_positive(kind, shape, transposed, negative, seed):
    weight = make(kind, shape, transposed and len(shape) == 2)
    generator = torch.Generator().manual_seed(seed)
    old = rows_of(weight, weight.dequantize(torch.float32))
    factor = 0.2 + torch.rand(old.shape[:-1], generator=generator)
    if len(shape) == 2:
        factor[:negative] *= -1
    wanted = seen(weight, old * factor[..., None])
    exact.assign(weight, wanted)
    assert error(weight, wanted) < 2e-6
    positive = weight.row_scale if weight.scale_bits is not None else weight.scale
    assert bool((positive.float() > 0).all())
    if len(shape) == 3 or not negative:
        assert weight.rank == make(kind, shape, weight.transposed).rank


@given(
    kind=st.sampled_from(sorted(KINDS)),
    shape=st.sampled_from(SHAPES),
    transposed=st.booleans(),
    scaled=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_factors_of_columns_become_a_column_scale(kind, shape, transposed, scaled, packed, seed):
    weight = make(kind, shape, transposed and len(shape) == 2)
    generator = torch.Generator().manual_seed(seed)
    if scaled:
        lowrank.scale_columns(weight, 0.5 + torch.rand(*weight.lead[:-1], weight.row_length, generator=generator))
    if packed and len(shape) == 2:
        weight.pack(REVERSED)
    before, state = parts(weight), lowrank.State.of(weight)
    old = rows_of(weight, weight.dequantize(torch.float32))
    factor = 0.2 + torch.rand(*old.shape[:-2], old.shape[-1], generator=generator)
    wanted = seen(weight, old * factor.unsqueeze(-2))
    exact.assign(weight, wanted)
    assert error(weight, wanted) < 2e-6
    assert weight._spec.words.endswith("columns")
    assert weight.column.dtype == torch.float32
    if len(shape) == 2:
        x = torch.randn(3, weight.shape[1], generator=generator)
        torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ wanted.T, rtol=1e-4, atol=1e-4)
    state.restore(weight)
    assert parts(weight).keys() == before.keys()
    assert all(torch.equal(part.view(torch.uint8), before[n].view(torch.uint8)) for n, part in parts(weight).items())
    assert weight._spec.column is scaled


def test_factors_of_columns_that_are_not_positive_are_refused():
    weight = make("int4", (40, 64), False)
    factor = torch.ones(64)
    factor[:20] = -1
    with pytest.raises(NotImplementedError, match="by a positive factor for each row or each column"):
        exact.assign(weight, weight.dequantize() * factor)
    assert weight.column is None


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_other_change_is_refused_and_leaves_every_bit(kind, size, shape):
    weight = make(kind, shape, False)
    before = parts(weight)
    dense = weight.dequantize(torch.float32) + size * torch.randn(shape)
    spread = weight.dequantize(torch.float32) * (1 + size * torch.rand(shape))
    for wanted in (dense, spread):
        with pytest.raises(NotImplementedError, match="rounding it to the codes would lose most"):
            exact.assign(weight, wanted)
    for wanted, message in ((torch.full(shape, float("nan")), "NaN"), (torch.ones(shape[1:]), "shape")):
        with pytest.raises(ValueError, match=message):
            exact.assign(weight, wanted)
    now = parts(weight)
    assert now.keys() == before.keys()
    for name, part in now.items():
        assert torch.equal(part.view(torch.uint8), before[name].view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_values_that_it_has_change_nothing(dtype):
    weight = make("int4", (24, 32), False).to(dtype)
    before = parts(weight)
    exact.assign(weight, weight.dequantize())
    for name, part in parts(weight).items():
        assert torch.equal(part, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_rounded_to_half_precision_are_recognized(dtype):
    """A library that computes in 16 bits hands back a change of low rank plus rounding errors of full rank."""
    weight = make("int4", (64, 96), False).to(dtype)
    up, down = torch.randn(64, 3), torch.randn(3, 96)
    wanted = (weight.dequantize(torch.float32) + up @ down).to(dtype)
    exact.assign(weight, wanted)
    assert error(weight, wanted.float()) < 2 * torch.finfo(dtype).eps
    assert 3 <= weight.rank <= 4


def test_a_large_weight_is_decomposed_from_a_projection():
    """Above `FULL_SVD` the rank is found without an SVD of the whole matrix; also a rank above the first projection."""
    weight = QTensor.quantize(torch.randn(600, 700), "int4")
    for rank in (2, 100):
        wanted = weight.dequantize() + torch.randn(600, rank) @ torch.randn(rank, 700) / rank
        exact.assign(weight, wanted)
        assert error(weight, wanted) < 2e-6
        assert weight.rank == (2 if rank == 2 else 102)
    with pytest.raises(NotImplementedError, match="rank 150"):
        exact.assign(weight, weight.dequantize() + torch.randn(600, 700))
    with pytest.raises(NotImplementedError, match="rank 150"):
        exact.assign(weight, weight.dequantize() + torch.randn(600, 200) @ torch.randn(200, 700))


def test_rows_of_zeros_and_empty_weights():
    values = torch.randn(24, 32)
    values[3] = 0
    weight = QTensor.quantize(values, "int4", group_size=16)
    wanted = weight.dequantize()
    wanted[5] = 1
    exact.assign(weight, wanted)
    assert error(weight, wanted) < 2e-6
    empty = QTensor.quantize(torch.empty(0, 32), "int8")
    exact.assign(empty, torch.empty(0, 32))
