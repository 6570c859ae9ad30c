"""Column scales: the numbers themselves, what is given by the user, and weights that get none."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import requanto
from requanto import QTensor, QuantoConfig
from requanto.scales.columns import (
    DEFAULT_KIND,
    DEFAULT_ROWS,
    KINDS,
    LEAST_ROWS,
    LIMIT,
    SMALLEST,
    check_column_scale,
    column_scale,
    default_column_scale,
)
from requanto.scales.optimizers import AbsmaxOptimizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def uneven(rows=96, length=128, spread=1.0, dtype=torch.float32):
    """A weight whose columns differ in size, as those of language models do."""
    return (random(rows, length) * (spread * random(length, seed=1)).exp()).to(dtype)


def error(weight, quantized):
    return float((quantized.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize(("kind", "power", "exponent"), [("mean", 1, 1.0), ("std", 2, 0.5), ("root", 2, 0.25)])
@pytest.mark.parametrize("shape", [(64, 48), (3, 40, 48)])
def test_it_is_the_size_of_each_column_after_each_row_was_divided_by_its_own(kind, power, exponent, shape):
    weight = random(*shape) * (random(*shape[:-2], 1, shape[-1], seed=1) / 2).exp()
    weight = weight * (2 * random(*shape[:-1], 1, seed=2)).exp()
    rows = weight.double() / weight.double().square().mean(-1, keepdim=True).sqrt()
    size = rows.abs().pow(power).mean(-2) ** exponent
    wanted = size / size.log().mean(-1, keepdim=True).exp()
    torch.testing.assert_close(column_scale(weight, kind).double(), wanted, rtol=1e-5, atol=0)


def test_rows_of_zeros_do_not_count():
    weight = random(64, 48)
    padded = torch.cat([weight, torch.zeros(32, 48), torch.full((32, 48), 1e-45)])
    for kind in KINDS:
        torch.testing.assert_close(column_scale(padded, kind), column_scale(weight, kind))


def test_a_few_large_weights_hardly_change_the_mean():
    weight = random(256, 64)
    outliers = weight.clone()
    outliers[::64, 5] = 30.0
    ratio = {kind: float(column_scale(outliers, kind)[5] / column_scale(weight, kind)[5]) for kind in KINDS}
    assert ratio["mean"] < 1.15 < 1.3 < ratio["std"]


def test_the_same_in_any_memory_order_and_over_chunks(monkeypatch):
    weight = uneven(300, 64)
    assert torch.equal(column_scale(weight, "std"), column_scale(weight.t().contiguous().t(), "std"))
    whole = column_scale(weight, "std")
    monkeypatch.setattr("requanto.scales.columns._CHUNK", 7 * 64)
    torch.testing.assert_close(column_scale(weight, "std"), whole, rtol=1e-6, atol=0)


def test_dead_columns_get_one_and_large_ones_the_limit():
    weight = random(64, 256)
    weight[:, 3] = 0
    weight[:, 7] *= 1e6
    found = column_scale(weight, "std")
    assert found[3] == 1
    assert found[7] == LIMIT
    assert column_scale(torch.zeros(64, 8), "std").tolist() == [1.0] * 8
    stored = QTensor.quantize(weight, "int4", column_scale="std", symmetric=True)
    assert torch.isfinite(stored.dequantize()).all()
    assert not stored.dequantize()[:, 3].any()


def test_a_constant_column_keeps_its_value():
    weight = random(64, 64)
    weight[:, 5] = 20.0
    found = [QTensor.quantize(weight, "int4", column_scale=kind).dequantize() for kind in (False, "std")]
    others = torch.arange(64) != 5
    plain, scaled = ((one - weight)[:, others].norm() for one in found)
    assert scaled < plain / 3
    assert float((found[1] - weight)[:, 5].norm()) < 0.2 * float(weight[:, 5].norm())


@pytest.mark.parametrize("kind", ["int4", "int3", "int8", "nf4", "codebook3", "uint4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_different_size_lose_less(kind, dtype):
    weight = uneven(dtype=dtype)
    quantized = QTensor.quantize(weight, kind, column_scale="root")
    assert quantized.column.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert 0.5 <= float(quantized.column.max()) <= 1  # so x * column never exceeds x
    assert float(quantized.column.min()) > 0
    assert error(weight, quantized) < 0.85 * error(weight, QTensor.quantize(weight, kind, column_scale=False))


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("scale_bits", [None, 4])
@pytest.mark.parametrize("kind", ["int4", "codebook3", "int8"])
def test_the_codes_are_those_of_the_divided_weight(kind, rotation, scale_bits):
    weight, column = uneven(), (random(128, seed=2) / 2).exp()
    how = {"rotation": rotation, "scale_bits": scale_bits}
    quantized = QTensor.quantize(weight, kind, column_scale=column, **how)
    divided = QTensor.quantize(weight / quantized.column, kind, column_scale=False, **how)
    assert torch.equal(quantized.codes(), divided.codes())
    torch.testing.assert_close(quantized.dequantize(), divided.dequantize() * quantized.column, rtol=1e-6, atol=1e-7)
    ratio = quantized.column / column  # a power of two: the scale that was given is kept
    assert torch.equal(ratio, ratio[:1].expand(128))
    assert float(ratio[0].log2()) % 1 == 0


def test_a_low_rank_term_stays_in_the_basis_of_the_weight():
    weight = uneven()
    without, rank = (QTensor.quantize(weight, "int3", column_scale="root", low_rank=r) for r in (None, 8))
    assert rank.rank == 8
    assert error(weight, rank) < 0.9 * error(weight, without)
    wanted = rank.values_without_lowrank() + rank.up.float() @ rank.down.float()
    torch.testing.assert_close(rank.dequantize(), wanted)


def test_experts_have_a_scale_each_and_convolutions_one_for_each_weight_of_a_row():
    experts = torch.stack([uneven(64, 32, spread) for spread in (0.1, 1.0, 2.0)])
    quantized = QTensor.quantize(experts, "int4", column_scale="root", group_size=16)
    assert quantized.column.shape == (3, 32)
    for index in range(3):
        alone = QTensor.quantize(experts[index], "int4", column_scale="root", group_size=16)
        torch.testing.assert_close(quantized.dequantize()[index], alone.dequantize())
    transposed = QTensor.quantize(experts.mT.contiguous(), "int4", column_scale="root", group_size=16, transposed=True)
    assert torch.equal(transposed.dequantize(), quantized.dequantize().mT)
    image = QTensor.quantize(random(40, 4, 3, 3), "int8", column_scale="std")
    assert image.column.shape == (36,)
    assert error(random(40, 4, 3, 3), image) < 0.01


# ---------------------------------------------------------------------- what is refused, and what gets none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-1], r"layer: a column scale of shape \(127,\) and torch.float32 was given; expected .*\(128,\)"),
        (lambda c: c.int(), r"of shape \(128,\) and torch.int32 was given; expected a float tensor"),
        (lambda c: c[None], r"of shape \(1, 128\)"),
        (lambda c: c.clone().index_fill_(0, torch.tensor([3, 5]), 0), "2 of the 128 column scales given are zero"),
        (
            lambda c: c.clone().index_fill_(0, torch.tensor([3]), -1),
            "1 of the 128 column scales given are zero, negative",
        ),
        (lambda c: c.clone().index_fill_(0, torch.tensor([3]), float("nan")), "zero, negative, NaN or Inf"),
        (lambda c: c.clone().index_fill_(0, torch.tensor([3]), float("inf")), "zero, negative, NaN or Inf"),
        (lambda c: c.clone().index_fill_(0, torch.tensor([3]), 1e-9), "would underflow in float16; expected at least"),
    ],
)
def test_a_given_scale_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        QTensor.quantize(uneven(), "int4", column_scale=change(torch.ones(128)), name="layer")


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e6, 3e38])
def test_the_size_of_a_given_scale_does_not_matter(size):
    column = (random(128, seed=2) / 4).exp()
    column = column / column.max()
    weight = uneven(dtype=torch.float16)
    wanted = QTensor.quantize(weight, "int4", column_scale=column)
    found = QTensor.quantize(weight, "int4", column_scale=column * size)
    assert error(weight, found) == pytest.approx(error(weight, wanted), rel=0.05)
    assert 0.5 <= float(found.column.max()) <= 1


def test_groups_that_leave_float16_are_refused():
    weight = random(64, 128, dtype=torch.float16) * 100
    column = torch.ones(128)
    column[3] = 2 * SMALLEST
    with pytest.raises(ValueError, match=r"layer: divided by the column scale .* do not fit into torch.float16"):
        QTensor.quantize(weight, "int4", column_scale=column, name="layer")
    assert torch.isfinite(QTensor.quantize(weight.bfloat16(), "int4", column_scale=column).dequantize()).all()


def test_nan_in_a_weight_is_named_as_without_a_scale():
    weight = uneven()
    weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layer holds NaN or Inf"):
        QTensor.quantize(weight, "int4", column_scale="std", name="layer")


def test_weights_too_large_to_square():
    for kind in KINDS:
        quantized = QTensor.quantize(random(64, 64) * 1e30, "int8", column_scale=kind)
        assert quantized.column is not None
        assert error(random(64, 64), QTensor.quantize(random(64, 64), "int8", column_scale=kind)) < 0.01
        assert torch.isfinite(quantized.dequantize()).all()


def test_few_rows_get_none_and_the_log_names_the_layer(caplog):
    with caplog.at_level(logging.INFO, logger="requanto"):
        quantized = QTensor.quantize(random(LEAST_ROWS - 1, 64), "int4", column_scale="std", name="a.b.weight")
    assert quantized.column is None
    assert "a.b.weight: a weight of 31 rows gets no column scale" in caplog.text
    assert QTensor.quantize(random(3, 64), "int4", column_scale=torch.ones(64)).column is not None  # as it was given


def test_weights_without_rows_or_columns():
    for shape in ((0, 16), (64, 0)):
        quantized = QTensor.quantize(torch.empty(shape), "int8", column_scale="std")
        assert quantized.dequantize().shape == shape


@pytest.mark.parametrize("value", ["max", 1, 1.0, "", [1.0], object()])
def test_another_value_is_refused_everywhere(value):
    for function in (
        lambda: check_column_scale(value),
        lambda: QTensor.quantize(uneven(), "int4", column_scale=value),
        lambda: QuantoConfig(weights="int4", column_scale=value),
        lambda: QuantoConfig(weights="int4", modules={"a": {"column_scale": value}}),
        lambda: requanto.quantize(torch.nn.Linear(64, 64), "int4", column_scale=value),
    ):
        with pytest.raises(
            ValueError, match=r"column_scale.* must be 'mean', 'std', 'root', True, False or None, found"
        ):
            function()


def test_true_is_the_best_kind_of_the_type_and_none_is_none_for_a_single_weight():
    for value in (True, False, None):
        assert check_column_scale(value) is value
    for kind, best in (("int4", "mean"), ("nf4", "mean"), ("int2", "mean"), ("int8", DEFAULT_KIND)):
        one, two = (QTensor.quantize(uneven(), kind, column_scale=value) for value in (True, best))
        assert torch.equal(one, two)
    for bits, best in ((4, "std"), (5, "std"), (6, "mean"), (8, "mean")):
        for value in (True, "default"):
            one, two = (
                QTensor.quantize(uneven(DEFAULT_ROWS), "int2", group_size=16, scale_bits=bits, column_scale=asked)
                for asked in (value, best)
            )
            assert torch.equal(one, two)
    assert QTensor.quantize(uneven(), "int4").column is None


# ---------------------------------------------------------------------- the default of models


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("int4", "mean"),
        ("int3", "mean"),
        ("nf4", "mean"),
        ("codebook4", "mean"),
        ("codebook3", "mean"),
        ("int2", "mean"),
        ("int8", None),
    ],
)
def test_models_get_the_default_of_the_type(kind, wanted):
    layer = torch.nn.Linear(128, DEFAULT_ROWS)
    layer.weight.data = uneven(DEFAULT_ROWS)
    expected = QTensor.quantize(layer.weight.data, kind, column_scale=wanted)
    assert default_column_scale(expected.qtype, DEFAULT_ROWS) == wanted
    requanto.quantize(layer, kind)
    requanto.freeze(layer)
    assert (layer.weight.column is not None) == (wanted is not None)
    assert torch.equal(layer.weight.data, expected)


def test_models_with_few_rows_get_none_by_default_but_one_that_is_asked_for():
    for asked, wanted in ((None, False), (True, True), ("root", True), (False, False)):
        layer = torch.nn.Linear(64, DEFAULT_ROWS - 1)
        requanto.quantize(layer, "int4", column_scale=asked)
        requanto.freeze(layer)
        assert (layer.weight.column is not None) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int4", "int3", "int2", "nf4", "int6"])
def test_weights_that_are_on_the_grid_already_lose_nothing_by_default(kind, dtype, caplog):
    first = QTensor.quantize(uneven(DEFAULT_ROWS, dtype=dtype), kind).dequantize()
    for weight, is_on_grid in ((first, True), (uneven(DEFAULT_ROWS, dtype=dtype), False)):
        with caplog.at_level(logging.INFO, logger="requanto"):
            again = QTensor.quantize(weight, kind, column_scale="default", name="a.b.weight")
        assert (again.column is None) == is_on_grid
        assert ("a.b.weight: its weights are on the type's grid already" in caplog.text) == is_on_grid
        caplog.clear()
    assert error(first, QTensor.quantize(first, kind, column_scale="default")) < 0.005


def test_optimum_quantos_optimizers_have_none():
    layer = torch.nn.Linear(64, 64)
    with pytest.raises(ValueError, match="which does not support column_scale"):
        requanto.quantize(layer, "int8", optimizer=AbsmaxOptimizer(), column_scale="std")
    requanto.quantize(layer, "int8", optimizer=AbsmaxOptimizer(), column_scale=False)
    requanto.freeze(layer)
    assert layer.weight.column is None


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from(sorted(KINDS)))
def test_any_small_weight(rows, length, dtype, kind):
    weight = random(LEAST_ROWS + rows, length, seed=rows * length, dtype=dtype)
    weight[:, :: rows + 1] *= 100
    quantized = QTensor.quantize(weight, "int8", column_scale=kind)
    assert error(weight, quantized) < 0.02
