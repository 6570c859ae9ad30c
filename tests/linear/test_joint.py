"""`linear_many`, and layers of one input that are computed together: when they are, and when not."""

import copy
import gc
import io
import logging
import threading
import weakref

import pytest
import torch
from joint_layers import Attention, launches, quantized
from torch import nn

import requanto
from requanto.linear import joint, linear, linear_many
from requanto.linear.gpu.layout import EXEC
from requanto.nn.joined import JoinedLinear, JoinedSet


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def noted():
    with launches() as found, torch.no_grad():
        yield found


def joined(**how):
    model = Attention(**how)
    with torch.no_grad():
        assert requanto.join_layers(model, torch.randn(2, 128)) == [("q", "k", "v")]
    return model


def separate(model, x):
    return torch.cat([linear(x, one.weight, one.bias) for one in (model.q, model.k, model.v)], -1)


@pytest.mark.parametrize("how", [{}, {"kind": "int8"}, {"kind": "nf4"}, {"column_scale": "mean"}, {"bias": False}])
def test_linear_many(how, noted):
    layers = [quantized(n, **how) for n in (256, 33, 64)]
    weights, biases = [one.weight for one in layers], [one.bias for one in layers]
    for shape in ((1, 128), (2, 3, 128), (128,), (0, 128)):
        x = torch.randn(shape)
        outs = linear_many(x, weights, biases)
        for out, weight, bias in zip(outs, weights, biases):
            assert torch.equal(out, linear(x, weight, bias))
    assert noted == [(3, 1), (3, 6)]
    assert torch.equal(linear_many(x, weights)[1], linear(x, weights[1]))
    with pytest.raises(ValueError, match="3 weights and 1 biases"):
        linear_many(x, weights, [None])


def test_operators_plan_nothing_for_weights_of_which_some_are_packed(noted, monkeypatch):
    """As after `prepare`, which leaves small weights plain: a plan would be made anew in each call."""
    weights = [quantized(n).weight for n in (64, 32)]
    weights[0].pack(EXEC)
    x = torch.randn(2, 128)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linear_many(x, weights), backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(joint, "_plan_for", lambda *args: pytest.fail("a plan was made"))
    for out, weight in zip(compiled(x), weights):
        with torch.no_grad():
            want = linear(x, weight)  # packs the other one, and x is rounded to multiply it
        assert (out - want).norm() < 1e-2 * want.norm()


def test_some_have_a_column_scale(noted):
    layers = [quantized(64), quantized(33, column_scale="mean"), quantized(64)]
    x, weights = torch.randn(2, 128), [one.weight for one in layers]
    for out, weight in zip(linear_many(x, weights), weights):
        assert torch.equal(out, linear(x, weight))
    assert noted == [(3, 2)]


def test_weights_that_differ_run_one_by_one(noted):
    x = torch.randn(2, 128)
    first = quantized(64).weight
    for second in (
        quantized(64, kind="int8").weight, quantized(64, group_size=32).weight, quantized(64, symmetric=True).weight,
        quantized(64, rotation=True).weight, quantized(64, low_rank=2).weight,
        quantized(128, 64).weight.t(),
    ):  # fmt: skip
        assert joint.why_unlike([first, second]) is not None
        for out, weight in zip(linear_many(x, [first, second]), [first, second]):
            assert torch.equal(out, linear(x, weight))
    assert joint.why_unlike([first]) is not None
    assert joint.why_unlike([first] * 5) is not None
    assert joint.why_unlike([first, quantized(33).weight]) is None
    assert noted == []


def test_inputs_of_other_kinds(noted):
    model = joined()
    noted.clear()
    for x in (torch.randn(128), torch.nested.nested_tensor([torch.randn(2, 128), torch.randn(3, 128)])):
        for layer in (model.q, model.k):
            got, want = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert all(torch.equal(*pair) for pair in zip(got.unbind(), want.unbind()))
    for x in (torch.randn(2, 64), torch.ones(2, 128, dtype=torch.int32)):
        with pytest.raises(ValueError, match="linear: x"):
            model(x)
    assert noted == []


def test_a_gradient(noted):
    model = Attention()
    weights = [model.q.weight, model.k.weight]
    x = torch.randn(2, 128, requires_grad=True)
    with torch.enable_grad():
        sum(out.sum() for out in linear_many(x, weights)).backward()
        found, x.grad = x.grad, None
        sum(linear(x, weight).sum() for weight in weights).backward()
    assert torch.equal(found, x.grad)
    assert noted == []


