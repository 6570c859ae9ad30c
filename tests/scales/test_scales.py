"""Scales, shifts and codes against float64 formulas written here, and the promised outcome of odd weights."""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor, qfloat8, qfloat8_e4m3fnuz, qfloat8_e5m2, qint2, qint4, qint8, qtypes
from requanto.scales import default_group_size, fit_group_size, quantize_weight_data
from requanto.scales import weights as weights_module

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [qint2, qint4, qint8, qfloat8, qfloat8_e4m3fnuz, qfloat8_e5m2]
INTEGERS = [qint2, qint4, qint8]


def weights(rows: int, length: int, dtype: torch.dtype, seed: int, size: float = 0.05) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, length, generator=generator) * size).to(dtype)


def grid_error(weight: torch.Tensor, tensor: QTensor) -> torch.Tensor:
    """|w - dequantized| in float64, by group ``[rows, groups, group]``."""
    error = (weight.double() - tensor.dequantize(torch.float32).double()).abs()
    return error.reshape(weight.shape[0], tensor.scale.shape[-1], -1)


# ------------------------------------------------------------------ how far off a weight may be


@given(
    kind=st.sampled_from([qint2, qint4]),
    dtype=st.sampled_from(FLOATS),
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 16, 32]),
    rows=st.integers(1, 5),
    symmetric=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_no_weight_is_further_off_than_half_a_step(kind, dtype, groups, group, rows, symmetric, seed):
    weight = weights(rows, groups * group, dtype, seed)
    tensor = QTensor.quantize(weight, kind, group_size=group, symmetric=symmetric, search="minmax")
    grouped = weight.double().reshape(rows, groups, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    if symmetric:
        step = torch.maximum(high.clamp(min=0) / kind.qmax, low.clamp(max=0) / kind.qmin)
    else:
        step = (high - low) / (2**kind.bits - 1)
    # Scales are stored with 8 (bf16) to 11 bits: at the far end of the grid this may cost 2^bits * 2^-9 steps more.
    allowed = step * (0.5 + 2**kind.bits * 2**-8.9) + 1e-9
    assert bool((grid_error(weight, tensor) <= allowed.unsqueeze(-1)).all())


@given(dtype=st.sampled_from(FLOATS), length=st.integers(1, 70), rows=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_int8_is_within_half_a_step_of_absmax_over_127(dtype, length, rows, seed):
    weight = weights(rows, length, dtype, seed)
    tensor = QTensor.quantize(weight, "int8")
    step = weight.double().abs().amax(-1) / 127
    assert tensor.scale.dtype == torch.float32
    torch.testing.assert_close(tensor.scale.double()[:, 0], step, rtol=1e-6, atol=0)
    assert bool((grid_error(weight, tensor)[:, 0] <= step.unsqueeze(-1) * 0.5001).all())


# mantissa bits and largest value, from the OCP specification (fnuz: from its own paper, arXiv:2206.02915)
@pytest.mark.parametrize(
    ("kind", "mantissa", "largest", "smallest"),
    [(qfloat8, 3, 448.0, 2**-9), (qfloat8_e4m3fnuz, 3, 240.0, 2**-10), (qfloat8_e5m2, 2, 57344.0, 2**-16)],
)
@given(dtype=st.sampled_from(FLOATS), length=st.integers(1, 70), seed=st.integers(0, 10_000))
def test_float8_is_within_half_a_unit_in_the_last_place(kind, mantissa, largest, smallest, dtype, length, seed):
    weight = weights(4, length, dtype, seed)
    tensor = QTensor.quantize(weight, kind)
    scale = tensor.scale.double()
    # The largest weight lies within the top octave of codes, on one of them.
    code = weight.double().abs().amax(-1, keepdim=True) / scale
    assert bool(((code > largest / 2 * 0.999) & (code < largest * 1.000001)).all())
    torch.testing.assert_close(code.float().to(kind.dtype).double(), code, rtol=1e-6, atol=0)
    allowed = torch.maximum(weight.double().abs() * 2.0 ** -(mantissa + 1), scale * smallest / 2)
    assert bool((grid_error(weight, tensor)[:, 0] <= allowed * 1.0001).all())


# every code of the top octave: 2^e * (1 + i / 2^mantissa)
TOP_CODES = {
    qfloat8: [448, 416, 384, 352, 320, 288, 256, 240],
    qfloat8_e4m3fnuz: [240, 224, 208, 192, 176, 160, 144, 128],
    qfloat8_e5m2: [57344, 49152, 40960, 32768],
}


@pytest.mark.parametrize("kind", list(TOP_CODES), ids=lambda k: k.name)
@given(dtype=st.sampled_from(FLOATS), length=st.integers(1, 255), seed=st.integers(0, 10_000))
def test_float8_scales_have_the_least_squared_error_of_all_that_put_the_largest_weight_on_a_code(
    kind, dtype, length, seed
):
    weight = weights(4, length, dtype, seed)
    found = grid_error(weight, QTensor.quantize(weight, kind)).square().sum((1, 2))
    absmax = weight.double().abs().amax(-1, keepdim=True)
    errors = []
    for code in TOP_CODES[kind]:
        scale = absmax / code
        rounded = (weight.double() / scale).clamp(-kind.qmax, kind.qmax).float().to(kind.dtype).double()
        errors.append((rounded * scale - weight.double()).square().sum(-1))
    least = torch.stack(errors).amin(0)
    rounding = 1e-11 * weight.double().square().sum(-1)  # of the float32 scale
    assert bool((found <= least * 1.001 + rounding).all())


@pytest.mark.parametrize("kind", list(TOP_CODES), ids=lambda k: k.name)
def test_float8_scales_of_long_rows_have_less_error_than_absmax(kind):
    """Long rows are looked at in part: better on the whole, not in every row."""
    weight = weights(256, 1024, torch.float32, 5)
    absmax = QTensor.quantize(weight, kind, search="minmax")
    torch.testing.assert_close(absmax.scale, weight.abs().amax(-1, keepdim=True) / kind.qmax)
    chosen = grid_error(weight, QTensor.quantize(weight, kind)).square().sum()
    assert chosen < 0.99 * grid_error(weight, absmax).square().sum()


def test_one_group_by_hand():
    weight = torch.tensor([[-0.9, -0.5, 0.25, 2.0]])
    affine = QTensor.quantize(weight, "int4", group_size=None, search="minmax")
    assert affine.scale.item() == pytest.approx(2.9 / 15)
    assert affine.shift.item() == pytest.approx(0.9)
    assert affine.codes().tolist() == [[0, 2, 6, 15]]  # (w + 0.9) / 0.1933 = 0, 2.07, 5.95, 15
    symmetric = QTensor.quantize(weight, "int4", group_size=None, symmetric=True, search="minmax")
    assert symmetric.scale.item() == pytest.approx(2 / 7)
    assert symmetric.codes().tolist() == [[8 - 3, 8 - 2, 8 + 1, 8 + 7]]  # -3.15, -1.75, 0.875, 7
    eight = QTensor.quantize(weight, "int8")
    assert eight.codes().tolist() == [[-57, -32, 16, 127]]  # -57.15, -31.75, 15.875, 127


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [qint2, qint4])
def test_the_outermost_weights_get_the_outermost_codes(kind, symmetric):
    weight = weights(8, 64, torch.float32, 0)
    tensor = QTensor.quantize(weight, kind, group_size=32, symmetric=symmetric, search="minmax")
    codes = tensor.codes().reshape(8, 2, 32).int()
    if symmetric:
        reached = torch.maximum(codes.amax(-1) == 2**kind.bits - 1, codes.amin(-1) == 0)
    else:
        reached = (codes.amax(-1) == 2**kind.bits - 1) & (codes.amin(-1) == 0)
    assert bool(reached.all())


def test_quantizing_again_what_was_dequantized_changes_nothing():
    weight = weights(16, 128, torch.float32, 3)
    for kind in KINDS:
        once = QTensor.quantize(weight, kind).dequantize()
        torch.testing.assert_close(QTensor.quantize(once, kind).dequantize(), once, rtol=1e-5, atol=1e-7)


def test_more_bits_and_smaller_groups_are_more_exact():
    weight = weights(32, 256, torch.float32, 5)

    def error(kind, group):
        return (QTensor.quantize(weight, kind, group_size=group).dequantize() - weight).norm().item()

    assert error("int8", None) < error("int4", 64) / 5 < error("int2", 64) / 5
    assert error("int4", 16) < error("int4", 64) < error("int4", None)


# ------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_shapes_and_dtypes_of_what_is_stored(kind, dtype):
    data = quantize_weight_data(weights(6, 64, dtype, 0), kind, 16, affine=kind.bits < 8)
    assert data.qdata.dtype == kind.storage_dtype
    assert data.qdata.shape == (6, 64 * kind.bits // 8)
    assert data.scale.shape == (6, 4)
    assert data.scale.dtype == dtype
    assert (data.shift is None) == (kind.bits == 8)
    row = quantize_weight_data(weights(6, 64, dtype, 0), kind, None, affine=False)
    assert row.scale.shape == (6, 1)
    assert row.scale.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_tensor_cut_into_chunks_gives_the_same_codes(kind, monkeypatch):
    weight = weights(37, 64, torch.bfloat16, 1)
    whole = quantize_weight_data(weight, kind, 16, affine=kind.bits < 8)
    monkeypatch.setattr(weights_module, "CHUNK", 64 * 5)
    cut = quantize_weight_data(weight, kind, 16, affine=kind.bits < 8)
    for one, two in zip(whole, cut, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def test_the_weight_itself_is_left_alone():
    weight = weights(4, 32, torch.float32, 2)
    before = weight.clone()
    for kind in KINDS:
        QTensor.quantize(weight, kind)
    assert torch.equal(weight, before)


def test_a_view_is_quantized_as_it_is_seen():
    weight = weights(32, 48, torch.float32, 2)
    seen, copied = QTensor.quantize(weight.t(), "int4"), QTensor.quantize(weight.t().contiguous(), "int4")
    assert torch.equal(seen, copied)


# ------------------------------------------------------------------ odd weights


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [8, None])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_zero_row_stays_zero(kind, group, dtype):
    weight = weights(3, 32, dtype, 0)
    weight[1] = 0
    tensor = QTensor.quantize(weight, kind, group_size=group)
    assert bool((tensor.dequantize()[1] == 0).all())
    assert bool(torch.isfinite(tensor.scale).all())
    assert bool((tensor.scale > 0).all())


@pytest.mark.parametrize("value", [0.7, -3.0, 1e-6, 250.0])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_constant_row_comes_back(kind, value):
    weight = torch.full((2, 16), value)
    torch.testing.assert_close(QTensor.quantize(weight, kind).dequantize(), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [qint2, qint4], ids=lambda k: k.name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_small_weights_keep_their_relative_accuracy(kind, dtype, symmetric):
    """Half-precision scales of very small groups are subnormal numbers: they must not be cut to the smallest normal one."""
    weight = weights(4, 64, dtype, 0, size=1e-4)
    tensor = QTensor.quantize(weight, kind, group_size=32, symmetric=symmetric)
    usual = QTensor.quantize(weights(4, 64, dtype, 0, size=1.0), kind, group_size=32, symmetric=symmetric)
    error = (tensor.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
    wanted = (usual.dequantize(torch.float32) - weights(4, 64, dtype, 0, size=1.0).float()).norm()
    assert error <= 1.1 * wanted / weights(4, 64, dtype, 0, size=1.0).float().norm()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_very_large_weights(kind, dtype):
    largest = min(torch.finfo(dtype).max, 1e30)
    weight = torch.tensor([[largest, -largest, 0, largest / 2] * 8], dtype=dtype)
    tensor = QTensor.quantize(weight, kind, group_size=None)
    assert bool(torch.isfinite(tensor.scale).all())
    back = tensor.dequantize(torch.float32).double()
    largest = weight.double().abs().max()
    limit = largest * 1.0001 if kind.bits == 8 else 2.01 * largest  # the step of 2-bit codes is as large as the weight
    assert bool((back.abs() <= limit).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [16, None])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_nan_and_inf_are_refused_with_name_count_and_way_out(kind, group, value):
    weight = weights(4, 64, torch.float32, 0)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=r"layer\.weight holds NaN or Inf in 1 of .* groups.*modules_to_not_convert"):
        QTensor.quantize(weight, kind, group_size=group, name="layer.weight")


@pytest.mark.parametrize("shape", [(1, 64), (1, 1), (64, 1), (3, 7), (5, 9), (1, 300)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_one_row_one_column_and_odd_lengths(kind, shape):
    weight = weights(*shape, torch.float32, 1)
    tensor = QTensor.quantize(weight, kind)
    assert tensor.dequantize().shape == shape
    assert grid_error(weight, tensor).amax() <= weight.abs().max() * (0.6 if kind is qint2 else 0.13)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_empty_weights(kind, shape):
    assert QTensor.quantize(torch.empty(shape), kind).dequantize().shape == shape


def test_integers_and_8_bit_shifts_are_refused():
    with pytest.raises(ValueError, match=r"proj: only float weights can be quantized, found torch\.int32"):
        QTensor.quantize(torch.ones(2, 2, dtype=torch.int32), "int8", name="proj")
    with pytest.raises(ValueError, match="qint8 codes are symmetric"):
        QTensor.quantize(torch.ones(2, 2), "int8", symmetric=False)
    with pytest.raises(ValueError, match="group size 5 does not divide the row length 8"):
        quantize_weight_data(torch.ones(2, 8), qint4, 5, affine=True)


# ------------------------------------------------------------------ the rule for groups


@pytest.mark.parametrize(
    ("wanted", "length", "got"),
    [
        (64, 128, 64),
        (64, 64, None),  # one group is one scale a row
        (64, 96, 32),
        (64, 100, None),  # 32, 16 and 8 do not divide 100 either
        (64, 40, 8),
        (128, 64, None),  # 64 divides, and is the row
        (128, 48, 16),
        (32, 8, None),
        (5, 20, 5),  # a size below 8 that divides is taken as it is
        (5, 21, None),
        (7, 21, 7),
        (None, 128, None),
        (-1, 128, None),
        (1, 4, 1),
    ],
)
def test_a_group_that_does_not_divide_is_halved(wanted, length, got):
    assert fit_group_size(wanted, length) == got


@given(wanted=st.integers(1, 512), length=st.integers(1, 2000))
def test_the_group_always_divides_and_is_never_larger_than_wished(wanted, length):
    group = fit_group_size(wanted, length)
    if group is not None:
        assert length % group == 0
        assert group <= wanted
        assert group < length
    if length % wanted == 0 and wanted < length:
        assert group == wanted


def test_another_group_than_wished_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="requanto"):
        fit_group_size(64, 96, "layer.weight")
        fit_group_size(64, 100, "other.weight")
        fit_group_size(64, 128, "silent.weight")
    assert [r.getMessage() for r in caplog.records] == [
        "layer.weight: group size 64 does not divide its row length 96, using group size 32",
        "other.weight: group size 64 does not divide its row length 100, using one scale a row",
    ]


@pytest.mark.parametrize("wanted", [0, -2, 1.5, "64", True])
def test_a_group_size_that_is_none(wanted):
    with pytest.raises(ValueError, match="group_size must be a positive integer, or None"):
        fit_group_size(wanted, 64)


def test_default_groups():
    assert {kind.name: default_group_size(kind) for kind in qtypes.values() if kind.bits == 8}.keys() >= {"qint8"}
    assert all(default_group_size(kind) is None for kind in qtypes.values() if kind.bits == 8 and kind.blocks is None)
    assert (default_group_size(qtypes["qnvfp4"]), default_group_size(qtypes["qmxfp8_e4m3"])) == (16, 32)
    assert (default_group_size(qint4), default_group_size(qint2)) == (64, 32)
