"""Routers of experts are found by what their scores are used for, under any name and in any shape of block."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from requanto import QuantoConfig
from requanto.config import routers
from requanto.config.plan import plan

WIDTH, EXPERTS = 24, 4


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(EXPERTS, 16, WIDTH))

    def forward(self, x, index, weights):
        for one in (F.one_hot(index, EXPERTS).sum(0) > 0).nonzero():  # asks for values: ends every trial
            x = x + one
        return x


class Block(nn.Module):
    """What all blocks of experts below share; `scores` is what differs."""

    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x.reshape(-1, x.shape[-1])
        weights, index = self.scores(self.shared(x))
        return self.experts(x, index, weights)


class GateOfTheBlock(Block):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(WIDTH, EXPERTS, bias=False)

    def scores(self, x):
        return self.w(x).softmax(-1).topk(2)


class Top(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(WIDTH, EXPERTS), nn.LayerNorm(WIDTH)
        self.bias = nn.Parameter(torch.zeros(EXPERTS))

    @torch.no_grad()
    def chosen(self, scores):
        return torch.topk(scores + self.bias, 2, dim=-1, sorted=False)[1]

    def forward(self, x):
        scores = self.proj(self.norm(x)).sigmoid()
        index = self.chosen(scores)
        return scores.gather(1, index), index


class ClassOfItsOwn(Block):
    def __init__(self):
        super().__init__()
        self.scores = Top()


class OnlyLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x):
        return self.wg(x.float())


class ChosenByTheBlock(Block):
    def __init__(self):
        super().__init__()
        self.g = OnlyLogits()

    def scores(self, x):
        scores = self.g(x)
        index = scores.argmax(-1)
        return scores, index


class WeightReadByTheParent(Block):
    def __init__(self):
        super().__init__()
        self.c = nn.Linear(WIDTH, EXPERTS)

    def scores(self, x):
        return F.linear(x, self.c.weight.float()).softmax(-1).max(-1)


def pick(scores):
    return torch.sort(scores, dim=-1, descending=True)


class ByAFunction(Block):
    def __init__(self):
        super().__init__()
        self.s = nn.Linear(WIDTH, EXPERTS)

    def scores(self, x):
        values, index = pick(self.s(x))
        return values[:, :2], index[:, 0]


class SeveralLayers(Block):
    def __init__(self):
        super().__init__()
        self.r = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, EXPERTS))

    def scores(self, x):
        return self.r(x).topk(1)


class TwoKeys(Block):
    """Keys of a product space: half of the outputs for each of two choices."""

    def __init__(self):
        super().__init__()
        self.keys = nn.Linear(WIDTH, 2 * 6)

    def scores(self, x):
        values, index = self.keys(x).view(2, len(x), 6).topk(2)
        return values[0], index[0, :, 0] % EXPERTS


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return torch.topk(scores, 2)


class LayerItself(Block):
    def __init__(self):
        super().__init__()
        self.scores = Router(WIDTH, EXPERTS)


class Unnamed(nn.Module):
    """Nothing here is called an expert; there is one module for each output."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, 6)
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x):
        _, index = self.proj(x).topk(2)
        return sum(self.parts[i](x) for i in index.unique().tolist())


class ExpertsChoose(Block):
    """Each expert takes the tokens with the largest scores."""

    def __init__(self):
        super().__init__()
        self.affinity = nn.Linear(WIDTH, EXPERTS)

    def scores(self, x):
        return self.affinity(x).softmax(-1).t().topk(max(1, len(x) // 2), dim=-1)


class ManyArguments(Block):
    """A trial cannot know what to pass, so the layer with one output per expert stays float."""

    def __init__(self):
        super().__init__()
        self.z = nn.Linear(WIDTH, EXPERTS)

    def forward(self, batch, positions):
        scores = self.z(batch["x"])[positions["p"]]
        return self.experts(batch["x"], *scores.topk(2))


KINDS = {
    GateOfTheBlock: {"w"},
    ClassOfItsOwn: {"scores.proj"},
    ChosenByTheBlock: {"g.wg"},
    WeightReadByTheParent: {"c"},
    ByAFunction: {"s"},
    SeveralLayers: {"r.0", "r.2"},
    TwoKeys: {"keys"},
    LayerItself: {"scores"},
    Unnamed: {"proj"},
    ExpertsChoose: {"affinity"},
    ManyArguments: {"z"},
}


class Model(nn.Module):
    def __init__(self, block, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(WIDTH, WIDTH), "ffn": block()}) for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, EXPERTS)