def test_changed_weights_are_read(noted):
    model = Attention(column_scale="mean")
    other = Attention(column_scale="mean")
    weights, x = [model.q.weight, model.k.weight], torch.randn(1, 128)
    linear_many(x, weights)
    model.k.weight.data.copy_(other.k.weight)
    assert torch.equal(linear_many(x, weights)[1], linear(x, other.k.weight))
    model.q.weight.column.mul_(2)
    assert torch.equal(linear_many(x, weights)[0], linear(x, model.q.weight))
    assert len(noted) == 3


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("how", [{}, {"column_scale": "mean"}, {"bias": False}])
def test_one_launch_for_a_set(how, noted):
    model = joined(**how)
    noted.clear()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for shape in ((1, 128), (2, 3, 128)):
                x = torch.randn(shape)
                assert torch.equal(model(x), separate(model, x))
    assert noted == [(3, 1), (3, 6)] * 2
    assert model.q._joined._results == {}
    assert requanto.separate_layers(model) == ["q", "k", "v"]
    assert type(model.q) is nn.Linear
    assert "_joined" not in vars(model.q)
    model(x)
    assert len(noted) == 4


def test_each_condition_for_a_result(noted):
    model = joined()
    bias = model.k.bias

    def one_by_one(change, other=lambda x: x):
        x = torch.randn(2, 128)
        model.q(x)
        before = len(noted)
        change(x)
        x = other(x)
        assert torch.equal(model.k(x), linear(x, model.k.weight, model.k.bias))
        assert len(noted) == before
        model.q._joined._results.clear()

    one_by_one(lambda x: x.add_(1))
    one_by_one(lambda x: None, torch.clone)
    one_by_one(lambda x: None, lambda x: x.view(1, 2, 128))
    one_by_one(lambda x: bias.add_(1))
    one_by_one(lambda x: setattr(model.k, "bias", nn.Parameter(bias * 2, requires_grad=False)))
    one_by_one(lambda x: model.k.weight.data.copy_(quantized(64).weight))
    one_by_one(lambda x: setattr(model.k, "weight", quantized(64).weight))
    model.k.weight = nn.Parameter(quantized(64).weight, requires_grad=False)

    x = torch.randn(2, 128)
    model.q(x)
    with torch.enable_grad():
        x.requires_grad_()
        assert model.k(x).requires_grad
    x = torch.randn(2, 128)
    with torch.inference_mode():
        model.q(x)
    assert not model.k(x).is_inference()
    x = torch.randn(2, 128)
    model.q(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.k(x).dtype == torch.bfloat16
        before = len(noted)
        model(torch.randn(2, 128))
        assert len(noted) == before


def test_a_result_is_given_once(noted):
    model = joined()
    x = torch.randn(2, 128)
    model.q(x)
    one, two = model.k(x), model.k(x)
    one.zero_()
    assert torch.equal(two, linear(x, model.k.weight, model.k.bias))


def test_results_end_with_the_input(noted):
    model = joined()
    x = torch.randn(2, 128)
    model.q(x)
    kept = [weakref.ref(out) for out in next(iter(model.q._joined._results.values())).outs.values()]
    assert len(kept) == 2
    gc.disable()
    try:
        del x
        assert [out() for out in kept] == [None, None]
        assert model.q._joined._results == {}
    finally:
        gc.enable()


def test_results_that_nobody_takes_end_the_set(noted, caplog):
    model = joined()
    with caplog.at_level(logging.INFO):
        for _ in range(6):
            x = torch.randn(2, 128)
            model.q(x), model.k(x)
    assert len(noted) == 3
    assert "1 results were not asked for" in caplog.text
    assert torch.equal(model(x), separate(model, x))


def test_a_replaced_layer_ends_the_set(noted, caplog):
    model, x = joined(), torch.randn(2, 128)
    old = weakref.ref(model.k)
    model.k = quantized(64)
    assert old() is None
    with caplog.at_level(logging.INFO):
        assert torch.equal(model(x), separate(model, x))
    assert noted == []
    assert "a layer was replaced" in caplog.text


def test_copies_and_pickles_are_joined_by_themselves(noted):
    model, x = joined(), torch.randn(2, 128)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    model.q(x)  # results that wait are not copied
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        noted.clear()
        assert other.q._joined is other.v._joined is not model.q._joined
        assert other.q._joined._results == {}
        assert torch.equal(other(x), want)
        with torch.inference_mode():
            assert torch.equal(other(x.clone()), want)
        assert noted == [(3, 2)] * 2
    noted.clear()
    one = copy.deepcopy(model.q)  # a single layer
    shallow = copy.copy(model.q)
    shallow._parameters = dict(shallow._parameters)  # as replicas of nn.DataParallel have them
    shallow.weight = nn.Parameter(quantized(256).weight, requires_grad=False)
    assert torch.equal(one(x), linear(x, model.q.weight, model.q.bias))
    assert torch.equal(shallow(x), linear(x, shallow.weight, model.q.bias))
    assert noted == []
    assert torch.equal(model(torch.randn(2, 128)).isnan(), want.isnan())
    assert noted == [(3, 2)]


def test_several_threads(noted):
    model = joined()
    xs = [torch.randn(4, 128) for _ in range(4)]
    shared = torch.randn(4, 128)
    want, of_shared = [separate(model, x) for x in xs], separate(model, shared)
    failures = []

    def run(x, expected):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(x), expected) or not torch.equal(model(shared), of_shared):
                    failures.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(xs, want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.q._joined._results == {}


def test_hooks_on_layers(noted):
    model, x = joined(), torch.randn(2, 128)
    noted.clear()
    seen = []
    model.k.register_forward_hook(lambda module, args, out: seen.append(out) or out * 2)
    model.q.register_forward_hook(lambda module, args, out: out.zero_())
    got = model(x)
    assert noted == [(3, 2)]
    assert torch.equal(got[:, 256:320], 2 * linear(x, model.k.weight, model.k.bias))
    assert torch.equal(got[:, 320:], linear(x, model.v.weight, model.v.bias))
    assert not got[:, :256].any()
    changes = model.q.register_forward_hook(lambda module, args, out: out if args[0].mul_(2) is None else None)
    for mode in (torch.no_grad, torch.inference_mode):  # an inference tensor does not tell that it was changed
        with mode():
            x = torch.randn(2, 128)
            assert torch.equal(model(x)[:, 320:], linear(x, model.v.weight, model.v.bias))
    changes.remove()


def test_state_and_moves(noted):
    model, plain = joined(), Attention()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 128)
    assert torch.equal(model(x), plain(x))
    model.load_state_dict(Attention().state_dict())
    assert torch.equal(model(x), separate(model, x))
    model.to(torch.bfloat16)
    x = x.bfloat16()
    assert torch.equal(model(x), separate(model, x))


