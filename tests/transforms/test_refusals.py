"""Bad input is refused before anything changes, and an error in the middle leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

import requanto
from requanto.transforms import fold_model
from requanto.transforms.inputs import trial_inputs
from requanto.transforms.twin import Twin


def block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.RMSNorm(32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    model[0].weight.data.uniform_(0.5, 2)
    return model.double()


def spread(matrix):
    return matrix.std(0) / matrix.std(0).log().mean().exp()


NAMES = {"1.weight", "3.weight"}


def test_a_plain_sequence_needs_no_inputs_from_the_user():
    model, x = block(), torch.randn(5, 32, dtype=torch.float64)
    before = model(x)
    found = fold_model(model, column_scale=spread, names=NAMES)
    assert found.columns == NAMES
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


def test_dead_columns_and_norm_weights_of_zero_are_left_alone():
    model, x = block(), torch.randn(5, 32, dtype=torch.float64)
    model[0].weight.data[3] = 0
    model[1].weight.data[:, 7] = 0
    model[3].weight.data[:, 5] = 0
    before = model(x)

    def scale(matrix):  # as bad as it can be
        size = matrix.std(0)
        return torch.where(size == 0, torch.zeros_like(size), size)

    assert fold_model(model, column_scale=scale, names=NAMES).columns == NAMES
    assert not model[0].weight[3].any()
    assert bool(torch.isfinite(model[1].weight).all())
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)


def test_a_fold_that_overflows_the_dtype_is_refused():
    model = block().half()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"left as it was: .* would overflow float16"):
        fold_model(model, column_scale=lambda m: torch.full((m.shape[1],), 1e-9), names=NAMES)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    model = block()
    state = copy.deepcopy(model.state_dict())
    calls = []

    def fails(matrix):
        calls.append(matrix)
        if len(calls) == 2:
            raise RuntimeError("on the way")
        return spread(matrix)

    with pytest.raises(RuntimeError, match="on the way"):
        fold_model(model, column_scale=fails, names=NAMES)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_error_while_values_are_written_back_is_undone():
    model = block()
    state = copy.deepcopy(model.state_dict())
    twin = Twin(model, trial_inputs(model))
    for parameter in twin.model.parameters():
        parameter.data += 1

    class Stubborn(nn.Parameter):
        @property
        def data(self):
            return self.detach()

        @data.setter
        def data(self, values):
            raise RuntimeError("not this one")

    model[3].bias = Stubborn(model[3].bias.detach())
    with pytest.raises(RuntimeError, match="not this one"):
        twin.write_back()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_quantized_weights_are_refused():
    model = block().float()
    requanto.quantize(model, weights="int8", include="1")
    requanto.freeze(model)
    with pytest.raises(ValueError, match=r"1\.weight is quantized; folding changes float weights"):
        fold_model(model, column_scale=spread, names={"3.weight"})


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight is not in memory"):
        fold_model(block().to("meta"), column_scale=spread, names=NAMES)


def test_inputs_that_cannot_be_guessed_are_asked_for():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, y):
            return self.layer(x + y)

    with pytest.raises(ValueError, match=r"takes 2 arguments \(x, y\): give one input"):
        trial_inputs(Two())
    pair = torch.ones(2, 8), torch.zeros(2, 8)
    assert trial_inputs(Two(), [pair])[0] == pair
    assert trial_inputs(Two(), lambda model: model(*pair))[0] == pair
    with pytest.raises(ValueError, match="did not run this model"):
        trial_inputs(Two(), lambda model: None)


def test_a_model_that_cannot_run_is_left_as_it_was():
    model = block()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        fold_model(model, column_scale=spread, names=NAMES, inputs=torch.ones(2, 5))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
