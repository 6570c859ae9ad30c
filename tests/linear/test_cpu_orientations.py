"""Packed weights of sizes that are padded, and transposed ones (GPT-2's ``x @ W``): products in both orientations."""

import concurrent.futures
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import requanto
from requanto import QTensor, explain, prepare, qint8
from requanto.linear import registry, times
from requanto.linear.cpu import library
from requanto.linear.cpu.strips import STRIPS
from requanto.runtime.settings import settings

pytestmark = pytest.mark.usefixtures("float_arithmetic")

#: Rows left over, columns left over, both, a strip and a bit, several parts of a buffer.
SIZES = [(1000, 192), (192, 1000), (1000, 1000), (320, 544), (577, 640), (4200, 1032), (320, 192)]
#: One row, few, many; more than the limits of implementations.
ROWS = (1, 2, 5, 40, 300)
LIMITS = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def limit(weight, dtype):
    """Where x is rounded to int8, in blocks, that is half a percent."""
    return max(LIMITS[dtype], 8e-3 if weight.qtype.bits < 7 else 0)


@pytest.fixture(params=[True, False], ids=["kernels", "operators"])
def kernels(request, monkeypatch):
    if request.param and library.find() is None:
        pytest.skip("the CPU kernels are not available here")
    monkeypatch.setattr(settings, "compiled", request.param)
    return request.param


def made(kind, out_features, in_features, *, transposed=False, activation=None, dtype=torch.bfloat16, **how):
    """A layer's weight for ``x @ w.T`` or, transposed, ``x @ w``; its float64 values ``[N, K]``, its stored codes."""
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    weight = QTensor.quantize(torch.randn(shape).to(dtype), kind, transposed=transposed, **how)
    weight.activation = activation
    values, codes = weight.dequantize(torch.float32).double(), weight.qdata.view(torch.uint8).clone()
    return torch.nn.Parameter(weight, False), values.t() if transposed else values, codes


def product(x, weight, bias):
    return torch.addmm(bias, x, weight) if weight.transposed else F.linear(x, weight, bias)


def expected(x, values, bias, activation=None):
    wide = x.double()
    if activation is not None:
        step = wide.abs().amax(-1, keepdim=True) / 127
        wide = (wide / step).round() * step
    return wide @ values.t() + bias.double()


def distance(got, want):
    return float((got.double() - want).norm() / want.norm())


def error(got, x, values, bias):
    return distance(got, expected(x, values, bias))


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize(
    ("kind", "activation"), [("int8", None), ("int8", qint8), ("int4", None), ("int2", None), ("float8", None)]
)
def test_products_are_those_of_the_codes(kernels, kind, activation, transposed):
    """Three times each: the first may pack, the second makes the product ready, the third uses it."""
    for out_features, in_features in SIZES:
        weight, values, codes = made(kind, out_features, in_features, transposed=transposed, activation=activation)
        bias = torch.randn(out_features).bfloat16()
        for rows in ROWS:
            for dtype in LIMITS if rows in (1, 5) and activation is None else (torch.bfloat16,):
                x = torch.randn(rows, in_features).to(dtype)
                want = expected(x, values, bias, activation)
                for _ in range(3):
                    with torch.no_grad():
                        got = product(x, weight, bias.to(dtype))
                    assert got.shape == (rows, out_features)
                    assert got.is_contiguous()
                    found = distance(got, want)
                    assert found <= limit(weight, dtype), (out_features, in_features, rows, dtype, found)
        assert torch.equal(weight.qdata.view(torch.uint8), codes)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_they_are_packed_and_planned(kind, transposed, kernels):
    weight, values, _ = made(kind, 1000, 192, transposed=transposed)
    x, bias = torch.randn(40, 192).bfloat16(), torch.randn(1000).bfloat16()
    layout = STRIPS.name if kernels else "plain"
    with torch.no_grad():
        product(x, weight, bias)
        assert weight.layout_name == layout
        assert registry.find_plan(x, weight, bias) is not None
        # A scale that is changed, in place or replaced, is seen; in place only where it is not made of others.
        weight._scale.mul_(2)
        if weight._shift is not None:
            weight._shift.mul_(2)
        assert error(product(x, weight, bias), x, 2 * values, bias) < 1e-2
        weight.scale = weight.scale / 2
        if weight.shift is not None:
            weight.shift = weight.shift / 2
        for _ in range(2):
            assert error(product(x, weight, bias), x, values, bias) < 1e-2
    layer = torch.nn.Module()
    layer.weight = weight
    (row,) = explain(layer, rows=40)
    assert row.layout == layout


