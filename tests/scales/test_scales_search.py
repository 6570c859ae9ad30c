"""Searches for scale and shift, against their own objectives in float64, and the names they are asked for by."""

import json

import pytest
import torch
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig, qtypes
from requanto.scales import CALIBRATED, SEARCHES, check_method
from requanto.scales.search import default_method, valid_methods

INTEGERS = ["int2", "int3", "int4", "int5"]


def heavy_tailed(rows: int, length: int, seed: int) -> torch.Tensor:
    """Weights with outliers, as those of trained layers: Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, length, generator=generator)
    chi = torch.randn(rows, length, 4, generator=generator).square().sum(-1)
    return 0.02 * normal * (4 / chi).sqrt()


def errors(weight: torch.Tensor, tensor: QTensor, power: float = 0.0) -> torch.Tensor:
    """sum |w|^power (w - dequantized)^2 by group, in float64."""
    wide = weight.double()
    found = wide.abs().pow(power) * (wide - tensor.dequantize(torch.float32).double()).square()
    return found.reshape(weight.shape[0], tensor.scale.shape[-1], -1).sum(-1)


@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize(("search", "power"), [("mse", 0.0), ("weighted", 0.5)])
@pytest.mark.parametrize("kind", ["int2", "int3", "int4"])
def test_each_search_does_what_its_name_says(kind, search, power, symmetric):
    """Less of its own error than minmax on the whole, for weights with outliers."""
    weight = heavy_tailed(64, 512, 0)
    options = {"group_size": 128, "symmetric": symmetric}
    found = errors(weight, QTensor.quantize(weight, kind, search=search, **options), power).sum()
    plain = errors(weight, QTensor.quantize(weight, kind, search="minmax", **options), power).sum()
    assert found < (0.99 if kind == "int4" else 0.95) * plain


@pytest.mark.parametrize("kind", ["int2", "int3", "int4"])
def test_scale_and_shift_fit_their_codes(kind):
    """They are near the best ones for the codes that were chosen: the straight line through them, in float64."""
    weight = heavy_tailed(16, 100, 11)
    tensor = QTensor.quantize(weight, kind, group_size=None, search="mse")
    codes, wide = tensor.codes().double(), weight.double()
    least = torch.zeros((), dtype=torch.float64)
    for row in range(16):
        design = torch.stack([codes[row], -torch.ones(100, dtype=torch.float64)], 1)
        fitted = design @ torch.linalg.lstsq(design, wide[row].unsqueeze(1), driver="gelsd").solution
        least += (fitted[:, 0] - wide[row]).square().sum()
    assert errors(weight, tensor).sum() <= 1.03 * least


@pytest.mark.parametrize("kind", ["int2", "int3", "int4"])
def test_aligned_has_less_squared_error_than_minmax(kind):
    weight = heavy_tailed(64, 512, 5)
    found = errors(weight, QTensor.quantize(weight, kind, search="aligned", group_size=128)).sum()
    plain = errors(weight, QTensor.quantize(weight, kind, search="minmax", group_size=128)).sum()
    assert found < (0.99 if kind == "int4" else 0.95) * plain


@pytest.mark.parametrize("kind", ["int2", "int3", "int4"])
def test_aligned_keeps_the_many_weights_around_zero(kind):
    """Most weights are 0 and the others lie to one side more than to the other: zeros stay nearer to zero than by minmax."""
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(64, 512, generator=generator) + 0.4
    weight = weight.masked_fill(torch.rand(64, 512, generator=generator) < 0.8, 0.0)
    missed = {}
    for search in ("minmax", "aligned"):
        back = QTensor.quantize(weight, kind, search=search, group_size=64).dequantize()
        missed[search] = back[weight == 0].abs().mean().item()
    assert missed["aligned"] < 0.5 * missed["minmax"]


def test_aligned_without_a_shift_is_weighted():
    weight = heavy_tailed(8, 128, 7)
    one, other = (QTensor.quantize(weight, "int4", symmetric=True, search=name) for name in ("aligned", "weighted"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_quantized_before_loses_nothing(kind, symmetric, search, dtype):
    """Every search finds the grid again on which minmax put the weights (a Q4_1 file read as bfloat16, say)."""
    options = {"group_size": 32, "symmetric": symmetric}
    once = QTensor.quantize(heavy_tailed(16, 128, 3).to(dtype), kind, search="minmax", **options).dequantize()
    again = QTensor.quantize(once, kind, search=search, **options)
    plain = QTensor.quantize(once, kind, search="minmax", **options)
    torch.testing.assert_close(again.scale, plain.scale)
    assert torch.equal(again.codes(), plain.codes())


@pytest.mark.parametrize("search", list(SEARCHES))
@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize("kind", INTEGERS)
def test_odd_groups(kind, symmetric, search):
    """Zeros, equal weights, a single outlier, two values, denormal numbers: finite scales, and no error beyond minmax's."""
    rows = [torch.zeros(16), torch.full((16,), 0.3), torch.eye(16)[0] * 5, torch.tensor([1.0, -1.0] * 8)]
    rows += [torch.full((16,), -1e-30), torch.linspace(-1, 1, 16) * 1e-38, torch.linspace(-1e30, 1e30, 16)]
    weight = torch.stack(rows)
    tensor = QTensor.quantize(weight, kind, group_size=None, symmetric=symmetric, search=search)
    assert bool(torch.isfinite(tensor.scale).all())
    assert bool((tensor.scale > 0).all())
    back = tensor.dequantize()
    assert torch.equal(back[0], weight[0])
    if symmetric is None:
        torch.testing.assert_close(back[1], weight[1], rtol=1e-5, atol=0)
    assert bool(((back - weight).abs().amax(-1) <= 1.01 * weight.abs().amax(-1)).all())


