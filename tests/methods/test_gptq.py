"""GPTQ on one matrix, held against a plain float64 implementation, and what it does beyond."""

import pytest
import torch

from requanto.config.config import LayerOptions
from requanto.config.plan import PlannedWeight
from requanto.dtypes.qtypes import qfloat8, qfp4, qint2, qint3, qint4, qint8, qnf4, quint8
from requanto.methods.gptq import descend, gptq, refit, row_errors
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer
from requanto.methods.method import corrected
from requanto.methods.scaling import nearest


def problem(rows=12, columns=64, seed=0, samples=256):
    """A weight and a Hessian with unequal, correlated channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    spread = torch.randn(columns, generator=generator).exp()
    inputs = torch.randn(samples, columns, generator=generator) @ mixing * spread
    return weight, inputs.t() @ inputs / samples, inputs


def round_to_nearest(weight, grid, group):
    groups = weight.reshape(-1, group)
    scale, shift = grid.search(groups, torch.ones(group))
    return grid.round(groups, scale[:, None], None if shift is None else shift[:, None]).view_as(weight)


def plain_gptq(weight, hessian, scale, shift, bits, group, damping, order):
    """Frantar et al. 2022, equations 2 and 3, in float64: no blocks, no factor, a new inverse for every column."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    left = list(order)
    rounded = torch.zeros_like(weight)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        s, z = scale[:, column // group].double(), shift[:, column // group].double()
        codes = ((weight[:, column] + z) / s).round().clamp(0, 2**bits - 1)
        rounded[:, column] = codes * s - z
        error = (weight[:, column] - rounded[:, column]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None, :]
        left.pop(0)
    return rounded


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("kind", [qint4, qint2])
@pytest.mark.parametrize("order", ["columns", "none"])
def test_plain_gptq_is_the_papers(kind, group, order):
    weight, hessian, _ = problem()
    grid = Grid(kind, True, torch.float32)
    found = gptq(weight, hessian, grid, group, order=order, rounds=0, damping=0.01)
    columns = range(64) if order == "none" else hessian.diagonal().argsort(descending=True, stable=True).tolist()
    expected = plain_gptq(weight, hessian, found.scale, found.shift, kind.bits, group, 0.01, columns)
    # A code on the edge between two may fall either way; all others are the same.
    assert (found.values - expected).abs().gt(1e-4).float().mean() < 0.01
    errors = [
        row_errors(weight.double() - values, hessian.double()).sum().item()
        for values in (found.values.double(), expected)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "affine"),
    [
        *((qint2, True), (qint4, True), (qint4, False), (qint8, False), (qfloat8, False)),
        *((qint3, True), (quint8, True), (qnf4, False), (qfp4, False)),
    ],
)
@pytest.mark.parametrize("group", [16, None])
def test_it_beats_rounding_to_nearest_and_every_round_lowers_the_error(kind, affine, group):
    weight, hessian, _ = problem()
    grid = Grid(kind, affine, torch.float32)
    nearest = row_errors(weight - round_to_nearest(weight, grid, group or 64), hessian).sum()
    errors = [
        row_errors(weight - gptq(weight, hessian, grid, group, rounds=r, damping=0.01).values, hessian).sum()
        for r in (0, 1, 3)
    ]
    assert errors[0] < 0.6 * nearest
    assert errors[2] <= errors[1] <= errors[0] * 1.02  # with damping, what is lowered is the damped error


def test_values_are_what_scale_and_shift_and_codes_say():
    weight, hessian, _ = problem()
    for dtype in (torch.float32, torch.bfloat16):
        grid = Grid(qint4, True, dtype)
        found = gptq(weight, hessian, grid, 16)
        wide = found.scale.repeat_interleave(16, 1), found.shift.repeat_interleave(16, 1)
        assert torch.equal(grid.round(found.values, *wide), found.values)
        assert torch.equal(found.scale.to(dtype).float(), found.scale)
        codes = ((found.values + wide[1]) / wide[0]).round()
        assert codes.min() >= 0
        assert codes.max() <= 15


