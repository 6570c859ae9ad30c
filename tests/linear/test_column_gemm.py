"""Products with weights that have a column scale, against float64 of the dequantized weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor, explain, prepare, qint8
from requanto.dtypes.qtypes import qfloat8
from requanto.linear import grouped_linear, linear, times
from requanto.linear.activations import quantize_activations
from requanto.linear.columns import column_for
from requanto.nn.activation import QActivation
from requanto.runtime.settings import settings

KINDS = ["int8", "int4", "int3", "int2", "float8", "nf4", "codebook3", "uint8"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def float_arithmetic(monkeypatch):
    """x is not rounded, so that limits are float32's."""
    monkeypatch.setattr(settings, "cpu_arithmetic", "float")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def quantized(kind="int4", shape=(96, 128), dtype=torch.float32, **how) -> QTensor:
    weight = torch.randn(shape) * (torch.randn(shape[-1]) / 2).exp()
    weight = weight.mT if how.get("transposed") else weight
    found = QTensor.quantize(weight.to(dtype), kind, **{"column_scale": "root", **how})
    assert (found.column is not None) == (how.get("column_scale") is not False)
    return found


def close(found, wanted, tolerance=None):
    tolerance = TOLERANCE[found.dtype] if tolerance is None else tolerance
    assert found.shape == wanted.shape
    assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm())


def double(weight: QTensor) -> torch.Tensor:
    return weight.dequantize(torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [True, False])
def test_both_orientations(kind, dtype, packed):
    for stored in {torch.float32, dtype}:  # x in the dtype of the weight, and in another
        rotation = 32 if stored == dtype and kind in ("int3", "float8") else None
        weight = quantized(kind, (320, 256), stored, rotation=rotation)
        layer = nn.Linear(256, 320, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        values = double(weight)
        if packed:
            prepare(layer, smallest=0)
        bias = torch.randn(320, dtype=dtype)
        for rows in (1, 70):
            for _ in range(3):  # the first call may pack, the second plans, the third uses the plan
                x, z = torch.randn(rows, 256).to(dtype), torch.randn(rows, 320).to(dtype)
                with torch.no_grad():
                    close(F.linear(x, layer.weight, bias), x.double() @ values.T + bias.double())
                    close(z @ layer.weight, z.double() @ values)
                    close(times(x, layer.weight.t(), bias), x.double() @ values.T + bias.double())


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_weight_stored_as_conv1d_stores_it(kind, dtype):
    weight = quantized(kind, transposed=True)
    assert weight.shape == (128, 96)
    for _ in range(3):
        x = torch.randn(2, 5, 128).to(dtype)
        close(x @ weight, x.double() @ double(weight))
        z = torch.randn(2, 5, 96).to(dtype)
        close(F.linear(z, weight), z.double() @ double(weight).T)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("rotation", [None, 32])
def test_gradients(transposed, rank, rotation):
    weight = quantized(low_rank=rank or None, rotation=rotation)
    values = double(weight)
    values = values.T if transposed else values
    x = torch.randn(7, values.shape[1], requires_grad=True)
    bias = torch.randn(values.shape[0], requires_grad=True)
    out = linear(x, weight.t() if transposed else weight, bias)
    other = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * other).sum(), x, create_graph=True)
    close(grad, other.double() @ values)
    (out * other + grad.square().sum()).sum().backward()
    close(bias.grad, other.double().sum(0))
    exact = x.detach().double().requires_grad_()
    wanted = exact @ values.T + bias.detach().double()
    (first,) = torch.autograd.grad((wanted * other.double()).sum(), exact, create_graph=True)
    (wanted * other.double() + first.square().sum()).sum().backward()
    close(x.grad, exact.grad)


