"""The six convolutions with a quantized weight follow torch's rules: shapes, dtypes, errors.

Every case is held against torch on the dequantized weight, values in float64; on a CPU with compiled kernels too, where a
small image's convolution is a GEMM of its patches.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from requanto import QTensor
from requanto.linear import convolution
from requanto.linear.cpu import library
from requanto.runtime.settings import settings

FUNCTIONS = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(*shape, kind="int8", dtype=torch.float32):
    weight = QTensor.quantize(random(*shape, seed=1, dtype=dtype), kind, axis=0)
    return torch.nn.Parameter(weight, requires_grad=False)  # what is no parameter is never packed


def plain(value, dtype=None):
    if isinstance(value, QTensor):
        value = value.dequantize(torch.float32 if dtype else None)
    if dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
        value = value.to(dtype)
    return value


def outcome(function, *args, **how):
    try:
        with torch.no_grad():
            return function(*args, **how)
    except (RuntimeError, ValueError, TypeError) as error:
        return error


def check(function, x, weight, bias=None, **how):
    """The function gives what torch gives for the dequantized weight, or raises where torch raises."""
    want = outcome(function, x, plain(weight), bias, **how)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = outcome(function, x.requires_grad_(grad) if x.is_floating_point() else x, weight, bias, **how)
        x = x.detach()
        if isinstance(want, Exception):
            assert isinstance(got, type(want)), f"torch raises {want!r}, found {got!r}"
            continue
        assert not isinstance(got, Exception), f"torch gives {tuple(want.shape)}, found {got!r}"
        assert type(got) is torch.Tensor
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        exact = function(*(plain(each, torch.float64) for each in (x, weight, bias)), **how)
        assert (got.double() - exact).norm() <= LIMITS[x.dtype] * exact.norm()
    return want


@pytest.fixture(params=["operators", "kernels"])
def way(request, monkeypatch):
    """With kernels, the smallest weights go through patches and the smallest buffers: every way there is."""
    monkeypatch.setattr(settings, "compiled", None if request.param == "kernels" else False)
    if request.param == "kernels":
        if library.find() is None:
            pytest.skip("the CPU kernels are not available here")
        monkeypatch.setattr(convolution, "WEIGHTS_PER_PIXEL", 1)
        monkeypatch.setattr(settings, "workspace_bytes", 4096)
        monkeypatch.setattr(settings, "cpu_arithmetic", "float")  # so that results can be compared closely


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes(name, groups, way):
    function, axes = FUNCTIONS[name], int(name[-2])
    image = (6, 7, 5)[:axes]
    weight = quantized(8, 4 // (1 if "transpose" in name else groups), *(3, 2, 1)[:axes])
    channels = 8 if "transpose" in name else 4
    biases = [None, random(4 * groups if "transpose" in name else 8)]
    ways = [{}, {"stride": 2}, {"dilation": 2}, {"stride": (2, 1, 2)[:axes], "padding": (1, 0, 1)[:axes]}]
    ways += [{"output_padding": 1, "stride": 2}] if "transpose" in name else [{"padding": "same"}, {"padding": "valid"}]
    for lead in [(2,), (), (0,), (1,)]:
        for bias in biases:
            for how in ways:
                check(function, random(*lead, channels, *image), weight, bias, groups=groups, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "how"),
    [
        ((1, 64, 2, 6), {}),  # the kernel is larger than the image
        ((1, 64, 0, 6), {}),
        ((1, 64, 0, 6), {"padding": 3}),
        ((1, 64, 6, 6), {"dilation": 3}),
        ((0, 64, 2, 6), {}),
        ((1, 63, 6, 6), {}),  # channels
        ((1, 0, 6, 6), {}),
        ((1, 128, 6, 6), {}),
        ((64, 6), {}),  # axes
        ((1, 1, 64, 6, 6), {}),
        ((), {}),
        ((1, 64, 6, 6), {"stride": 0}),
        ((1, 64, 6, 6), {"stride": (1, 0)}),
        ((1, 64, 6, 6), {"stride": -1}),
        ((1, 64, 6, 6), {"stride": (1, 1, 1)}),
        ((1, 64, 6, 6), {"stride": ()}),
        ((1, 64, 6, 6), {"padding": -1}),
        ((1, 64, 6, 6), {"padding": (0, 0, 0)}),
        ((1, 64, 6, 6), {"padding": ()}),
        ((1, 64, 6, 6), {"dilation": 0}),
        ((1, 64, 6, 6), {"dilation": (1, 1, 2)}),
        ((1, 64, 6, 6), {"padding": "same", "stride": 2}),
        ((1, 64, 6, 6), {"padding": "else"}),
        ((1, 64, 6, 6), {"groups": 2}),
        ((1, 64, 6, 6), {"groups": 3}),
        ((1, 64, 6, 6), {"groups": 0}),
        ((1, 64, 6, 6), {"other": 1}),
    ],
)
def test_what_torch_refuses_is_refused(x, how, dtype, way):
    for bias in (None, random(128, dtype=dtype)):
        check(F.conv2d, random(*x, dtype=dtype), quantized(128, 64, 3, 3, dtype=dtype), bias, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bias_that_does_not_fit(name, dtype, way):
    """Neither broadcast nor cut."""
    axes, count = int(name[-2]), 128
    x = random(2, 64, *(3, 3, 3)[:axes], dtype=dtype)
    weight = quantized(*((64, count) if "transpose" in name else (count, 64)), *(1,) * axes, dtype=dtype)
    for shape in [(1,), (count + 1,), (count - 1,), (2 * count,), (), (count, 1), (1, count), (0,)]:
        assert isinstance(check(FUNCTIONS[name], x, weight, random(*shape, dtype=dtype)), Exception)
    for other in (torch.float64, torch.float16, torch.int64):
        check(FUNCTIONS[name], x, weight, torch.ones(count, dtype=other))  # some transposed ones take float64
    assert not isinstance(check(FUNCTIONS[name], x, weight, random(count, dtype=dtype)), Exception)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lead=st.sampled_from([(), (0,), (1,), (2,)]),
    image=st.tuples(*[st.integers(0, 5)] * 2),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    stride=st.sampled_from([1, 2, (1, 2), [2, 1], (1,)]),
    padding=st.sampled_from([0, 1, (0, 2), [1, 0], "same", "valid"]),
    dilation=st.sampled_from([1, 2, (1, 2)]),
    groups=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
def test_any_image(lead, image, kernel, stride, padding, dilation, groups, dtype, bias, way):
    x, weight = random(*lead, 4, *image, dtype=dtype), quantized(8, 4 // groups, *kernel, dtype=dtype)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    check(F.conv2d, x, weight, random(8, dtype=dtype) if bias else None, **how)


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_image_that_is_not_float(name, dtype, autocast, way):
    axes = int(name[-2])
    x = (random(1, 4, *(5, 5, 5)[:axes]) * 9).to(dtype)
    weight = quantized(4, 4, *(3, 3, 3)[:axes])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert isinstance(outcome(FUNCTIONS[name], x, weight.dequantize()), RuntimeError)
        with pytest.raises(RuntimeError, match=f"{name}: expected a float tensor .* found {dtype}"):
            FUNCTIONS[name](x, weight)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", LIMITS)
def test_computed_in_the_dtype_of_the_image(dtype, w_dtype, kind, way):
    """Where torch wants both dtypes alike: a quantized weight has none that its codes depend on."""
    for name, function in FUNCTIONS.items():
        axes = int(name[-2])
        x, weight = (
            random(1, 4, *(4, 4, 4)[:axes], dtype=dtype),
            quantized(4, 4, *(2,) * axes, kind=kind, dtype=w_dtype),
        )
        bias = random(4, dtype=dtype)
        with torch.no_grad():
            got = function(x, weight, bias)
        want = function(x.double(), weight.dequantize(torch.float32).double(), bias.double())
        assert (got.dtype, got.shape) == (dtype, want.shape)
        assert (got.double() - want).norm() <= LIMITS[dtype] * want.norm()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast(name, grad, way):
    """It narrows float32 and float16, the bias too, and leaves float64 alone."""
    axes = int(name[-2])
    weight, bias = quantized(4, 4, *(2,) * axes), random(4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = random(1, 4, *(4, 4, 4)[:axes], dtype=dtype).requires_grad_(grad)
        with torch.autocast("cpu", torch.bfloat16):
            got, want = FUNCTIONS[name](x, weight, bias), FUNCTIONS[name](x, weight.dequantize(), bias)
        assert got.dtype == want.dtype == torch.bfloat16
        assert (got - want).norm() <= 1e-2 * want.norm()
    x = random(1, 4, *(4, 4, 4)[:axes], dtype=torch.float64).requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        got = FUNCTIONS[name](x, weight, bias.double())
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, FUNCTIONS[name](x, weight.dequantize(torch.float64), bias.double()))


def test_a_quantized_input_is_read_as_floats():
    weight = quantized(4, 4, 3, 3)
    for kernel in (weight, random(4, 4, 3, 3)):
        float_kernel = kernel.dequantize() if isinstance(kernel, QTensor) else kernel
        torch.testing.assert_close(F.conv2d(weight, kernel), F.conv2d(weight.dequantize(), float_kernel))


def test_a_gemm_of_patches_is_among_them(way, monkeypatch):
    """The ways above are really gone: with kernels, an image of few pixels is one GEMM with the packed weight."""
    calls = []
    gemm = convolution.packed_gemm
    monkeypatch.setattr(convolution, "packed_gemm", lambda *args: calls.append(1) or gemm(*args))
    weight = quantized(128, 64, 3, 3, dtype=torch.bfloat16)
    check(F.conv2d, random(1, 64, 6, 6, dtype=torch.bfloat16), weight, random(128, dtype=torch.bfloat16))
    assert bool(calls) == (settings.compiled is None)
