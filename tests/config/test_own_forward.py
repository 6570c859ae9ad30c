"""Layers whose class has a forward of its own: quantized if it works on the codes, else float with a line, never a crash."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from requanto import QTensor, QuantoConfig
from requanto.config.plan import plan
from requanto.model.quantize import freeze, quantize
from requanto.nn import QModuleMixin


class Transposed(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 2.0, self.bias)


class Halves(nn.Linear):
    def forward(self, x):
        a, b = self.weight.chunk(2, 0)
        return torch.cat([F.linear(x, a), F.linear(x, b)], -1)


class Columns(nn.Linear):
    def forward(self, x):
        return F.linear(x[..., :24], self.weight[:, :24])


class Grouped(nn.Linear):
    def forward(self, x):
        w = self.weight.view(4, -1, x.shape[-1]).transpose(1, 2)
        return torch.bmm(x.reshape(-1, 4, x.shape[-1]).transpose(0, 1), w).transpose(0, 1)


class Padded(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class WithState(nn.Conv1d):
    """A trial does not know what a cache is."""

    def forward(self, x, cache):
        return super().forward(torch.cat([cache["x"], x], -1))


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Positions(nn.Embedding):
    def forward(self, ids, past=0):
        return self.weight[ids + past]


class Rows(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 8 + self.weight[1]


class Whole(nn.Embedding):
    def forward(self, ids):
        return F.layer_norm(self.weight, (64,))[ids]


class Strange(nn.Linear):
    def forward(self, batch):
        return batch["x"] @ self.weight.t().contiguous()


def conv1d():
    return torch.randn(2, 4, 12)


X, IDS = (lambda: torch.randn(8, 64)), (lambda: torch.tensor([[1, 2], [3, 0]]))
IMAGE = lambda: torch.randn(2, 3, 9, 9)  # noqa: E731
#: module, its input, whether it is quantized
KINDS = {
    "transposed": (lambda: Transposed(64, 8), X, True),
    "halves": (lambda: Halves(64, 8), X, True),
    "grouped": (lambda: Grouped(64, 8), X, True),
    "padded": (lambda: Padded(4, 6, 3), conv1d, True),
    "with state": (lambda: WithState(4, 6, 3), lambda: (conv1d(), {"x": conv1d()}), True),
    "positions": (lambda: Positions(10, 64), IDS, True),
    "rows": (lambda: Rows(10, 64), IDS, True),
    "scaled": (lambda: Scaled(64, 8), X, False),
    "standardized": (lambda: Standardized(3, 6, 3), IMAGE, False),
    "other convolution": (lambda: OtherConvolution(3, 6, 3), IMAGE, False),
    "whole": (lambda: Whole(10, 64), IDS, False),
    "strange": (lambda: Strange(64, 8), lambda: ({"x": X()},), False),
    "max_norm": (lambda: nn.Embedding(10, 64, max_norm=1.0), IDS, False),
}
ALL = {"embeddings": True, "convolutions": True}


def call(module, x):
    return module(*x) if isinstance(x, tuple) else module(x)


def holder(module):
    return nn.ModuleDict({"one": module, "plain": nn.Linear(64, 64)})


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", KINDS)
def test_quantized_where_the_codes_serve_else_float_with_a_line(name, kind, caplog):
    make, sample, quantized = KINDS[name]
    torch.manual_seed(0)
    model, x = holder(make()), sample()
    with torch.device("meta"):
        planned = plan(holder(make()), QuantoConfig(kind, **ALL))
    assert ("one.weight" in planned) == quantized
    assert planned.keys() == plan(model, QuantoConfig(kind, **ALL)).keys()
    lines = [record.getMessage() for record in caplog.records if "stays float" in record.getMessage()]
    assert len(lines) == (0 if quantized else 2)  # one for each of the two plans
    assert all(line.startswith("one stays float (1 in all, class ") for line in lines)
    reference = copy.deepcopy(model["one"])
    if quantized:
        tensor = planned["one.weight"].quantize(model["one"].weight.detach(), "one.weight")
        model["one"].weight = nn.Parameter(tensor, requires_grad=False)
        reference.weight = nn.Parameter(tensor.dequantize())
    caplog.clear()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(call(model["one"], x), call(reference, x), atol=1e-5, rtol=1e-5)
    if kind == "int8":
        assert not caplog.records  # nothing was dequantized whole


@pytest.mark.parametrize("name", KINDS)
def test_named_in_full_it_is_quantized_and_runs_all_the_same(name):
    make, sample, _ = KINDS[name]
    if name == "max_norm":
        pytest.skip("the lookup itself writes")
    model, x = holder(make()), sample()
    planned = plan(model, QuantoConfig("int8", modules={"one": "int4"}, **ALL))
    tensor = planned["one.weight"].quantize(model["one"].weight.detach(), "one.weight")
    reference = copy.deepcopy(model["one"])
    model["one"].weight = nn.Parameter(tensor, requires_grad=False)
    reference.weight = nn.Parameter(tensor.dequantize())
    torch.testing.assert_close(call(model["one"], x), call(reference, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in KINDS if n != "max_norm"])
def test_in_place_quantization_keeps_every_forward_of_its_own(name, caplog):
    """The class changes there, so the forward would be lost."""
    model = holder(KINDS[name][0]())
    quantize(model, weights="int8", modules={"one": "int8"})
    assert not isinstance(model["one"], QModuleMixin)
    assert isinstance(model["plain"], QModuleMixin)
    assert any("stays float" in record.getMessage() for record in caplog.records)


COMPUTED = {
    "weight_norm": lambda m: torch.nn.utils.parametrizations.weight_norm(m),
    "spectral_norm": lambda m: torch.nn.utils.parametrizations.spectral_norm(m),
    "orthogonal": lambda m: torch.nn.utils.parametrizations.orthogonal(m),
    "old spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "old weight_norm": lambda m: torch.nn.utils.weight_norm(m),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(64, 16), lambda: nn.Conv1d(64, 16, 3)])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_stays_float(name, layer, caplog):
    model = holder(COMPUTED[name](layer()).eval())
    x = torch.randn(2, 64) if isinstance(model["one"], nn.Linear) else torch.randn(2, 64, 5)
    wanted = model["one"](x)
    assert set(plan(model, QuantoConfig(**ALL))) == {"plain.weight"}
    assert sum("one stays float" in r.getMessage() and "computed" in r.getMessage() for r in caplog.records) == 1
    freeze(quantize(model, weights="int8"))
    assert isinstance(model["plain"].weight, QTensor)
    assert torch.equal(model["one"](x), wanted)


def test_a_lazy_layer_stays_float_until_it_has_a_shape(caplog):
    model = holder(nn.LazyLinear(8))
    assert set(plan(model, QuantoConfig())) == {"plain.weight"}
    assert any("a lazy module" in record.getMessage() for record in caplog.records)
    quantize(model, weights="int8")
    assert not isinstance(model["one"], QModuleMixin)
    model["one"](torch.randn(2, 64))
    assert set(plan(holder(model["one"]), QuantoConfig())) == {"one.weight", "plain.weight"}


class Property(nn.Linear):
    """The weight is no parameter."""

    def __init__(self):
        super().__init__(64, 8)
        del self.weight
        self.stored = nn.Parameter(torch.randn(8, 64))

    @property
    def weight(self):
        return self.stored


class Buffer(nn.Linear):
    def __init__(self):
        super().__init__(64, 8)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


@pytest.mark.parametrize("make", [Property, Buffer])
def test_a_weight_that_is_no_parameter_is_left_alone(make):
    model, x = holder(make()), torch.randn(2, 64)
    wanted = model["one"](x)
    assert set(plan(model, QuantoConfig())) == {"plain.weight"}
    assert torch.equal(model["one"](x), wanted)


def test_a_weight_of_a_plain_and_of_an_own_layer():
    """The plain layer is quantized, and the other one reads the values of what they share."""
    one, two = nn.Linear(64, 64, bias=False), Scaled(64, 64, bias=False)
    two.weight = one.weight
    x = torch.randn(3, 64)
    freeze(quantize(nn.Sequential(one, two), weights="int8"))
    assert one.weight is two.weight
    torch.testing.assert_close(two(x), x @ one.weight.dequantize().T * 2)
