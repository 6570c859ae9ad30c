"""weights="auto": the bytes that are really taken, what counts, what is refused, and what a config keeps."""

import copy

import pytest
import torch
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.budget.candidates import FLOAT, candidates_for
from requanto.budget.models import resolve
from requanto.budget.sensitivity import importances
from requanto.config.limit import Limit, parse_bytes
from requanto.config.plan import plan


class Net(nn.Module):
    """Three layers, of which the second is all but ignored by the third."""

    def __init__(self, ignored=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(128, 64), nn.Linear(128, 64)
        self.last = nn.Linear(64, 32)
        self.ignored = ignored

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) + self.ignored * torch.tanh(self.second(x)))


def held(model):
    return sum(p.nbytes if isinstance(p, QTensor) else p.numel() * p.element_size() for p in model.parameters())


def auto(model, **budget):
    requanto.quantize(model, weights="auto", progress=False, **budget)
    requanto.freeze(model)
    return model


@pytest.mark.parametrize("bits", [3.0, 4.0, 4.5, 6.0, 9.0, 20.0])
def test_bits_count_everything_and_are_kept(bits):
    model = auto(Net(), bits=bits)
    weights = [m.weight for m in model.children()]
    taken = sum(w.nbytes if isinstance(w, QTensor) else w.numel() * w.element_size() for w in weights)
    assert taken <= bits * sum(w.numel() for w in weights) / 8
    record = requanto.budget.budget_of(model)
    assert record["bytes"] == taken
    assert record["gap"] == 0
    assert model(torch.randn(2, 128)).isfinite().all()


def test_a_budget_with_column_scales_counts_them():
    model = auto(Net(), bits=5.0, column_scale="root")
    weights = [m.weight for m in model.children()]
    assert all(w.column is not None for w in weights if isinstance(w, QTensor))
    taken = sum(w.nbytes if isinstance(w, QTensor) else w.numel() * w.element_size() for w in weights)
    assert requanto.budget.budget_of(model)["bytes"] == taken <= 5 * sum(w.numel() for w in weights) / 8


def test_max_memory_counts_the_whole_model():
    for size in (9_000, 12_000, 20_000, 30_000):
        model = auto(Net(), max_memory=size)
        assert held(model) <= size
    assert held(auto(Net(), max_memory=20_000)) > held(auto(Net(), max_memory=12_000))


def test_more_bytes_are_never_worse():
    x, exact = torch.randn(64, 128), None
    costs = []
    for bits in (3, 4, 5, 6, 8):
        model = Net()
        exact = model(x)
        costs.append(((auto(model, bits=bits)(x) - exact).norm() / exact.norm()).item())
    assert costs == sorted(costs, reverse=True)


def test_samples_show_what_a_layer_does_to_the_answer():
    samples = [torch.randn(16, 128) for _ in range(4)]
    model = Net(ignored=1e-3)
    planned = plan(model, QuantoConfig(weights="auto", bits=4))
    found = importances(model, planned, samples, progress=False)
    assert found["first.weight"].rows.sum() > 1e4 * found["second.weight"].rows.sum()
    assert not any(p.grad is not None or not p.requires_grad for p in model.parameters())
    blind = resolve(model, QuantoConfig(weights="auto", bits=4), planned, progress=False)
    seeing = resolve(model, QuantoConfig(weights="auto", bits=4), planned, importance=found, progress=False)
    size = lambda chosen, module: chosen.tables[module][chosen.labels[module]][0]  # noqa: E731
    assert size(seeing, "second") < size(blind, "second")
    assert size(seeing, "first") > size(seeing, "second")
    assert seeing.measured == "samples"


