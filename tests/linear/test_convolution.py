"""Convolutions of quantized weights on a CPU, against float64 of the same codes."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from requanto import QTensor
from requanto.linear import convolution
from requanto.linear.cpu import library
from requanto.runtime import buffers
from requanto.runtime.settings import settings

KINDS = ("int8", "int4", "uint4", "float8", "float8_e5m2", "nf4", "int6", "int3", "int2", "nvfp4")
LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
FUNCTIONS = {
    "conv1d": (F.conv1d, (2, 32, 19), (48, 32, 3), {"padding": 1}),
    "conv2d": (F.conv2d, (2, 32, 9, 7), (48, 32, 3, 3), {"stride": 2, "padding": 1}),
    "one by one": (F.conv2d, (1, 64, 5, 5), (48, 64, 1, 1), {}),
    "unbatched": (F.conv2d, (32, 9, 7), (48, 32, 3, 3), {"padding": "same"}),
    "dilated": (F.conv2d, (2, 32, 9, 9), (48, 32, 3, 3), {"dilation": 2}),
    "in groups": (F.conv2d, (2, 32, 9, 7), (48, 8, 3, 3), {"groups": 4}),
    "depthwise": (F.conv2d, (2, 48, 9, 7), (48, 1, 3, 3), {"groups": 48}),
    "conv3d": (F.conv3d, (1, 16, 4, 5, 6), (24, 16, 3, 3, 3), {"padding": 1}),
    "conv_transpose2d": (F.conv_transpose2d, (2, 48, 5, 5), (48, 32, 3, 3), {"stride": 2, "output_padding": 1}),
    "nothing": (F.conv2d, (0, 32, 9, 7), (48, 32, 3, 3), {}),
}


@pytest.fixture(params=["operators", "kernels"])
def way(request, monkeypatch):
    if request.param == "kernels" and library.find() is None:
        pytest.skip("the CPU kernels are not available here")
    monkeypatch.setattr(settings, "compiled", request.param == "kernels")
    return request.param


def check(name, kind, dtype, bias=True):
    function, x_shape, w_shape, how = FUNCTIONS[name]
    weight = QTensor.quantize(torch.randn(w_shape).to(dtype), kind, axis=0)
    x = torch.randn(x_shape).to(dtype)
    channels = w_shape[1] if function is F.conv_transpose2d else w_shape[0]
    added = torch.randn(channels).to(dtype) if bias else None
    with torch.inference_mode():
        got = function(x, weight, added, **how)
    wide = weight.dequantize(torch.float32).double()
    want = function(x.double(), wide, None if added is None else added.double(), **how)
    assert type(got) is torch.Tensor
    assert (got.dtype, got.shape) == (dtype, want.shape)
    assert (got.double() - want).norm() <= LIMITS[dtype] * want.norm()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_types_and_dtypes(kind, dtype, way):
    check("conv2d", kind, dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, bias, way):
    for kind in ("int8", "int4", "float8"):
        check(name, kind, torch.bfloat16, bias)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "unbatched", "in groups", "conv3d", "conv_transpose2d"])
@pytest.mark.parametrize("bytes_", [3000, 20_000])
def test_some_output_channels_at_a_time(name, bytes_, way, monkeypatch):
    monkeypatch.setattr(settings, "workspace_bytes", bytes_)
    for kind in ("int8", "int4"):
        check(name, kind, torch.bfloat16)


def test_a_buffer_too_small_for_the_weight(way, monkeypatch):
    monkeypatch.setattr(settings, "workspace_bytes", 2**14)
    buffers.release()
    for name in ("conv2d", "in groups", "conv_transpose2d"):
        for dtype in LIMITS:
            check(name, "int8", dtype)
    assert buffers.held_bytes() <= 2**14


def test_positional_arguments(way):
    weight, x = QTensor.quantize(torch.randn(8, 4, 3, 3), "int8"), torch.randn(1, 8, 6, 6)
    wide, bias = weight.dequantize(), torch.randn(8)
    with torch.no_grad():
        got = F.conv2d(x, weight, bias, 1, 1, 1, 2)
        named = F.conv2d(input=x, weight=weight, bias=bias, stride=1, padding=1, dilation=1, groups=2)
    want = F.conv2d(x, wide, bias, 1, 1, 1, 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(named, want)


def test_the_layout_of_the_image_is_kept(way, monkeypatch):
    weight, x = QTensor.quantize(torch.randn(64, 32, 3, 3), "int8"), torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        want = F.conv2d(x.to(memory_format=torch.channels_last), weight.dequantize())
        for bytes_ in (2**20, 20_000):
            monkeypatch.setattr(settings, "workspace_bytes", bytes_)
            got = F.conv2d(x.to(memory_format=torch.channels_last), weight)
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want)


DTYPES = [torch.float32, torch.bfloat16]


def two_weights(dtype):
    """One convolution, and one that comes after it and takes the same buffer."""
    return (QTensor.quantize(torch.randn(16, 16, 3, 3).to(dtype), "int8") for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_do_not_read_the_buffer(dtype, way):
    """A backward keeps the float weight; another convolution comes between it and its forward."""
    first, second = two_weights(dtype)
    x = torch.randn(1, 16, 6, 6).to(dtype).requires_grad_()
    out = F.conv2d(x, first, padding=1)
    with torch.no_grad():
        F.conv2d(torch.randn(1, 16, 6, 6).to(dtype), second, padding=1)
    out.sum().backward()
    again = x.detach().clone().requires_grad_()
    F.conv2d(again, first.dequantize(), padding=1).sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    # A bias that is trained keeps nothing of the weight, but torch decides that.
    bias = torch.zeros(16, requires_grad=True, dtype=dtype)
    F.conv2d(x.detach(), first, bias, padding=1).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((16,), 36.0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_derivatives_by_torch_func(dtype, way):
    first, second = two_weights(dtype)
    x = torch.randn(2, 1, 16, 6, 6).to(dtype)

    def of(one, two):
        return lambda x: torch.vmap(lambda z: F.conv2d(F.conv2d(z, one, padding=1), two, padding=1))(x).sum()

    with torch.no_grad():
        F.conv2d(x[0], first, padding=1)  # a buffer is there
    got = torch.func.grad(of(first, second))(x)
    want = torch.func.grad(of(first.dequantize(), second.dequantize()))(x)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        value, push = torch.func.linearize(lambda x: F.conv2d(x, first, padding=1), x[0])
        F.conv2d(x[0], second, padding=1)
        torch.testing.assert_close(push(x[1]), F.conv2d(x[1], first.dequantize(), padding=1))
        torch.testing.assert_close(value, F.conv2d(x[0], first.dequantize(), padding=1))
        _, pushed = torch.func.jvp(lambda x: F.conv2d(x, first, padding=1), (x[0],), (x[1],))
        torch.testing.assert_close(pushed, F.conv2d(x[1], first.dequantize(), padding=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traces_and_fake_tensors_leave_the_buffer_alone(dtype, way):
    first, second = two_weights(dtype)
    x, other = (torch.randn(1, 16, 6, 6).to(dtype) for _ in range(2))
    buffers.release()
    with torch.no_grad():
        with FakeTensorMode() as mode:
            assert F.conv2d(mode.from_tensor(x), mode.from_tensor(first), padding=1).shape == (1, 16, 6, 6)
        want = F.conv2d(x, first.dequantize(), padding=1)
        torch.testing.assert_close(F.conv2d(x, first, padding=1), want)
        graph = make_fx(lambda x: F.conv2d(x, first, padding=1))(other)
        traced = torch.jit.trace(lambda x: F.conv2d(x, first, padding=1), other, check_trace=False)
        F.conv2d(x, second, padding=1)
        torch.testing.assert_close(graph(x), want)
        torch.testing.assert_close(traced(x), want)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_rounded_once(kind, dtype, way):
    """Pixels that are rows of the unit matrix read the weight: it is off by half a step at most."""
    weight = QTensor.quantize(torch.randn(64, 64, 1, 1).to(dtype), kind)
    with torch.no_grad():
        got = F.conv2d(torch.eye(64, dtype=dtype).view(64, 64, 1, 1), weight).view(64, 64).t().double()
    want = weight.dequantize(torch.float32).view(64, 64).double()
    half = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert bool(((got - want).abs() <= 1.0001 * half * want.abs() + 2.0**-20).all())


def test_with_a_term_beside_and_rotated(way):
    x = torch.randn(1, 32, 6, 6)
    for how in ({"low_rank": 4}, {"rotation": True}):
        weight = QTensor.quantize(torch.randn(16, 32, 3, 3), "int4", **how)
        with torch.no_grad():
            torch.testing.assert_close(F.conv2d(x, weight), F.conv2d(x, weight.dequantize()))


def test_threads_agree_with_one_thread(way):
    weights = [QTensor.quantize(torch.randn(64, 32, 3, 3).bfloat16(), kind) for kind in ("int8", "int4", "float8")]
    images = [torch.randn(1, 32, 12, 12).bfloat16() for _ in range(4)]

    def run(x):
        with torch.inference_mode():
            return [F.conv2d(x, weight, padding=1) for weight in weights]

    want, wrong = [run(x) for x in images], []

    def again(x, expected):
        for _ in range(20):
            if not all(torch.equal(got, one) for got, one in zip(run(x), expected)):
                wrong.append(x)

    threads = [threading.Thread(target=again, args=pair) for pair in zip(images, want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_under_autocast(way):
    weight, x = QTensor.quantize(torch.randn(16, 32, 3, 3), "float8"), torch.randn(1, 32, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = F.conv2d(x, weight), F.conv2d(x, weight.dequantize())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def test_compiled_as_one_graph():
    weight, x = QTensor.quantize(torch.randn(16, 32, 3, 3), "int8"), torch.randn(1, 32, 6, 6)
    with torch.no_grad():
        product = torch.compile(lambda x: F.conv2d(x, weight).relu(), backend="eager", fullgraph=True)
        torch.testing.assert_close(product(x), F.conv2d(x, weight.dequantize()).relu())


#: Of so few output pixels that a product of patches is faster; the last in 1 x 1.
SMALL = {
    "padded": ((2, 64, 6, 7), (128, 64, 3, 3), {"padding": 1}),
    "strided": ((3, 64, 9, 8), (128, 64, 3, 3), {"stride": 2, "padding": (1, 0)}),
    "dilated": ((1, 64, 6, 6), (128, 64, 3, 3), {"dilation": 2, "padding": 2}),
    "filled up": ((2, 72, 5, 5), (124, 72, 3, 3), {"padding": (0, 1)}),
    "one by one": ((2, 256, 8, 8), (320, 256, 1, 1), {}),
    "one by one, strided": ((2, 256, 8, 8), (320, 256, 1, 1), {"stride": 2}),
}


@pytest.mark.skipif(library.find() is None, reason="the CPU kernels are not available here")
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "nf4", "float8"])
@pytest.mark.parametrize("name", SMALL)
def test_small_images_are_products(name, kind, monkeypatch):
    """With a packed weight, which a large image, a copy or a file sees in its stored form."""
    monkeypatch.setattr(convolution, "WEIGHTS_PER_PIXEL", 1)
    shape, w_shape, how = SMALL[name]
    weight = torch.nn.Parameter(QTensor.quantize(torch.randn(w_shape).bfloat16(), kind, axis=0), False)
    codes, wide = weight.qdata.clone(), weight.dequantize(torch.float32).double()
    bias = torch.randn(w_shape[0]).bfloat16()
    large = torch.randn(2, w_shape[1], 24, 24).bfloat16()

    def error(x):
        with torch.inference_mode():
            got = F.conv2d(x, weight, bias, **how)
        want = F.conv2d(x.double(), wide, bias.double(), **how)
        assert got.shape == want.shape
        assert got.is_contiguous()
        return (got.double() - want).norm() / want.norm()

    limit = LIMITS[torch.bfloat16] if kind in ("int8", "float8") else 1e-2  # x rounded to int8, and nf4's values too
    for _ in range(2):
        for _ in range(3):  # packed, made ready, used
            assert error(torch.randn(shape).bfloat16()) < limit
        assert weight.is_packed
        assert error(large) < LIMITS[torch.bfloat16]
        assert weight.is_packed
        assert torch.equal(weight.qdata.view(torch.uint8), codes.view(torch.uint8))
        assert weight.qdata.shape == codes.shape
    x = torch.randn(shape).bfloat16()
    with torch.inference_mode():
        want = F.conv2d(x, weight, bias, **how)
        assert weight.is_packed
        assert (F.conv2d(x, weight.clone(), bias, **how) - want).norm() < 1e-2 * want.norm()
    x.requires_grad_()
    F.conv2d(x, weight, bias, **how).sum().backward()
    assert x.grad.abs().sum() > 0
    assert (F.conv2d(x, weight, bias, **how) - want).norm() < 1e-2 * want.norm()


def test_other_convolutions_of_small_images_are_no_products(monkeypatch):
    monkeypatch.setattr(convolution, "WEIGHTS_PER_PIXEL", 1)
    for kind, how in (("fp7_e3m3", {}), ("int8", {"padding": "same"}), ("int8", {"groups": 2})):
        channels = 64 // how.get("groups", 1)
        weight = torch.nn.Parameter(QTensor.quantize(torch.randn(128, channels, 3, 3).bfloat16(), kind, axis=0), False)
        x = torch.randn(1, 64, 5, 5).bfloat16()
        with torch.inference_mode():
            got = F.conv2d(x, weight, None, **how)
        want = F.conv2d(x.double(), weight.dequantize(torch.float32).double(), None, **how)
        assert not weight.is_packed
        assert (got.double() - want).norm() <= LIMITS[torch.bfloat16] * want.norm()
