"""Cached plans of GEMMs on a CPU: used where they hold, dropped where they do not."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from requanto import QTensor, prepare, qint8
from requanto.linear import api, grouped_linear, linear, registry
from requanto.linear.cpu import library
from requanto.runtime import buffers
from requanto.runtime.settings import registry_state, settings

#: Weight, activations, rows of x: one for each implementation that makes plans.
KINDS = [
    ("int8", None, 1),
    ("int8", None, 40),
    ("int8", qint8, 1),
    ("int8", qint8, 3),
    ("int8", qint8, 40),
    ("int4", None, 1),
    ("int4", None, 40),
    ("int4", qint8, 2),
    ("int3", None, 40),
    ("nf4", None, 1),
    ("float8", None, 1),
    ("float8", None, 2),
    ("float8", None, 40),
]


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def way(request, monkeypatch):
    """With the library, or where there is none."""
    if request.param == "kernels" and library.find() is None:
        pytest.skip("the CPU kernels are not available here")
    monkeypatch.setattr(settings, "compiled", request.param == "kernels")
    return request.param


def layer(kind, activation=None, out_features=384, in_features=192, bias=True):
    module = torch.nn.Linear(in_features, out_features, bias=bias).bfloat16()
    weight = QTensor.quantize(torch.randn(out_features, in_features).bfloat16(), kind)
    weight.activation = activation
    module.weight = torch.nn.Parameter(weight, False)
    if bias:
        module.bias.requires_grad_(False)
    module.wide = weight.dequantize(torch.float32).double()
    prepare(module, smallest=0)
    return module


def expected(module, x):
    """From the codes, in float64; x as int8 where the layer takes it so."""
    wide = x.double()
    if module.weight.activation is not None:
        step = wide.abs().amax(-1, keepdim=True) / 127
        wide = (wide / step).round() * step
    out = wide @ module.wide.t()
    return out if module.bias is None else out + module.bias.double()


def near(got, want, limit=1e-2):
    return bool((got.double() - want).norm() <= limit * want.norm())


def planned_only(monkeypatch):
    """From here on a product that was not made ready is an error."""

    def missed(*_):
        raise AssertionError("the product was not the one made ready")

    monkeypatch.setattr(api, "_checked", missed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "activation", "rows"), KINDS)
def test_the_second_product_is_a_cached_plan(kind, activation, rows, bias, monkeypatch):
    module = layer(kind, activation, bias=bias)
    shape = (rows, 192) if rows % 2 else (2, rows // 2, 192)
    first, second = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    want = [expected(module, x) for x in (first, second)]
    with torch.inference_mode():
        assert near(module(first), want[0])
        planned_only(monkeypatch)
        again, got = module(first), module(second)
    assert got.shape == (*shape[:-1], 384)
    assert got.dtype == torch.bfloat16
    assert near(again, want[0])
    assert near(got, want[1])


@pytest.mark.parametrize("spread", [lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, 1)[:, ::2]])
@pytest.mark.parametrize(("kind", "activation", "rows"), KINDS)
def test_x_that_is_not_contiguous(kind, activation, rows, spread, monkeypatch):
    module = layer(kind, activation)
    x = spread(torch.randn(rows, 192).bfloat16())
    want = expected(module, x)
    with torch.no_grad():
        module(x)
        planned_only(monkeypatch)
        assert near(module(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "rows"), [("int8", 1), ("int4", 3), ("float8", 1), ("float8", 2)])
def test_other_dtypes(kind, rows, dtype, monkeypatch):
    module = layer(kind)
    module.bias.data = module.bias.to(dtype)
    x = torch.randn(rows, 192).to(dtype)
    want = expected(module, x)
    with torch.no_grad():
        assert near(module(x), want, 8e-3 if kind == "int4" else 2e-3)  # int4 rounds x to int8
        planned_only(monkeypatch)
        got = module(x)
    assert got.dtype == dtype
    assert near(got, want, 8e-3 if kind == "int4" else 2e-3)


def test_a_bias_of_another_dtype():
    module = layer("int8", bias=False)
    x, bias = torch.randn(40, 192).bfloat16(), torch.randn(384)
    want = expected(module, x) + bias.double()
    with torch.no_grad():
        for _ in range(2):
            assert near(linear(x, module.weight, bias), want)


def scaled(weight):
    weight.scale = weight.scale * 3


def scaled_in_place(weight):
    weight.scale.mul_(3)


def with_a_term(weight):
    weight.set_lowrank(torch.randn(384, 4), torch.randn(4, 192))


def quantizing(weight):
    weight.activation = qint8


def other_codes(weight):
    weight.qdata = weight.qdata.flip(0).contiguous()


def copied(weight):
    weight.data.copy_(QTensor.quantize(torch.randn(384, 192).bfloat16(), weight.qtype))


def halved_scale(weight):
    weight.scale = weight.scale.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [scaled, scaled_in_place, copied, with_a_term, quantizing, other_codes, halved_scale]
)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_whoever_changes_a_weight_changes_its_products(change, rows, kind):
    module = layer(kind)
    x = torch.randn(rows, 192).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            module(x)
        change(module.weight)
        for _ in range(2):
            got = module(x)
        if change is halved_scale:  # what is not seen in place is not held
            module.weight.scale.mul_(2)
            got = module(x)
        module.wide = module.weight.clone().dequantize(torch.float32).double()
        want = expected(module, x)
        assert near(got, want, 2e-2)
        for _ in range(2):
            assert near(module(x), want, 2e-2)


def test_plans_go_with_the_tensors_they_were_made_from():
    module = layer("int8")
    if not module.weight.is_packed:
        return  # plain codes stay where they are
    with torch.no_grad():
        for _ in range(2):
            module(torch.randn(40, 192).bfloat16())
    assert module.weight._storage.plans
    _ = module.weight.qdata
    assert module.weight._storage.plans
    module.weight.unpack()
    assert not module.weight._storage.plans
    assert not module.weight._storage.derived


def test_settings_are_asked_again():
    module = layer("int8")
    x = torch.randn(40, 192).bfloat16()
    want = expected(module, x)
    with torch.no_grad():
        versions = []
        for compiled in (True, True, False, False, True):
            settings.compiled = compiled
            assert near(module(x), want)
            versions.append(registry_state.version)
        assert versions[0] == versions[1] == versions[4] != versions[2] == versions[3]
        plans = {version: plan.gemm for (*_, version), plan in module.weight._storage.plans.items()}
        assert plans[versions[0]] is not plans[versions[2]]


def test_gradients_autocast_and_errors_take_the_usual_way():
    module = layer("int8", bias=False)
    x = torch.randn(4, 192).bfloat16()
    with torch.no_grad():
        for _ in range(2):
            module(x)
    asked = x.clone().requires_grad_()
    module(asked).sum().backward()
    assert near(asked.grad, module.wide.sum(0).expand(4, -1))
    prepare(module, smallest=0)
    with torch.no_grad():
        for _ in range(2):
            module(x)
        with torch.autocast("cpu", dtype=torch.float16):
            assert module(x).dtype == torch.float16
        with pytest.raises(ValueError, match="does not fit a weight"):
            module(torch.randn(4, 191).bfloat16())
        assert module(x[:0]).shape == (0, 384)
        with pytest.raises(ValueError, match="x is on meta"):
            module(x.to("meta"))


def test_autocast_does_not_convert_the_dequantized_weight():
    """float16 is multiplied as float32, which autocast would turn back."""
    weight = QTensor.quantize(torch.randn(96, 128), "int4")
    experts = QTensor.quantize(torch.randn(2, 96, 128), "int4", axis=1)
    x, ends = torch.randn(8, 128), torch.tensor([4, 8], dtype=torch.int32)
    with torch.no_grad():
        wants = linear(x.half(), weight), grouped_linear(x[:, :96].half(), experts.mT, ends)
        with torch.autocast("cpu", dtype=torch.float16):
            found = linear(x, weight), grouped_linear(x[:, :96].half(), experts.mT, ends)
    assert all(torch.equal(one, other) for one, other in zip(found, wants))


def test_only_so_many_shapes_are_remembered():
    module = layer("int8")
    with torch.no_grad():
        for rows in range(1, 3 * registry.MAX_PLANS):
            module(torch.randn(rows, 192).bfloat16())
            assert len(module.weight._storage.plans) <= registry.MAX_PLANS


@pytest.mark.parametrize(("kind", "activation", "rows"), KINDS)
def test_a_model_s_device_context(kind, activation, rows):
    """What is made on the way is made on the CPU, whatever device a model is being built for."""
    module = layer(kind, activation)
    x = torch.randn(rows, 192).bfloat16()
    want = expected(module, x)
    buffers.release()
    with torch.no_grad(), torch.device("meta"):
        for _ in range(2):  # F.linear would take the context away
            assert near(linear(x, module.weight, module.bias), want)


@pytest.mark.parametrize(("kind", "activation", "rows"), KINDS)
def test_a_product_holds_the_memory_it_reads(kind, activation, rows):
    """Another thread may make the weight plain in the midst of it."""
    module = layer(kind, activation)
    if not module.weight.is_packed:
        return  # plain codes stay where they are
    x = torch.randn(rows, 192).bfloat16()
    want = expected(module, x)
    with torch.no_grad():
        module(x)
        (plan,) = module.weight._storage.plans.values()
        product = plan.gemm
        del plan
        packed = StorageWeakRef(module.weight._qdata.untyped_storage())
        module.weight.unpack()
        gc.collect()
        rubbish = [torch.full((384 * 192,), 77, dtype=torch.int8) for _ in range(50)]
        assert near(product(x, module.weight, module.bias), want)
    del product, rubbish
    gc.collect()
    assert packed.expired()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("kind", "activation"), [("int8", None), ("int8", qint8), ("float8", None), ("int4", None)])
def test_every_other_row_of_a_weight(kind, activation, rows):
    """Its scales are a view with gaps."""
    weight = QTensor.quantize(torch.randn(768, 192).bfloat16(), kind)[::2]
    module = torch.nn.Linear(192, 384, bias=False)
    module.weight = torch.nn.Parameter(weight, False)
    module.weight.activation = activation
    module.wide = weight.dequantize(torch.float32).double()
    prepare(module, smallest=0)
    x = torch.randn(rows, 192).bfloat16()
    want = expected(module, x)
    with torch.no_grad():
        for _ in range(2):
            assert near(module(x), want)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", [("int8", qint8), ("int8", None), ("float8", None), ("int4", None)])
def test_biases_of_other_shapes(kind, rows):
    """Spread over the result, as torch does, or refused, as torch does."""
    module = layer(*kind, bias=False)
    x = torch.randn(rows, 192).bfloat16()
    want = expected(module, x)
    with torch.no_grad():
        module(x)
        for bias in (torch.randn(1), torch.randn(rows, 384), torch.randn(768)[::2], torch.randn(384).bfloat16()):
            assert near(linear(x, module.weight, bias), want + bias.double())
        with pytest.raises(RuntimeError):
            linear(x, module.weight, torch.randn(100))
        x = torch.randn(384, 192).bfloat16()
        bias = 100 * torch.randn(384, 1)  # as many elements as the layer has outputs, but one for each row of x
        for _ in range(2):
            assert near(linear(x, module.weight, bias), expected(module, x) + bias.double())


@pytest.mark.parametrize("kind", [("int8", qint8), ("int8", None), ("float8", None), ("int4", None)])
def test_a_negated_view_of_a_bias(kind):
    """It has the bias's address and dtype, for which the plan holds a struct already."""
    module = layer(*kind, bias=False)
    x, bias = torch.randn(2, 192).bfloat16(), 100 * torch.randn(384).bfloat16()
    want = expected(module, x)
    with torch.no_grad():
        for given in (bias, bias, torch._neg_view(bias), bias):
            assert near(linear(x, module.weight, given), want + given.double())


def test_the_workspace_s_bound_holds_for_sums(monkeypatch):
    module = layer("int8", qint8, out_features=2048)
    monkeypatch.setattr(settings, "workspace_bytes", 2**21)
    x = torch.randn(1500, 192).bfloat16()
    want = expected(module, x)
    buffers.release()
    with torch.no_grad():
        for _ in range(2):
            assert near(module(x), want)
    assert buffers.held_bytes() <= 2**21


def test_compiled_models_do_without():
    module = layer("int8", bias=False)
    x = torch.randn(4, 192).bfloat16()
    want = expected(module, x)
    with torch.no_grad():
        for _ in range(2):
            module(x)
        product = torch.compile(lambda x, weight: linear(x, weight) * 2, backend="eager", fullgraph=True)
        assert near(product(x, module.weight), 2 * want)
        product = torch.compile(lambda x: F.relu(module(x)), backend="eager", fullgraph=True)
        assert near(product(x), want.relu())