@pytest.mark.parametrize("kind", ["int4", "int3", "int2"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_groups_of_other_sizes(kernels, kind, transposed):
    for out_features, in_features, group in (
        (1000, 1072, 16),
        (320, 448, 8),
        (320, 256, 4),
        (192, 1536, 512),
        (192, 1536, 96),
        (601, 1072, None),
        (65, 1024, None),
    ):
        weight, values, codes = made(kind, out_features, in_features, transposed=transposed, group_size=group)
        assert weight.group_size == group
        bias = torch.randn(out_features).bfloat16()
        for rows in ROWS:
            x = torch.randn(rows, in_features).bfloat16()
            want = expected(x, values, bias)
            for _ in range(3):
                with torch.no_grad():
                    found = distance(product(x, weight, bias), want)
                assert found < 1e-2, (out_features, in_features, group, rows, found)
            packs = kernels and group != 4 and out_features != 65  # a fifth would be padding
            assert weight.is_packed == packs, (out_features, in_features, group)
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(5, in_features).to(dtype)
            with torch.no_grad():
                assert error(product(x, weight, bias.to(dtype)), x, values, bias) < limit(weight, dtype)
        assert torch.equal(weight.qdata.view(torch.uint8), codes)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_both_orientations_of_one_weight(kernels, kind):
    """A square weight: ``x @ W``, for which it is packed, and ``x @ W.T``, for which it cannot be, in turns."""
    weight, values, codes = made(kind, 320, 320, transposed=True)
    x = torch.randn(40, 320).bfloat16()
    zeros = torch.zeros(320)
    with torch.no_grad():
        for _ in range(3):
            for _ in range(2):
                assert error(x @ weight, x, values, zeros) < 1e-2
            assert error(F.linear(x, weight), x, values.t(), zeros) < 1e-2
            assert error((weight @ x.t()).t(), x, values.t(), zeros) < 1e-2
    assert torch.equal(weight.qdata.view(torch.uint8), codes)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_gradients_of_a_transposed_weight(kernels, kind):
    weight, values, _ = made(kind, 320, 256, transposed=True, dtype=torch.float32)
    bias = torch.randn(320).bfloat16().requires_grad_()
    with torch.no_grad():
        product(torch.randn(40, 256).bfloat16(), weight, bias)  # packs it
    x = torch.randn(40, 256).bfloat16().requires_grad_()
    out = product(x, weight, bias)
    assert error(out.detach(), x.detach(), values, bias.detach()) < 1e-2
    out.backward(torch.ones_like(out))
    want = values.sum(0).expand(40, -1)
    assert (x.grad.double() - want).norm() <= 1e-2 * want.norm()
    assert torch.equal(bias.grad.float(), torch.full((320,), 40.0))


def test_other_dtypes_of_x_through_one_layout(kernels):
    weight, values, _ = made("float8", 320, 256, transposed=True)
    with torch.no_grad():
        x = torch.randn(40, 256)
        times(x.bfloat16(), weight)
        assert weight.is_packed == kernels
        assert error(times(x, weight), x, values, torch.zeros(320)) < 1e-5
    assert weight.is_packed == kernels


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_compiled_graphs_of_a_packed_weight_in_both_orientations(kernels, kind, transposed):
    """A graph has the packed form alone, which is for one of them; a backward wants the other."""
    torch._dynamo.reset()
    weight, values, _ = made(kind, 320, 320, transposed=transposed)
    x, zeros = torch.randn(40, 320).bfloat16(), torch.zeros(320)
    forward, other = (torch.matmul, F.linear) if transposed else (F.linear, torch.matmul)
    with torch.no_grad():
        forward(x, weight)
        assert weight.is_packed == kernels
        assert error(torch.compile(lambda a: forward(a, weight), backend="aot_eager")(x), x, values, zeros) < 1e-2
        assert error(torch.compile(lambda a: other(a, weight), backend="aot_eager")(x), x, values.t(), zeros) < 1e-2
        forward(x, weight)
        whole = torch.compile(lambda one: weight.dequantize() * one, backend="aot_eager")(torch.ones(()))
        torch.testing.assert_close(whole.double(), (values.t() if transposed else values), rtol=1e-2, atol=1e-2)
    x.requires_grad_()
    out = torch.compile(lambda a: forward(a, weight), backend="aot_eager")(x)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert error(x.grad, gradient, values.t(), zeros) < 1e-2


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_transforms_and_traces_of_a_packed_weight(kind, transposed, kernels):
    weight, values, codes = made(kind, 320, 256, transposed=transposed)
    x, zeros = torch.randn(4, 256).bfloat16(), torch.zeros(320)

    def run(a):
        return a @ weight if transposed else F.linear(a, weight)

    def packed():
        with torch.no_grad():
            run(x)
        return weight.is_packed == kernels

    assert packed()
    assert error(torch.vmap(run)(x), x, values, zeros) < 1e-2
    assert packed()
    gradient = torch.func.grad(lambda a: run(a).float().sum())(x)
    assert error(gradient, torch.ones(4, 320), values.t(), torch.zeros(256)) < 1e-2
    assert packed()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert run(mode.from_tensor(x)).shape == (4, 320)
    assert error(make_fx(run)(x)(x), x, values, zeros) < 1e-2
    assert packed()
    assert torch.equal(weight.qdata.view(torch.uint8), codes)


def test_scales_that_are_changed_behind_torch_s_back(kernels):
    """Kernels read them where they are, so that no way to change them is missed."""
    weight, values, _ = made("int8", 1000, 192)
    x, zeros = torch.randn(40, 192).bfloat16(), torch.zeros(1000)
    with torch.no_grad():
        for factor in (1, 2, 4):
            for _ in range(3):
                assert error(F.linear(x, weight), x, factor * values, zeros) < 1e-2
            weight.detach().scale.data.mul_(2)


def test_threads_that_multiply_while_another_reads_the_codes(kernels):
    weight, values, codes = made("int8", 320, 256, transposed=True)
    wrong, stop = [], threading.Event()

    def multiply(rows):
        with torch.inference_mode():
            for step in range(60):
                x = torch.randn(rows + step % 3, 256).bfloat16()
                if not error(x @ weight, x, values, torch.zeros(320)) < 1e-2:
                    wrong.append(rows)

    def read():
        while not stop.is_set():
            weight.unpack()
            if not torch.equal(weight.qdata.view(torch.uint8), codes):
                wrong.append("codes")

    reader = threading.Thread(target=read)
    reader.start()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        done = [pool.submit(multiply, rows) for rows in (1, 40)]
    stop.set()
    reader.join()
    for each in done:
        each.result()
    assert not wrong


@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_module_of_a_transposed_weight_keeps_its_form(activations, kernels):
    transformers = pytest.importorskip("transformers")
    model = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(512, 256)).bfloat16()
    x = torch.randn(3, 5, 256).bfloat16()
    want = model(x)
    requanto.quantize(model, weights="int8", activations=activations)
    requanto.freeze(model)
    assert prepare(model) == ({"0.weight": STRIPS.name} if kernels else {})
    with torch.no_grad():
        for _ in range(2):
            assert (model(x) - want).norm() < 2e-2 * want.norm()
            assert model[0].weight.is_packed == kernels


@pytest.mark.parametrize("activation", [None, qint8])
@pytest.mark.parametrize("rows", [2, 40])
def test_tensors_that_wrap_others_have_no_memory_to_read(rows, activation, kernels):
    """Their class computes each operator on the tensors inside, as DTensor does."""
    weight, values, _ = made("int8", 64, 128, activation=activation, dtype=torch.float32)
    one, other, bias = torch.randn(rows, 128), torch.randn(rows, 128), torch.randn(64)
    wants = [expected(x, values, bias, activation) for x in (one, other)]
    with torch.no_grad():
        F.linear(one, weight, bias)
        F.linear(one, weight, bias)  # there is a plan
    for given in (TwoTensor(one, other), TwoTensor(one, other).requires_grad_()):
        out = F.linear(given, weight, bias)
        for part, want in zip((out.a, out.b), wants):
            assert (part - want).norm() < 2e-2 * want.norm()
    out.sum().backward()
    assert given.grad.shape == one.shape
    with torch.no_grad():
        out = F.linear(one, weight, TwoTensor(bias, bias + 1))
    assert (out.b - wants[0] - 1).norm() < 2e-2 * wants[0].norm()


def test_images_that_wrap_others(kernels):
    weight = QTensor.quantize(torch.randn(64, 64, 1, 1), "int4")
    images, weight = [torch.randn(1, 64, 4, 4) for _ in range(2)], torch.nn.Parameter(weight, False)
    with torch.no_grad():
        F.conv2d(images[0], weight)  # packs it
        out = F.conv2d(TwoTensor(*images), weight)
    for image, part in zip(images, (out.a, out.b)):
        assert torch.allclose(part, F.conv2d(image, weight.dequantize()), atol=1e-3)