def test_refit_is_the_least_squares_solution():
    weight, hessian, _ = problem(rows=3)
    grid = Grid(qint2, True, torch.float32)
    found = gptq(weight, hessian, grid, 16, rounds=0)
    scale, shift = refit(weight, hessian, grid, 16, found)
    codes = grid.codes(found.values, found.scale.repeat_interleave(16, 1), found.shift.repeat_interleave(16, 1))
    factor = torch.linalg.cholesky(hessian.double())  # error = |factor^T e|^2
    for row in range(3):
        indicator = torch.block_diag(*[torch.ones(16, 1, dtype=torch.float64)] * 4)
        design = torch.cat([codes[row, :, None].double() * indicator, -indicator], 1)
        best = torch.linalg.lstsq(factor.t() @ design, factor.t() @ weight[row].double()).solution
        torch.testing.assert_close(scale[row].double(), best[:4], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(shift[row].double(), best[4:], rtol=1e-3, atol=1e-4)


def test_descent_ends_where_no_single_code_can_be_better():
    weight, hessian, _ = problem(rows=2, columns=16)
    grid = Grid(qint4, True, torch.float32)
    scale, shift = torch.full((2, 16), 0.4), torch.full((2, 16), 3.0)
    values = grid.round(weight, scale, shift)
    for _ in range(20):
        values = descend(weight, hessian, grid, values, scale, shift)
    lowest = row_errors(weight - values, hessian)
    for column in range(16):
        for step in (-0.4, 0.4):
            other = values.clone()
            other[:, column] += step
            inside = ((other[:, column] + 3.0) / 0.4).round()
            allowed = (inside >= 0) & (inside <= 15)
            assert bool((row_errors(weight - other, hessian) >= lowest - 1e-4)[allowed].all())


def test_channels_that_were_always_zero_are_rounded_to_nearest():
    weight, hessian, inputs = problem()
    inputs[:, 5] = 0
    hessian = inputs.t() @ inputs / len(inputs)
    grid = Grid(qint8, False, torch.float32)
    found = gptq(weight, hessian, grid, 16)
    assert bool(found.values.isfinite().all())
    assert bool(((found.values - weight)[:, 5].abs() <= found.scale[:, 0] * 0.51).all())
    everything_dead = gptq(weight, torch.zeros_like(hessian), grid, 16)
    assert bool(
        ((everything_dead.values - weight).abs() <= everything_dead.scale.repeat_interleave(16, 1) * 0.51).all()
    )


def test_fewer_samples_than_channels():
    weight, hessian, inputs = problem(samples=7)
    grid = Grid(qint4, True, torch.float32)
    found = gptq(weight, hessian, grid, 16)
    nearest = round_to_nearest(weight, grid, 16)
    assert ((weight - found.values) @ inputs.t()).square().sum() < 0.3 * (
        (weight - nearest) @ inputs.t()
    ).square().sum()


def test_nan_is_refused():
    weight, hessian, _ = problem()
    hessian[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"inputs of layer\.weight hold NaN"):
        gptq(weight, hessian, Grid(qint4, True, torch.float32), 16, name="layer.weight")


def test_the_search_weighs_what_matters():
    groups = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(32)
    importance[:4] = 1000
    grid = Grid(qint4, True, torch.float32)

    def error(weights):
        scale, shift = grid.search(groups, weights)
        return (importance * (grid.round(groups, scale[:, None], shift[:, None]) - groups).square()).sum()

    assert error(importance) < 0.7 * error(torch.ones(32))


@pytest.mark.parametrize(("kind", "affine"), [(qint2, True), (qint4, True), (qint4, False), (qint8, False)])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("method", ["gptq", "nearest", "groups"])
def test_scales_in_few_bits_are_read_back_as_they_were_chosen(kind, affine, bits, method):
    weight, hessian, _ = problem()
    weight[3] = 0
    weight[4, :16] = 0
    weight[5] += 3  # all on one side of 0
    linear = torch.nn.Linear(64, 12, bias=False)
    linear.weight.data.copy_(weight)
    options = LayerOptions(kind.name, 16, symmetric=not affine, scale_bits=bits)
    layer = Layer("weight", PlannedWeight(options, 0, False, "linear"), [(linear, "weight")])
    grid = layer.grid()
    if method == "nearest":
        found = nearest(weight, hessian.diagonal(), grid, 16, steps=8)
    else:
        found = gptq(weight, hessian, grid, 16, order="columns" if method == "gptq" else "groups")
    tensor = layer.tensor(found, grid)
    assert tensor.scale_bits == bits
    torch.testing.assert_close(tensor.dequantize(), found.values, rtol=1e-6, atol=1e-6)
    assert bool((found.values[3] == 0).all())


def asymmetric(seed, columns=32, rows=8, samples=256):
    """A weight, the float model's inputs, and those of the quantized model, which differ."""
    weight, _, inputs = problem(rows, columns, seed, samples)
    generator = torch.Generator().manual_seed(100 + seed)
    change = torch.eye(columns) + 0.15 * torch.randn(columns, columns, generator=generator) / columns**0.5
    return weight.double(), inputs.double(), (inputs @ change).double()


def gptaq(weight, wanted, given, scale, shift, bits, group):
    """Li et al. 2025 (arXiv:2504.02692) column by column, each step by its own normal equations, in float64."""
    moving, rounded = weight.clone(), torch.zeros_like(weight)
    hessian = given.t() @ given
    for column in range(weight.shape[1]):
        left = list(range(column, weight.shape[1]))
        inverse = torch.linalg.inv(hessian[left][:, left])
        s, z = scale[:, column // group].double(), shift[:, column // group].double()
        rounded[:, column] = ((moving[:, column] + z) / s).round().clamp(0, 2**bits - 1) * s - z
        # Columns that are left take the error of this one, and what its input differs from the float model's.
        residual = moving[:, column, None] * (wanted[:, column] - given[:, column])
        free = residual @ given[:, left] @ inverse
        error = rounded[:, column] - moving[:, column] - free[:, 0]
        moving[:, left] += free + error[:, None] / inverse[0, 0] * inverse[0]
    return rounded


def test_the_corrected_weight_has_the_objective_of_asymmetric_calibration():
    """|Q x - W y|^2 is |(Q - V) x|^2 plus what no Q changes, and rounding V to it is no worse than GPTAQ's own updates."""
    ours, theirs, plain = 0.0, 0.0, 0.0
    for seed in range(4):
        weight, wanted, given = asymmetric(seed)
        hessian, cross = given.t() @ given, (wanted - given).t() @ given
        target = corrected(weight, hessian, cross, 1e-9, "weight")

        def objective(values, weight=weight, wanted=wanted, given=given):
            return (given @ values.t() - wanted @ weight.t()).square().sum().item()

        first, second = weight + torch.randn_like(weight), weight - torch.randn_like(weight)
        difference = row_errors(first - target, hessian).sum() - row_errors(second - target, hessian).sum()
        assert objective(first) - objective(second) == pytest.approx(difference.item(), rel=1e-6)

        grid = Grid(qint3, True, torch.float32)
        choice = {"order": "none", "damping": 1e-6, "rounds": 0}
        found = gptq(target.float(), hessian.float(), grid, 16, **choice)
        ours += objective(found.values.double())
        theirs += objective(gptaq(weight, wanted, given, found.scale, found.shift, 3, 16))
        plain += objective(gptq(weight.float(), hessian.float(), grid, 16, **choice).values.double())
    assert ours < 1.02 * theirs
    assert ours < 0.8 * plain