# ---------------------------------------------------------------------- which layers


class Crossed(nn.Module):
    """Keys and values read another tensor than queries, or the same."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (quantized(64) for _ in range(3))

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.q(x) + self.k(context) + self.v(context)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross = Crossed()

    def forward(self, x):
        return self.cross(x) + self.cross(x, x * 2)


class Changed(Attention):
    def forward(self, x):
        q = self.q(x)
        x += 1
        return torch.cat([q, self.k(x), self.v(x)], -1)


def test_only_layers_that_always_read_one_tensor(caplog):
    x = torch.randn(2, 128)
    with caplog.at_level(logging.INFO), torch.no_grad():
        assert requanto.join_layers(Crossed(), x) == [("q", "k", "v")]
        assert requanto.join_layers(Crossed(), x, context=x * 2) == [("k", "v")]
        assert requanto.join_layers(Twice(), x) == []
        assert "not in every call" in caplog.text
        assert requanto.join_layers(Changed(), x) == [("k", "v")]


def test_only_like_layers(caplog):
    model, x = Attention(), torch.randn(2, 128)
    model.k = quantized(64, kind="int8")
    with caplog.at_level(logging.INFO):
        assert requanto.join_layers(model, x) == [("q", "v")]
    assert "1 of them run alone: weights differ" in caplog.text
    model.q = quantized(256)
    model.q.forward = lambda x: x
    model.k = nn.Linear(128, 64)
    with caplog.at_level(logging.INFO):
        assert requanto.join_layers(model, x) == []
    assert "q is not joined with other layers: its forward was replaced" in caplog.text
    with pytest.raises(ValueError, match="pass arguments of its forward"):
        requanto.join_layers(model)


def test_layers_of_the_class_qlinear(noted):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (requanto.QLinear(128, n, weights="int4") for n in (256, 128))

        def forward(self, x):
            return self.a(x), self.b(x)

    both, x = Both(), torch.randn(2, 128)
    assert requanto.join_layers(both, x) == []  # rounded in each forward
    requanto.freeze(both)
    want = both(x)
    assert requanto.join_layers(both, x) == [("a", "b")]
    noted.clear()
    assert all(torch.equal(*pair) for pair in zip(both(x), want))
    with torch.inference_mode():
        both(torch.randn(2, 128))
    assert noted == [(2, 2)] * 2
    requanto.separate_layers(both)
    assert type(both.a) is requanto.QLinear


def test_sets_have_a_limit():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(quantized(64) for _ in range(6))

        def forward(self, x):
            return [layer(x) for layer in self.layers]

    model = Wide()
    assert [len(one) for one in requanto.join_layers(model, torch.randn(2, 128))] == [4, 2]
    assert requanto.join_layers(model, torch.randn(2, 128))[1] == ("layers.4", "layers.5")  # anew
    assert all(isinstance(layer, JoinedLinear) for layer in model.layers)
    assert isinstance(model.layers[0]._joined, JoinedSet)


def test_on_a_cpu_nothing_is_together():
    model, x = joined(), torch.randn(2, 128)
    with torch.no_grad():
        assert torch.equal(model(x), separate(model, x))
    assert model.q._joined._results == {}