@pytest.mark.parametrize("kind", [qint8, qfloat8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
def test_quantized_activations_are_those_of_x_times_the_scale(kind, dtype, static):
    weight = quantized("int8", (320, 256), dtype)
    x = torch.randn(9, 256).to(dtype)
    scale = (x * weight.column).abs().max().reshape(()) / kind.qmax if static else None
    codes, steps = quantize_activations(x * weight.column.to(dtype), kind, scale)
    wanted = codes.double() * steps.double() @ (double(weight) / weight.column.double()).T
    close(linear(x, weight, activation=kind, input_scale=scale), wanted)
    weight.activation = kind
    if not static:
        for _ in range(3):
            close(F.linear(x, nn.Parameter(weight, requires_grad=False)), wanted)


def test_float16_does_not_overflow():
    weight = quantized("int4", (64, 128), torch.float16, column_scale="std")
    x = torch.zeros(2, 128, dtype=torch.float16)
    x[:, weight.column.argmax()] = 60000.0
    assert torch.isfinite(x * weight.column).all()
    column = torch.ones(128)
    column[::2] = 2.0**-12
    small = QTensor.quantize(torch.randn(64, 128).half(), "int8", column_scale=column)
    z = torch.randn(3, 64).half() * 10
    assert float((z.double() @ (double(small) / small.column.double())).abs().max()) > 2**17
    close(z @ small, z.double() @ double(small))
    experts = QTensor.quantize(torch.randn(2, 64, 128).half(), "int8", column_scale=column.expand(2, -1))
    found = grouped_linear(z, experts.mT, torch.tensor([3, 3], dtype=torch.int32))
    close(found, z.double() @ double(experts)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_inference_mode_then_training(dtype):
    weight = quantized("int4")
    x = torch.randn(5, 128)
    with torch.inference_mode():  # what is cached here must serve autograd below
        F.linear(x.to(dtype), weight)
    leaf = x.to(dtype).requires_grad_()
    F.linear(leaf, weight).sum().backward()
    close(leaf.grad, torch.ones(5, 96, dtype=torch.float64) @ double(weight))
    with torch.autocast("cpu", dtype):
        out = F.linear(x, weight)
    assert out.dtype == dtype
    close(out, x.double() @ double(weight).T)
    with torch.inference_mode():
        made = quantized("int4", dtype=dtype)
    leaf = x.to(dtype).requires_grad_()
    assert torch.isfinite(column_for(made, dtype) * leaf).all()  # autograd saves the scale
    close(F.linear(x.to(dtype), made), x.to(dtype).double() @ double(made).T)


def test_a_change_of_the_scale_reaches_plans():
    layer = nn.Linear(256, 320, bias=False)
    layer.weight = nn.Parameter(quantized("int8", (320, 256), torch.bfloat16), requires_grad=False)
    x = torch.randn(4, 256).bfloat16()
    with torch.no_grad():
        before = [layer(x) for _ in range(3)][-1]
        wide = [layer(x.half()) for _ in range(3)][-1]
        layer.weight.column.mul_(0.5)
        torch.testing.assert_close(layer(x), before * 0.5)
        torch.testing.assert_close(layer(x.half()), wide * 0.5)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled(grad):
    torch._dynamo.reset()
    layer = nn.Linear(128, 96)
    layer.weight = nn.Parameter(quantized("int4", low_rank=2), requires_grad=False)
    x = torch.randn(5, 128, requires_grad=grad)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(compiled(x), x.detach().double() @ double(layer.weight).T + layer.bias.detach().double())
    if grad:
        compiled(x).sum().backward()
        close(x.grad, torch.ones(5, 96, dtype=torch.float64) @ double(layer.weight))


def test_transforms_and_traces():
    weight = quantized("int4")
    x = torch.randn(3, 5, 128)
    wanted = x.double() @ double(weight).T
    close(torch.func.vmap(lambda one: F.linear(one, weight))(x), wanted)
    grad = torch.func.grad(lambda one: F.linear(one, weight).sum())(x)
    close(grad, torch.ones(3, 5, 96, dtype=torch.float64) @ double(weight))
    layer = nn.Linear(128, 96, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    close(torch.jit.trace(layer, x)(x), wanted)
    close(torch.export.export(layer, (x,)).module()(x), wanted)


# ---------------------------------------------------------------------- experts, embeddings, convolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rotation", [None, 16])
def test_experts(dtype, transposed, rotation):
    weight = quantized("int4", (4, 48, 64), dtype, group_size=16, rotation=rotation, low_rank=2)
    assert weight.column.shape == (4, 64)
    values = double(weight)
    offsets = torch.tensor([3, 3, 8, 11], dtype=torch.int32)  # the second has no rows; the last two rows no expert
    seen, values = (weight.mT, values.mT) if transposed else (weight, values)
    x = torch.randn(13, values.shape[-1]).to(dtype).requires_grad_()
    out = grouped_linear(x, seen, offsets)
    owner = [0] * 3 + [2] * 5 + [3] * 3
    wanted = torch.stack([x[i].detach().double() @ values[e].T for i, e in enumerate(owner)])
    close(out[:11], wanted)
    assert not out[11:].any()
    out[:11].sum().backward()
    grad = torch.stack([values[e].sum(0) for e in owner])
    close(x.grad[:11], grad)
    assert not x.grad[11:].any()
    one = seen[2]
    close(F.linear(x.detach(), one), x.detach().double() @ values[2].T)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "float8"])
@pytest.mark.parametrize("low_rank", [None, 2])
def test_rows_of_an_embedding(kind, low_rank):
    weight = quantized(kind, dtype=torch.bfloat16, low_rank=low_rank)
    ids = torch.tensor([[3, 0, 95], [3, 3, 7]])
    assert torch.equal(F.embedding(ids, weight), weight.dequantize()[ids])
    assert torch.equal(weight[ids], weight.dequantize()[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_convolutions(dtype, kind):
    for function, shape, size, how in (
        (F.conv1d, (40, 8, 3), (2, 8, 11), {"padding": 1}),
        (F.conv2d, (40, 8, 3, 3), (2, 8, 7, 9), {"stride": 2, "padding": 1}),
        (F.conv2d, (40, 4, 3, 3), (2, 8, 7, 9), {"groups": 2}),
        (F.conv2d, (64, 32, 1, 1), (1, 32, 5, 5), {}),
        (F.conv3d, (40, 2, 2, 2, 2), (1, 2, 4, 4, 4), {}),
        (F.conv_transpose2d, (40, 6, 3, 3), (1, 40, 5, 5), {"stride": 2}),
    ):
        weight = quantized(kind, shape, dtype, axis=0)
        x = torch.randn(size).to(dtype)
        wanted = function(x.double(), double(weight), **how)
        for _ in range(2):
            close(function(x, weight, **how), wanted)
        grad = x.clone().requires_grad_()
        function(grad, weight, **how).sum().backward()
        assert torch.isfinite(grad.grad).all()


def test_a_convolution_as_a_gemm(monkeypatch):
    """The weight of a convolution that runs as a GEMM of patches is packed; its column scale covers them."""
    weight = quantized("int4", (512, 256, 3, 3), torch.bfloat16)
    layer = nn.Conv2d(256, 512, 3, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    values = double(weight)
    x = torch.randn(1, 256, 4, 4).bfloat16()
    with torch.no_grad():
        for _ in range(3):
            close(layer(x), F.conv2d(x.double(), values))


def test_explain_names_it():
    layer = nn.Linear(128, 96)
    layer.weight = nn.Parameter(quantized("int4"), requires_grad=False)
    assert "int4, group 64, column scale" in str(explain(layer))
    assert "column scale" in repr(layer.weight)
    assert layer.weight.spec()["column"] is True


def test_calibrated_modules_quantize_x_times_the_scale():
    torch.manual_seed(1)
    sizes = (torch.randn(64) * 1.5).exp()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(sizes)
    x = torch.randn(64, 64) / sizes
    exact = model(x)
    errors = {}
    for column_scale in (False, "std"):
        made = copy.deepcopy(model)
        requanto.quantize(made, "int8", activations="int8", column_scale=column_scale)
        with torch.no_grad(), requanto.Calibration():
            made(x)
        unfrozen = made(x)
        requanto.freeze(made)
        out = made(x)
        assert (made[0].weight.column is not None) == bool(column_scale)
        errors[column_scale] = float(
            (out.dequantize() if hasattr(out, "_data") else out).sub(exact).norm() / exact.norm()
        )
        assert float((unfrozen.float() - out.float()).norm() / exact.norm()) < 0.02
    assert errors["std"] < 0.5 * errors[False]


def test_an_input_that_is_quantized_already_is_quantized_anew():
    torch.manual_seed(1)
    sizes = (torch.randn(64) * 1.5).exp()
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 40))
    with torch.no_grad():
        model[0].weight.div_(sizes[:, None])
        model[0].bias.zero_()
        model[1].weight.mul_(sizes)
    x = torch.randn(64, 32)
    requanto.quantize(model[0], "int8", activations="int8", column_scale=False)
    requanto.quantize(model[1], "int8", activations="int8", column_scale="std")
    with torch.no_grad(), requanto.Calibration(streamline=False):
        model(x)
    second = model[1]
    second.disable_output_quantization()
    unfrozen = model(x)
    requanto.freeze(model)
    passed = model[0](x)
    assert isinstance(passed, QActivation)
    values = passed.dequantize().detach()
    scaled = values * second.weight.column
    assert float(second.input_scale) == pytest.approx(float(scaled.abs().max()) / 127, rel=0.05)
    codes, step = quantize_activations(scaled, qint8, second.input_scale)
    wanted = codes.double() * step.double() @ (double(second.weight) / second.weight.column.double()).T
    wanted = wanted + second.bias.detach().double()
    for found in (unfrozen, second(passed), second.forward(passed)):
        close(found.detach(), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_scale_of_inference_mode_may_change_in_place(dtype):
    with torch.inference_mode():
        weight = QTensor.quantize(torch.randn(64, 96), "int4", column_scale="std")
        x = torch.randn(3, 96, dtype=dtype)
        before = F.linear(x, weight)
        assert torch.equal(F.linear(x, weight), before)  # by the cached plan
        weight.column.mul_(0.5)  # such tensors have no version that would tell
        assert torch.equal(F.linear(x, weight), before * 0.5)
