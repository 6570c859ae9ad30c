"""Methods with column scales, rotation and low-rank terms: what is stored is what was rounded, and the error is smaller."""

import copy
import logging

import pytest
import torch
from torch import nn
from whole_models import quiet

import requanto
from requanto.config.config import LayerOptions
from requanto.config.plan import PlannedWeight
from requanto.methods import Gptq
from requanto.methods.basis import Basis, weighted_factors
from requanto.methods.gptq import row_errors
from requanto.methods.layers import Layer
from requanto.methods.moments import Moments
from requanto.tensor.qtensor import QTensor


def problem(rows=48, columns=64, seed=0):
    """A layer whose columns differ in size, correlated inputs, and their moments."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(columns, generator=generator).exp()
    weight = torch.randn(rows, columns, generator=generator) * spread
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(512, columns, generator=generator) @ mixing / spread.sqrt()
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight.data.copy_(weight)
    moments = Moments(columns, weight.device, full=True, paired=False)
    moments.add(inputs)
    return linear, moments, inputs


def rounded(options, method=None, seed=0):
    """(relative output error, the stored weight, the values that the engine goes on with)."""
    linear, moments, _ = problem(seed=seed)
    weight = linear.weight.detach().clone()
    layer = Layer("weight", PlannedWeight(options, 0, False, "linear"), [(linear, "weight")])
    layer.round(moments, method or Gptq())
    values = linear.weight.detach().clone()
    layer.finish()
    lost = row_errors(linear.weight.dequantize() - weight, moments.hessian).sum()
    return float(lost / row_errors(weight, moments.hessian).sum()), linear.weight, values


CHOICES = {
    "column": {"column_scale": "root"},
    "rotation": {"rotation": 32},
    "low rank": {"low_rank": 4},
    "all": {"column_scale": "std", "rotation": 16, "low_rank": 3},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "nf4", "codebook3"])
@pytest.mark.parametrize("bits", [None, 4])
def test_what_is_stored_is_what_was_rounded(choice, kind, bits):
    group = None if kind == "int8" else 16
    options = LayerOptions(kind, group, scale_bits=bits if group else None, **CHOICES[choice])
    _, stored, values = rounded(options)
    torch.testing.assert_close(stored.dequantize(), values, rtol=1e-5, atol=1e-5)
    assert (stored.column is not None) == ("column_scale" in CHOICES[choice])
    assert stored.rotation == CHOICES[choice].get("rotation")
    assert (stored.up is not None) == ("low_rank" in CHOICES[choice])


@pytest.mark.parametrize("kind", ["int2", "int4"])
@pytest.mark.parametrize("choice", ["column", "low rank"])
def test_each_lowers_the_error(choice, kind):
    for seed in range(3):
        plain, _, _ = rounded(LayerOptions(kind, 16), seed=seed)
        better, _, _ = rounded(LayerOptions(kind, 16, **CHOICES[choice]), seed=seed)
        assert better < 0.85 * plain


def test_samples_beat_no_samples_in_every_basis():
    for options in CHOICES.values():
        found, _, _ = rounded(LayerOptions("int3", 16, **options))
        linear, moments, _ = problem()
        weight = linear.weight.detach()
        more = {k: v for k, v in options.items()}
        plain = QTensor.quantize(weight, "int3", group_size=16, **more).dequantize()
        lost = row_errors(plain - weight, moments.hessian).sum() / row_errors(weight, moments.hessian).sum()
        assert found < 0.8 * float(lost)


def test_the_moments_are_those_of_the_inputs_in_the_basis():
    _, moments, inputs = problem()
    column = torch.rand(64) + 0.5
    basis = Basis(column, 16)
    other = Moments(64, inputs.device, full=True, paired=False)
    other.add(inputs @ basis.values(torch.eye(64)).t())  # x -> R (column * x)
    found = basis.moments(moments)
    torch.testing.assert_close(found.hessian, other.hessian, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.square, other.square, rtol=1e-3, atol=1e-2)
    weight = torch.randn(8, 64)
    torch.testing.assert_close(basis.values(basis.rows(weight)), weight)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 16)])
def test_the_low_rank_term_is_the_best_for_the_inputs(shape):
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(shape, generator=generator)
    mixing = torch.randn(shape[1], shape[1], generator=generator)
    hessian = mixing @ mixing.t() + torch.eye(shape[1])
    root = torch.linalg.cholesky(hessian)
    up, down = weighted_factors(error, root, 3, torch.float32)
    _, values, _ = torch.linalg.svd(error.double() @ root.double(), full_matrices=False)
    least = values[3:].square().sum()
    assert float(row_errors(error - up @ down, hessian).sum()) == pytest.approx(float(least), rel=1e-3, abs=1e-2)


class Pair(nn.Module):
    """Two layers with a tanh between, through which no scale folds."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 48)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def pair_and_samples():
    torch.manual_seed(0)
    model = Pair()
    spread = torch.logspace(-2, 0.5, 32)[torch.randperm(32)]  # large and small inputs in every group
    return model, [torch.randn(32, 32) * spread for _ in range(4)]