def test_a_function_of_ones_own_is_a_search():
    def halves(groups, kind, affine):
        assert groups.shape == (4, 2, 32)
        assert groups.dtype == torch.float32
        return torch.full((4, 2), 0.5), torch.zeros(4, 2)

    tensor = QTensor.quantize(torch.randn(4, 64).bfloat16(), "int4", group_size=32, search=halves)
    assert bool((tensor.scale == 0.5).all())


# ------------------------------------------------------------------ names


def test_every_type_has_a_default_that_fits_it():
    for kind in qtypes.values():
        assert default_method(kind) in valid_methods(kind)
        assert set(valid_methods(kind)) <= set(SEARCHES)
    assert default_method(qtypes["qfloat8"]) == "mse"
    assert default_method(qtypes["qint8"]) == "minmax"


def test_the_default_is_the_search_of_that_name():
    weight = heavy_tailed(8, 128, 1)
    for kind in ("int2", "int4", "int8", "float8"):
        named = QTensor.quantize(weight, kind, search=default_method(QTensor.quantize(weight, kind).qtype))
        assert torch.equal(QTensor.quantize(weight, kind), named)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_method_that_needs_samples_points_to_where_they_are_given(name):
    with pytest.raises(ValueError, match=rf"needs samples: requanto.quantize\(.*calibration=samples.*{name}"):
        QuantoConfig(weights="int4", method=name)
    with pytest.raises(ValueError, match="needs samples"):
        requanto.quantize(nn.Linear(8, 8), weights="int4", method=name)


def test_a_wrong_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"unknown method 'wieghted'; did you mean 'weighted'\? Known: minmax, mse, weighted, aligned, hqq",
    ):
        QuantoConfig(weights="int4", method="wieghted")
    with pytest.raises(ValueError, match=r"unknown search 'best'\. Known"):
        QTensor.quantize(torch.ones(2, 8), "int4", search="best")
    with pytest.raises(ValueError, match="'hqq' does not fit qfloat8_e4m3fn, which takes minmax or mse"):
        QuantoConfig(weights="float8", method="hqq")
    with pytest.raises(ValueError, match=r"modules\['\*\.mlp'\]\['method'\]='hqq' does not fit"):
        QuantoConfig(weights="int4", method="hqq", modules={"*.mlp": "float8"})
    with pytest.raises(ValueError, match="uses no samples"):
        requanto.quantize(nn.Linear(8, 8), weights="int4", method="hqq", calibration=[torch.ones(1, 8)])
    with pytest.raises(ValueError, match="does not support search"):
        requanto.quantize(nn.Linear(8, 8), weights="int4", method="hqq", optimizer=requanto.HqqOptimizer())
    assert check_method(None) is None


def test_the_method_is_kept_in_the_config():
    config = QuantoConfig(weights="int4", method="hqq", modules={"*.head": {"weights": "float8", "method": "mse"}})
    values = json.loads(config.to_json_string())
    assert values["method"] == "hqq"
    assert QuantoConfig.from_dict(values) == config
    assert config.choice_for(None).method == "hqq"
    assert config.choice_for("*.head").method == "mse"
    del values["method"], values["modules"]  # a config written before there were methods
    assert QuantoConfig.from_dict(values).method is None


@pytest.mark.parametrize("method", [None, *SEARCHES])
def test_quantize_uses_the_method(method):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    model[0].weight.data = heavy_tailed(32, 64, 7)
    wanted = QTensor.quantize(model[0].weight.data, "int4", search=method)
    requanto.quantize(model, weights="int4", method=method)
    assert requanto.quantization_map(model)["0"].get("search") == method
    requanto.freeze(model)
    assert torch.equal(model[0].weight.data, wanted)