def left_float(model, **options):
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return linear - {name.removesuffix(".weight") for name in plan(model, QuantoConfig(**options))}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("block", KINDS)
def test_exactly_the_routers_stay_float(block, meta):
    with torch.device("meta" if meta else "cpu"):
        model = Model(block)
    routers = {f"layers.{i}.ffn.{name}" for i in (0, 1) for name in KINDS[block]}
    assert left_float(model) == routers
    assert left_float(model, default_skips=False) == set()


@pytest.mark.parametrize("block", [GateOfTheBlock, ClassOfItsOwn, ManyArguments])
def test_a_full_name_quantizes_one_router(block):
    name = f"layers.1.ffn.{min(KINDS[block])}"
    assert left_float(Model(block), modules={name: "int8"}) == {name.replace("1", "0", 1)}


class Indexer(nn.Module):
    """Sparse attention: the choice is among tokens, not outputs, although the model has experts elsewhere."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.experts_seen = 0

    def forward(self, x):
        return (self.q(x) @ self.k(x).transpose(-1, -2)).topk(2)


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.labels = nn.Linear(WIDTH, 91)

    def forward(self, x):
        return self.labels(x).max(-1)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, WIDTH)
        self.input_gate = nn.Linear(WIDTH, 12)

    def forward(self, x):
        return F.silu(self.gate_proj(x)) * x.max()


class PlainNextToExperts(nn.Module):
    """A gate of features, of another size than the experts beside it."""

    def __init__(self):
        super().__init__()
        self.experts, self.input_gate = Experts(), nn.Linear(WIDTH, 12)


@pytest.mark.parametrize("block", [Indexer, Classes, Dense, PlainNextToExperts])
def test_no_other_layer_is_taken_for_a_router(block):
    assert left_float(Model(block)) == set()


def test_each_kind_of_block_is_tried_once_and_dense_models_never(monkeypatch):
    tried = []
    run = routers.choices_of
    monkeypatch.setattr(routers, "choices_of", lambda block, *rest: tried.append(type(block)) or run(block, *rest))
    left_float(Model(GateOfTheBlock, layers=20))
    assert tried == [GateOfTheBlock]
    left_float(Model(Dense, layers=20))
    assert len(tried) == 1


class Remembers(GateOfTheBlock):
    def __init__(self):
        super().__init__()
        self.counts = nn.Buffer(torch.zeros(EXPERTS))
        self.calls = 0

    def scores(self, x):
        self.logits = self.w(x)
        self.calls += 1
        self.counts += 1
        torch.rand(1, device="cpu")
        return self.logits.topk(2)


def test_a_trial_leaves_no_trace():
    model = Model(Remembers)
    before = torch.get_rng_state()
    assert len(left_float(model)) == 2
    assert torch.equal(torch.get_rng_state(), before)
    for layer in model.layers:
        assert not hasattr(layer["ffn"], "logits")
        assert layer["ffn"].calls == 0
        assert not layer["ffn"].counts.any()
    assert all(not p.is_meta for p in model.parameters())


def test_what_was_found_is_logged_once_for_each_kind(caplog):
    caplog.set_level(logging.INFO, logger="requanto")
    left_float(Model(ClassOfItsOwn))
    left_float(Model(ManyArguments))
    lines = [record.getMessage() for record in caplog.records if record.name == routers.__name__]
    assert lines == [
        "layers.0.ffn.scores (Top): its proj chooses experts and stays float",
        "layers.0.ffn (ManyArguments): not clear which layer chooses experts; those with one output per expert stay float",
    ]