@pytest.mark.parametrize(
    ("method", "choice"),
    [
        ("awq", {"weights": "int4", "group_size": 16}),
        ("smoothquant", {"weights": "int8", "activations": "int8"}),
        ("smoothquant", {"weights": "int4", "group_size": 16, "activations": "int8", "low_rank": 8}),
    ],
)
def test_scales_of_inputs_that_cannot_be_folded_are_stored_as_column_scales(method, choice, caplog):
    model, samples = pair_and_samples()
    expected = torch.cat([model(x) for x in samples]).detach()
    errors = {}
    for column in (None, False):
        with caplog.at_level(logging.INFO):
            found = requanto.quantize(
                copy.deepcopy(model), calibration=samples, method=method, column_scale=column, **choice, **quiet
            )
        assert (found.first.weight.column is not None) == (column is None)
        errors[column] = (torch.cat([found(x) for x in samples]) - expected).norm().item()
    assert "first.weight: rounded without input scales, as column_scale=False asks" in caplog.text
    assert errors[None] < (0.95 if method == "awq" else 0.8) * errors[False]


@pytest.mark.parametrize("method", ["gptq", "signround", "awq"])
def test_whole_models_in_every_basis_are_saved_and_loaded(method, tmp_path, exact):
    model, samples = pair_and_samples()
    expected = torch.cat([model(x) for x in samples]).detach()
    options = {"signround": {"iterations": 5, "batch": 2}}.get(method, {})
    more = {"column_scale": "root", "rotation": True, "low_rank": 4}
    first = None
    for _ in range(2):  # the second run continues from the finished layers of the first
        found = requanto.quantize(
            copy.deepcopy(model),
            "int4",
            group_size=16,
            calibration=samples,
            method=method,
            method_options=options,
            resume=tmp_path,
            **more,
            **quiet,
        )
        got = torch.cat([found(x) for x in samples])
        assert ((got - expected).norm() / expected.norm()).item() < 0.05
        first = got if first is None else first
        assert torch.equal(got, first)


def test_dead_columns_constant_rows_and_nan():
    linear, _, inputs = problem()
    with torch.no_grad():
        linear.weight[:, 3] = 0  # a column of zeros
        linear.weight[5] = 0.25  # a constant row
        linear.weight[6] = 0
    inputs[:, 7] = 0  # an input that is always 0
    for more in CHOICES.values():
        again = requanto.quantize(
            copy.deepcopy(linear), "int4", group_size=16, calibration=[inputs], method="gptq", **more, **quiet
        )
        values = again.weight.dequantize()
        assert bool(torch.isfinite(values).all())
        assert float((inputs @ (values - linear.weight).t()).norm() / (inputs @ linear.weight.t()).norm()) < 0.15
        inputs_with_nan = inputs.clone()
        inputs_with_nan[0, 0] = torch.nan
        with pytest.raises(ValueError, match="the inputs of weight hold NaN"):
            requanto.quantize(copy.deepcopy(linear), "int4", calibration=[inputs_with_nan], **more, **quiet)


@pytest.mark.parametrize("kind", ["int3", "codebook4", "int8"])
def test_the_default_column_scale_is_that_of_weights_without_samples(kind):
    torch.manual_seed(0)
    layer = nn.Linear(32, 128, bias=False)
    layer.weight.data.mul_(torch.randn(32).exp())
    plain = requanto.quantize(copy.deepcopy(layer), kind)
    requanto.freeze(plain)
    found = requanto.quantize(copy.deepcopy(layer), kind, calibration=[torch.randn(64, 32)], method="gptq", **quiet)
    assert (found.weight.column is None) == (plain.weight.column is None) == (kind == "int8")
    if kind != "int8":
        torch.testing.assert_close(found.weight.column, plain.weight.column)
    none = requanto.quantize(copy.deepcopy(layer), kind, calibration=[torch.randn(64, 32)], column_scale=False, **quiet)
    assert none.weight.column is None


@pytest.mark.parametrize(
    ("kind", "scale_bits", "best"), [("qint2", 4, "std"), ("qint2", 8, "mean"), ("qint4", 4, "mean")]
)
def test_true_is_the_best_kind_as_without_samples(kind, scale_bits, best):
    linear, _, _ = problem(rows=64)
    weight = linear.weight.detach()
    options = LayerOptions(kind, group_size=16, scale_bits=scale_bits, column_scale=True)
    layer = Layer("weight", PlannedWeight(options, 0, False, "linear"), [(linear, "weight")])
    found = layer.find_basis(weight).column
    how = {"group_size": 16, "scale_bits": scale_bits}
    assert torch.equal(found, QTensor.quantize(weight, kind, column_scale=best, **how).column)
    assert torch.equal(found, QTensor.quantize(weight, kind, column_scale=True, **how).column)
