"""`requanto.quantize` with rotation='fold' and fold=True, alone and with what else it does."""

import copy
import logging

import pytest
import torch
from torch import nn

import requanto
from requanto.tensor.qtensor import QTensor


class Mlp(nn.Module):
    """Uneven columns behind a norm, an up projection, and a layer that nothing folds into."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down, self.last = (
            nn.RMSNorm(64),
            nn.Linear(64, 96),
            nn.Linear(96, 64),
            nn.Linear(64, 40),
        )
        with torch.no_grad():
            self.up.weight *= torch.randn(64).exp()
            self.down.weight *= torch.randn(96).exp()
            self.last.weight *= torch.randn(64).exp()

    def forward(self, x):
        return self.last(torch.sin(self.down(self.up(self.norm(x)))))


X = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))


def error(model, expected):
    with torch.no_grad():
        return float((model(X) - expected).norm() / expected.norm())


def quantized(**options):
    model = Mlp()
    requanto.quantize(model, weights="int4", group_size=32, progress=False, **options)
    requanto.freeze(model)
    return model


def test_folded_scales_lower_the_error_and_are_not_stored():
    expected = Mlp()(X).detach()
    plain = error(quantized(column_scale=False), expected)
    folded = quantized(fold=True, column_scale="root")
    assert folded.up.weight.column is None
    assert folded.down.weight.column is None
    assert folded.last.weight.column is not None  # no fold is exact, so it is multiplied into x
    assert error(folded, expected) < 0.9 * plain
    ordinary = quantized(fold=True, column_scale="root").state_dict()
    assert all(torch.equal(value, ordinary[key]) for key, value in folded.state_dict().items())


@pytest.mark.parametrize(("kind", "bits", "best"), [("int4", 4, "mean"), ("int2", None, "mean"), ("int2", 4, "std")])
def test_fold_takes_the_best_kind_of_the_type_where_none_is_given(kind, bits, best):
    norms = []
    for asked in (None, True, "std", "mean"):
        model = Mlp()
        requanto.quantize(model, weights=kind, scale_bits=bits, group_size=16, fold=True, column_scale=asked)
        norms.append(model.norm.weight)
    ordinary, true, std, mean = norms
    assert torch.equal(ordinary, true)
    assert torch.equal(ordinary, std if best == "std" else mean)
    assert not torch.equal(std, mean)
    assert not torch.equal(ordinary, Mlp().norm.weight)


def test_weights_that_are_not_quantized_get_no_scale():
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    requanto.quantize(model, weights="int4", include="down", fold=True)
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert not torch.equal(model.up.weight, before["up.weight"])  # its rows take the inverse of down's scale


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_samples_come_after_the_fold_and_serve_as_inputs(method, caplog):
    expected = Mlp()(X).detach()
    model = Mlp()
    requanto.quantize(
        model, weights="int3", group_size=32, calibration=(x for x in [X]), method=method, fold=True, column_scale="mean",
        progress=False,
    )  # fmt: skip
    assert all(isinstance(layer.weight, QTensor) for layer in (model.up, model.down, model.last))
    assert not torch.equal(model.norm.weight, Mlp().norm.weight)
    # A second scale would cost time at run time, which the fold is there to save.
    assert model.up.weight.column is None
    assert model.down.weight.column is None
    assert model.last.weight.column is not None  # no fold is exact, so it is multiplied into x
    assert error(model, expected) < 0.9  # three bits, and columns of very different size; a wrong fold gives 1.4


def test_a_budget_measures_the_folded_weights():
    model = Mlp()
    requanto.quantize(model, weights="auto", bits=7, fold=True, column_scale="root")
    requanto.freeze(model)
    assert model.up.weight.column is None
    assert not torch.equal(model.norm.weight, Mlp().norm.weight)


def test_what_asks_for_nothing_or_two_things_is_refused():
    with pytest.raises(ValueError, match="column_scale=False asks for none"):
        requanto.quantize(Mlp(), weights="int4", fold=True, column_scale=False)
    with pytest.raises(ValueError, match="rotation='fold' found no exact rotation: the model has no embedding table"):
        requanto.quantize(Mlp(), weights="int4", rotation="fold")
    with pytest.raises(ValueError, match="rotation='fold' rotates a whole float model"):
        QTensor.quantize(torch.randn(32, 64), "int4", rotation="fold")
    with pytest.raises(ValueError, match=r"modules\['\*'\]\['rotation'\]='fold' rotates a whole float model"):
        requanto.QuantoConfig("int4", modules={"*": {"rotation": "fold"}})
    with pytest.raises(ValueError, match="none is: set weights="):
        requanto.quantize(Mlp(), activations="int8", fold=True)
    model = Mlp()
    requanto.quantize(model, weights="int4")
    with pytest.raises(ValueError, match="up is to be quantized already; fold before quantizing"):
        requanto.quantize(model, weights="int4", fold=True)


def test_a_log_line_names_what_is_left_out(caplog):
    with caplog.at_level(logging.INFO, "requanto.transforms"):
        quantized(fold=True)
    assert "last.weight: no norm and no layer takes the inverse of its column scale exactly" in caplog.text
    assert "to try folds" in caplog.text
    assert "GB in addition to the model" in caplog.text


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"calibration": [X], "method": "gtpq"}, "gtpq"),
        ({"calibration": [X], "method": "gptq", "method_options": {"dampnig": 1}}, "dampnig"),
        ({"calibration": []}, "no samples"),
        ({"calibration": [X], "optimizer": requanto.HqqOptimizer()}, "optimizer="),
    ],
)
def test_what_is_refused_is_refused_before_the_model_is_folded(how, message):
    torch.manual_seed(0)
    model = Mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        requanto.quantize(model, weights="int4", fold=True, **how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