def test_the_expected_change_is_what_happens():
    """On a linear model the prediction is exact in the mean: compare it with the change of the output that is measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80, bias=False), nn.Linear(80, 40, bias=False))
    samples = [torch.randn(64, 96) for _ in range(8)]
    planned = plan(model, QuantoConfig(weights="auto", bits=4))
    found = importances(model, planned, samples, progress=False)
    for name in planned:
        chosen = resolve(
            model,
            QuantoConfig(weights="auto", bits=9, candidates=["int4:16"]),
            planned,
            importance=found,
            progress=False,
        )
        predicted = chosen.tables[name.rpartition(".")[0]]["int4 g16"][1]
        other = copy.deepcopy(model)
        form = next(c for c in candidates_for(planned[name], model.get_parameter(name), ["int4:16"]))
        other.get_parameter(name).data = form.planned.quantize(model.get_parameter(name), name).dequantize()
        x = torch.cat(samples)
        changed = ((other(x) - model(x)).square().sum() / model(x).square().sum()).item()
        # The expectation over random directions is half of the relative squared change.
        assert predicted == pytest.approx(changed / 2, rel=0.25)


def test_convolutions_are_weighed_by_their_own_gradients():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    planned = plan(model, QuantoConfig(weights="auto", bits=5, convolutions=True))
    found = importances(model, planned, [torch.randn(2, 3, 12, 12)], progress=False)
    assert found["0.weight"].weights.shape == (16, 27)
    config = QuantoConfig(weights="auto", bits=8.5, convolutions=True)
    chosen = resolve(model, config, planned, importance=found, progress=False)
    assert chosen.measured == "samples"
    assert chosen.bits <= 8.5
    assert set(chosen.labels) == {"0", "2"}


def test_given_types_stay_and_count():
    model = Net()
    requanto.quantize(model, weights="auto", bits=5, modules={"last": "int8"}, progress=False)
    requanto.freeze(model)
    assert model.last.weight.qtype.name == "qint8"
    weights = [m.weight for m in model.children()]
    assert sum(w.nbytes for w in weights) <= 5 * sum(w.numel() for w in weights) / 8
    config = QuantoConfig(weights="auto", bits=5, modules={"last": "int8"})
    chosen = resolve(Net(), config, plan(Net(), config), progress=False)
    assert set(chosen.labels) == {"first", "second"}
    assert config.modules["last"] == "int8"


def test_candidates_restrict_the_choice():
    model = auto(Net(), bits=6, candidates=["int4:32", "int8"])
    assert {m.weight.qtype.name for m in model.children()} <= {"qint4", "qint8"}


@pytest.mark.parametrize(("dtype", "item"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_candidates_take_the_bytes_that_their_tensors_take(dtype, item):
    weight = torch.randn(48, 576).to(dtype)
    planned = plan(nn.Sequential(nn.Linear(576, 48)), QuantoConfig(weights="auto", bits=4))["0.weight"]
    found = candidates_for(planned, weight, ("int2:16", "int3:128", "int4:row", "int5:64", "int8", "float8", "nf4:64"))
    assert found[-1].label == FLOAT
    assert found[-1].bytes == weight.numel() * item
    for candidate in found[:-1]:
        assert candidate.planned.quantize(weight, "w").nbytes == candidate.bytes
    assert [c.label for c in found[:2]] == ["int2 g16", "int3 g64"]  # 128 does not divide 576


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits": 1.0}, r"bits=1 is too small: the smallest types of the 3 layers \(int2, int2 g64\) need bits=(3)\. "),
        (
            {"max_memory": "5kB"},
            r"max_memory=5000 is too small.*need max_memory=(\d+) .*640 bytes of it are not quantized",
        ),
        ({"bits": 33}, r"bits=33 is more than the float model takes: with bits=(32) every weight stays float"),
        ({"max_memory": 10**9}, r"more than the float model takes: with max_memory=(\d+) "),
        ({}, "exactly one budget, bits= or max_memory=: found bits=None and max_memory=None"),
        ({"bits": 4, "max_memory": "1MB"}, "exactly one budget"),
        ({"bits": -1}, "positive number of bits"),
        ({"bits": True}, "positive number of bits"),
        ({"max_memory": "much"}, "such as '80MB'"),
        ({"bits": 4, "candidates": ["int9"]}, "unknown quantized type 'int9'"),
        ({"bits": 4, "candidates": ["int4:many"]}, "TYPE:GROUP"),
    ],
)
def test_refusals_name_the_nearest_possible_budget(budget, message):
    with pytest.raises(ValueError, match=message) as caught:
        requanto.quantize(Net(), weights="auto", progress=False, **budget)
    found = __import__("re").search(message, str(caught.value))
    if found.groups():
        key = next(iter(budget))
        possible = float(found[1]) if key == "bits" else int(found[1])
        requanto.quantize(Net(), weights="auto", progress=False, **{key: possible})


def test_a_budget_without_auto_is_refused():
    for call in (QuantoConfig, lambda **k: requanto.quantize(Net(), **k)):
        with pytest.raises(ValueError, match="belong to weights='auto'"):
            call(weights="int8", bits=4)
    with pytest.raises(ValueError, match="exactly one budget"):
        QuantoConfig(weights="auto")


def test_configs_round_trip_before_and_after():
    config = QuantoConfig(weights="auto", bits=5.5, candidates=["int4", "int8"])
    assert QuantoConfig.from_dict(config.to_dict()) == config
    net = Net()
    chosen = resolve(net, config, plan(net, config), progress=False)
    assert config.weights != "auto"
    assert config.bits is None
    assert config.budget["asked"] == {"bits": 5.5}
    again = QuantoConfig.from_dict(config.to_dict())
    assert again == config
    assert {n: repr(p.options) for n, p in plan(net, again).items()} == {
        n: repr(p.options) for n, p in chosen.planned.items()
    }


def test_sizes_in_words():
    assert parse_bytes("80MB") == 80_000_000
    assert parse_bytes("1.5 GiB") == 1_610_612_736
    assert parse_bytes(7) == 7
    assert str(Limit.of(4.5, None)) == "bits=4.5"
