"""Several weights in one launch, on a GPU that only the driver pretends: launches, allocations, host time, captures."""

import gc
import sys
import weakref

import pytest
import torch
from fake_driver import fake_gpu_layers, watch
from torch import nn

pytest.importorskip("triton")

from requanto import QTensor, join_layers
from requanto.linear import linear_many
from requanto.linear.gpu import layout, plans


@pytest.fixture
def gpu():
    with fake_gpu_layers() as found, torch.no_grad():
        yield found


class Attention(nn.Module):
    """Queries, keys and values of Llama-3-8B's proportions."""

    def __init__(self, kind="int4", **how):
        super().__init__()
        torch.manual_seed(0)
        for name, rows in (("q", 1024), ("k", 256), ("v", 256)):
            layer = nn.Linear(1024, rows, dtype=torch.bfloat16)
            weight = QTensor.quantize(layer.weight.detach(), kind, search="minmax", **how)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, layer.requires_grad_(False))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def x_of(rows=1):
    return torch.randn(1, rows, 1024, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"symmetric": True, "group_size": 128},
        {"kind": "int8", "group_size": 64},
        {"kind": "float8"},
        {"kind": "nf4"},
        {"kind": "int3"},
    ],
)
def test_one_launch_and_no_more_memory(gpu, how):
    model = Attention(**how)
    assert join_layers(model, x_of()) == [("q", "k", "v")]
    model(x_of())
    layouts = {one.weight.layout_name for one in (model.q, model.k, model.v)}
    assert len(layouts) == 1  # keys and values are too small to be packed by themselves
    for rows in (1, 16):
        x = x_of(rows)
        model(x)
        found = watch(gpu, lambda x=x: model(x))
        assert found.launches == ["wq_gemm_many_kernel"]
        assert len(found.allocations) in (3, 5)  # the results; parts and counters of a split sum
        assert not found.reads
        assert [out.shape for out in model(x)] == [(1, rows, 1024), (1, rows, 256), (1, rows, 256)]
        assert len({out.untyped_storage().data_ptr() for out in model(x)}) == 3
    x = x_of(17)  # more rows: one by one
    model(x)
    assert "wq_gemm_many_kernel" not in watch(gpu, lambda: model(x)).launches


def test_column_scales_take_one_launch_for_all(gpu):
    model = Attention(column_scale="mean")
    join_layers(model, x_of())
    x = x_of()
    model(x)
    found = watch(gpu, lambda: model(x))
    assert found.launches == ["wq_gemm_many_kernel"]
    assert found.operators.count("mul") == 1
    given = gpu.launches[-1].args[0]
    assert given.shape == (3, 1, 1, 1024)
    assert torch.equal(given[1], x * model.k.weight.column)


def test_a_capture_pins_codes_and_reads_the_weight_itself(gpu, monkeypatch):
    model = Attention(column_scale="mean")
    join_layers(model, x_of())
    x = x_of()
    model(x)
    for module in (layout, plans):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    found = watch(gpu, lambda: model(x))
    assert found.launches == ["wq_gemm_many_kernel"]
    assert found.operators.count("mul") == 3  # no copy of the column scales, which may change after the capture
    assert all(layout.is_pinned(layer.weight._qdata) for layer in (model.q, model.k, model.v))
    assert not found.reads


@pytest.mark.parametrize("whole_layer", [False, True])
def test_former_weights_are_freed(gpu, whole_layer):
    model, other = Attention(), Attention()
    join_layers(model, x_of())
    for rows in (1, 2, 3):
        model(x_of(rows))
    codes = weakref.ref(model.k.weight._storage.parts["qdata"])
    if whole_layer:
        model.k = other.k
    else:
        model.k.weight = other.k.weight
    model(x_of())
    gpu.launches.clear()
    assert codes() is None
    model(x_of())
    assert ("wq_gemm_many_kernel" in gpu.names()) != whole_layer


@pytest.mark.parametrize("column_scale", [None, "mean"])
def test_host_time(gpu, column_scale):
    """Function calls of queries, keys and values, one by one and together: a time would depend on the machine's load."""

    def cost(call):
        for _ in range(4):  # the first ones compile and make plans
            call()
        count = 0

        def entered(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        gc.disable()  # finalizers
        sys.setprofile(entered)
        try:
            call()
        finally:
            sys.setprofile(None)
            gc.enable()
        return count

    model, x = Attention(column_scale=column_scale), x_of()
    weights, biases = ([getattr(one, name) for one in (model.q, model.k, model.v)] for name in ("weight", "bias"))
    one_by_one = cost(lambda: model(x))
    together = cost(lambda: linear_many(x, weights, biases))
    join_layers(model, x)
    joined = cost(lambda: model(x))
    print(f"\n{one_by_one} calls one by one, {joined} joined, {together} by linear_many")
    assert together < one_by_one
    assert joined < 1.2 * one_by_one
    assert joined < 2 * one_by_one
