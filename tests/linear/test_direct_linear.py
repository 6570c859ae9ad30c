"""Quantized layers that call the cached plan themselves: the same bits as F.linear, which runs where none fits."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import requanto
from requanto import QTensor
from requanto.dtypes.qtypes import qint8
from requanto.integrations.conversion import dequantize_
from requanto.linear import registry
from requanto.linear.cpu import library
from requanto.nn.direct_linear import DirectLinear, use_direct_linear, use_plain_linear
from requanto.runtime.buffers import scratch_memory


@pytest.fixture(autouse=True)
def needs_library(monkeypatch, cpu_level):
    monkeypatch.setattr(requanto.settings, "compiled", None)
    if library.find() is None:
        pytest.skip("the library of CPU kernels cannot be used here")


@pytest.fixture
def calls(monkeypatch):
    """The results of `quick_gemm`."""
    found = []

    def noted(x, weight):
        found.append(registry.quick_gemm(x, weight))
        return found[-1]

    monkeypatch.setattr("requanto.nn.direct_linear.quick_gemm", noted)
    return found


def layer_of(kind="int4", n=96, k=256, dtype=torch.bfloat16, **options):
    layer = nn.Linear(k, n, bias=False, dtype=dtype)
    weight = QTensor.quantize(torch.randn(n, k).to(dtype), kind, **options)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(layer)
    assert use_direct_linear(model) == ["0"]
    assert use_direct_linear(model) == []
    return layer


def plainly(x, layer):
    """By a copy of the weight, which has no plan yet."""
    return F.linear(x, copy.deepcopy(layer.weight), layer.bias)


@pytest.mark.parametrize("kind", ["int4", "int8", "float8", "nf4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("column", [False, "mean"])
def test_the_same_bits(kind, dtype, column, calls):
    layer = layer_of(kind, 100, 160, dtype, column_scale=column)
    for shape in ((1, 1, 160), (3, 160), (2, 2, 160), (1, 1, 160), (9, 160)):
        for _ in range(3):
            x = torch.randn(shape, dtype=dtype)
            assert torch.equal(layer(x), plainly(x, layer))
            with torch.inference_mode():
                assert torch.equal(layer(x), plainly(x, layer))
    if kind != "float8":  # whose scratch buffer depends on the number of threads
        assert any(out is not None for out in calls)


def test_where_f_linear_runs(calls):
    layer, x = layer_of(dtype=torch.float32), torch.randn(1, 256)
    layer(x)
    assert layer(x) is calls[-1]
    grown = x.clone().requires_grad_()
    layer(grown).sum().backward()
    assert torch.allclose(grown.grad[0], layer.weight.dequantize().sum(0), atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert torch.allclose(torch.func.vmap(layer)(x.expand(3, 1, 256)), layer(x).expand(3, 1, 96), atol=1)
    with torch.device("meta"):
        assert not layer(x).is_meta
    with pytest.raises(ValueError, match="x is on meta"):
        layer(x.to("meta"))
    with torch.no_grad():
        assert layer(grown) is calls[-1]
    wide = torch.randn(1, 512)[:, ::2]
    assert torch.equal(layer(wide), layer(wide.contiguous()))
    turned = torch._neg_view(x)
    assert torch.equal(layer(turned), layer(-x))
    with pytest.raises(ValueError, match="last axis"):
        layer(torch.randn(1, 255))
    with pytest.raises(ValueError, match="float tensor"):
        layer(torch.ones(1, 256, dtype=torch.int64))
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x).isfinite(), torch.ones(1, 96, dtype=torch.bool))


def test_a_mode_of_functions_sees_the_call():
    class Seen(TorchFunctionMode):
        names: list = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    layer(x)
    with Seen():
        layer(x)
    assert "linear" in Seen.names


@pytest.mark.parametrize(("place", "name"), [(F, "linear"), (nn.Linear, "forward")])
def test_a_function_in_the_place_of_torchs_sees_the_call(place, name, monkeypatch):
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    layer(x)
    out, theirs, seen = layer(x), getattr(place, name), []
    monkeypatch.setattr(place, name, lambda *args: (seen.append(args), theirs(*args))[1])
    assert torch.equal(layer(x), out)
    assert len(seen) == 1


def test_it_looks_like_nn_linear_and_becomes_one_again():
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    assert repr(layer) == "Linear(in_features=256, out_features=96, bias=False)"
    layer(x)
    out = layer(x)
    assert torch.equal(torch.jit.script(layer)(x), out)
    layer._old_forward, layer.forward = layer.forward, lambda x: layer._old_forward(x)  # as Accelerate's hooks do
    for cls, use in ((nn.Linear, use_plain_linear), (DirectLinear, lambda layer: use_direct_linear(layer))):
        use(layer)
        assert type(layer) is cls
        assert layer._old_forward.__func__ is cls.forward
        assert torch.equal(layer(x), out)
    dequantize_(layer)
    assert type(layer) is nn.Linear
    assert torch.allclose(layer(x), out, atol=0.5)


def test_bias_and_a_replaced_weight():
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    alone = layer(x)
    layer.bias = nn.Parameter(torch.ones(96, dtype=torch.bfloat16), requires_grad=False)
    assert torch.equal(layer(x), plainly(x, layer))
    layer.bias = None
    assert torch.equal(layer(x), alone)
    layer.weight = nn.Parameter(torch.zeros(96, 256, dtype=torch.bfloat16))
    assert not layer(x).any()


def test_changes_of_the_weight_take_effect(calls):
    layer, x = layer_of(column_scale="mean"), torch.randn(1, 256, dtype=torch.bfloat16)
    for _ in range(2):
        layer(x)
    assert calls[-1] is not None
    with torch.no_grad():
        layer.weight.copy_(torch.randn(96, 256))
    for _ in range(2):
        assert torch.equal(layer(x), plainly(x, layer))
    before = layer(x)
    layer.weight.column.mul_(2)  # x times the column scale, in place
    assert torch.equal(layer(x), 2 * before)
    layer.weight.unpack()
    assert torch.equal(layer(x), plainly(x, layer))
    layer.weight.activation = qint8
    assert torch.equal(layer(x), plainly(x, layer))
    assert not torch.equal(layer(x), 2 * before)
    layer.weight.activation = None
    assert torch.equal(layer(x), 2 * before)


@pytest.mark.parametrize("change", ["activations", "setting"])
def test_another_thread_changes_something_while_a_plan_is_looked_up(change, monkeypatch):
    layer, x = layer_of(dtype=torch.float32), torch.randn(1, 256)
    found, theirs = layer(x), registry.find_plan
    layer(x[None])  # so that the plan for x is looked up
    layer.weight._storage.misses = registry.MISSES - 1  # and would be kept

    def changed_meanwhile(x, weight, bias):
        plan = theirs(x, weight, bias)
        if change == "setting":
            monkeypatch.setattr(requanto.settings, "cpu_arithmetic", "float")
        else:
            weight.activation = qint8
        return plan

    with monkeypatch.context() as patches:
        patches.setattr(registry, "find_plan", changed_meanwhile)
        layer(x)
    assert torch.equal(layer(x), plainly(x, layer))
    assert not torch.equal(layer(x), found)


def test_an_alias_with_another_shape_does_not_take_the_plan():
    layer, x = layer_of(n=256), torch.randn(1, 256, dtype=torch.bfloat16)
    for _ in range(2):
        layer(x)
    exact = x.float() @ layer.weight.dequantize().float()
    turned, part = (DirectLinear(256, n, bias=False) for n in (256, 64))
    turned.weight = nn.Parameter(layer.weight.t(), requires_grad=False)
    part.weight = nn.Parameter(layer.weight[:64], requires_grad=False)
    for _ in range(3):
        assert torch.allclose(turned(x).float(), exact, atol=0.5)
        assert torch.allclose(part(x).float(), layer(x)[:, :64].float(), atol=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.zeros(256, 256))
    assert not part(x).any()


def test_a_plan_of_x_times_the_weight_is_not_taken_for_its_transpose():
    layer, x = layer_of(n=256, dtype=torch.float32), torch.randn(1, 256)
    turned = DirectLinear(256, 256, bias=False)
    turned.weight = nn.Parameter(layer.weight.t(), requires_grad=False)
    for _ in range(2):
        product = x @ turned.weight
    assert torch.allclose(turned(x), x @ turned.weight.dequantize().T, atol=0.5)
    assert torch.equal(layer(x), product)


def test_a_scratch_buffer_larger_than_the_workspace_lives_during_the_call(monkeypatch):
    monkeypatch.setattr(requanto.settings, "workspace_bytes", 0)
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    layer(x)
    quick, buffers, calls = layer.weight._storage.quick, [], []

    def buffer(nbytes, slot):
        found = scratch_memory(nbytes, slot)
        buffers.append(weakref.ref(found))
        return found

    def function(*addresses):
        assert buffers[-1]() is not None
        calls.append(addresses)
        return quick.function(*addresses)

    monkeypatch.setattr(registry, "scratch_memory", buffer)
    layer.weight._storage.quick = quick._replace(function=function)
    assert torch.equal(layer(x), plainly(x, layer))
    assert len(calls) == 1


def test_shapes_in_turn(calls):
    layer = layer_of()
    inputs = [torch.randn(1, rows, 256, dtype=torch.bfloat16) for rows in (1, 300, 2, 1, 1, 700, 2, 2, 1)]
    for x in inputs:
        for _ in range(registry.MISSES):
            layer(x)
        calls.clear()
        assert torch.equal(layer(x), plainly(x, layer))
        assert calls[-1] is not None
        assert (layer.weight._storage.quick.shape == x.shape) == (x.shape[1] < 4)


def test_two_shapes_that_take_turns_do_not_make_a_quick_plan_each_time(monkeypatch):
    layer, noted, theirs = layer_of(), [], registry.note_quick
    inputs = [torch.randn(1, rows, 256, dtype=torch.bfloat16) for rows in (1, 5)]
    for x in inputs:
        layer(x)
    monkeypatch.setattr(registry, "note_quick", lambda *args: (noted.append(args), theirs(*args))[1])
    for _ in range(16):
        for x in inputs:
            assert torch.equal(layer(x), plainly(x, layer))
    assert 0 < sum(args[2] is layer.weight for args in noted) <= 16, "of 32 calls"


def test_settings_and_levels_take_effect(monkeypatch):
    layer, x = layer_of(dtype=torch.float32), torch.randn(1, 256)
    for _ in range(2):
        rounded = layer(x)
    monkeypatch.setattr(requanto.settings, "cpu_arithmetic", "float")
    exact = layer(x)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(exact, x @ layer.weight.dequantize().T, atol=1e-3)


def test_hooks_copies_and_files():
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    layer(x)
    out, seen = layer(x), []
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen.append("before")),
        layer.register_forward_hook(lambda m, args, out: seen.append("after")),
    ]
    assert torch.equal(layer(x), out)
    assert seen == ["before", "after"]
    for handle in handles:
        handle.remove()
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(same) is DirectLinear
        assert list(same.state_dict()) == list(layer.state_dict())
        for _ in range(2):
            assert torch.equal(same(x), out)
        with torch.no_grad():
            same.weight.copy_(torch.zeros(96, 256))
        assert not same(x).any()
    assert torch.equal(layer(x), out)


def test_compiled_it_is_one_operator():
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    for _ in range(2):
        out = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), out)


def test_eight_threads_in_one_layer():
    layer = layer_of(n=512)
    inputs = [torch.randn(1, 1, 256, dtype=torch.bfloat16) for _ in range(8)]
    expected = [plainly(x, layer) for x in inputs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not torch.equal(layer(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layers_of_a_set_are_left_and_entered():
    layer, x = layer_of(), torch.randn(1, 256, dtype=torch.bfloat16)
    model = nn.ModuleList([layer, copy.deepcopy(layer)])
    model.forward = lambda x: [one(x) for one in model]
    expected = layer(x)
    assert requanto.join_layers(model, x) == [("0", "1")]
    assert all(torch.equal(one(x), expected) for one in model)
    assert requanto.separate_layers(model) == ["0", "1"]
    assert all(type(one) is DirectLinear for one in model)
    assert all(torch.equal(one(x), expected) for one in model)
