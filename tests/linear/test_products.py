"""Gradients, operators, activations, rows of an embedding, other devices, memory."""

import pytest
import torch
import torch.nn.functional as F

from requanto import QTensor, qint8
from requanto.linear import custom_ops, implementations, linear, reference
from requanto.linear.activations import quantize_activations, row_absmax
from requanto.linear.cpu.dequantize import dequantize_rows
from requanto.linear.cpu.scratch_matmul import matmul, scaled_into
from requanto.linear.explain import explain
from requanto.linear.prepack import prepare
from requanto.runtime import buffers
from requanto.runtime.settings import settings

KINDS = [
    "int8",
    "int4",
    "int2",
    "float8",
    "fp8_e5m2",
    "int3",
    "int5",
    "uint4",
    "uint8",
    "nf4",
    "fp6_e3m2",
    "codebook4",
    "nvfp4",
    "mxfp8",
]


@pytest.fixture(autouse=True)
def float_arithmetic(monkeypatch):
    """x is not rounded, so that limits are float32's; test_cpu_sweep.py and test_cpu_rounding.py have the others."""
    monkeypatch.setattr(settings, "cpu_arithmetic", "float")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, qint8])
def test_gradients_are_those_of_the_float_layer(layer, kind, packed, activation):
    module = layer(kind, 64, 96, torch.float32)
    weight = module.weight.dequantize()
    if packed:
        prepare(module, smallest=0)
    x = torch.randn(2, 5, 96, requires_grad=True)
    out = linear(x, module.weight, module.bias, activation=activation)
    out.square().sum().backward()
    codes, scale = quantize_activations(x.detach().reshape(-1, 96), qint8)
    seen = x.detach() if activation is None else (codes * scale).view_as(x)
    y = F.linear(seen, weight, module.bias.detach())
    torch.testing.assert_close(out.detach(), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, 2 * y @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(module.bias.grad, (2 * y).sum((0, 1)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_results_in_kept_buffers(layer, kind, packed, dtype):
    """Many rows: the forward writes into buffers of the thread, which autograd must not see."""
    module = layer(kind, 512, 128, dtype)
    weight = module.weight.dequantize(torch.float32)
    if packed:
        prepare(module, smallest=0)
    x = torch.randn(300, 128).to(dtype).requires_grad_()
    first = linear(x, module.weight)
    second = linear(x.detach() * 2, module.weight)
    grad = torch.randn_like(first)
    first.backward(grad)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in (
        (first, x.detach().float() @ weight.t()),
        (second, 2 * x.detach().float() @ weight.t()),
        (x.grad, grad.float() @ weight),
    ):
        assert (got.detach().float() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("packed", [False, True])
def test_operators_keep_their_promises(layer, kind, packed):
    module = layer(kind, 64, 96, torch.float32)
    if packed:
        prepare(module, smallest=0)
    weight = module.weight
    x = torch.randn(3, 96, requires_grad=not packed)
    linear_op, bias = torch.ops.requanto.linear.default, module.bias.detach()
    torch.library.opcheck(linear_op, (x, bias, *custom_ops.arguments(weight), None))
    torch.library.opcheck(linear_op, (x, bias, *custom_ops.arguments(weight, qint8), None))


def test_static_scale():
    weight = QTensor.quantize(torch.randn(64, 64), "int8")
    x = torch.randn(5, 64)
    scale = torch.tensor(0.02)
    codes = (x / scale).round().clamp(-128, 127)
    want = (codes * scale) @ weight.dequantize().t()
    torch.testing.assert_close(linear(x, weight, activation=qint8, input_scale=scale), want, rtol=1e-4, atol=1e-4)
    parameter = torch.nn.Linear(1, 1, bias=False)
    parameter.weight = torch.nn.Parameter(weight, requires_grad=False)
    parameter.weight.activation = qint8
    prepare(parameter, smallest=0)
    with torch.no_grad():
        packed = linear(x, parameter.weight, input_scale=scale)
    torch.testing.assert_close(packed, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="input_scale needs an activation type"):
        linear(x, weight.clone() if weight.activation is None else weight.without_lowrank(), input_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_of_activations(dtype):
    """Maxima by way of the floats' bits: the same as of the floats."""
    x = (torch.randn(6, 301) * torch.tensor([1e-4, 1.0, 50.0, 0.0, 1.0, 8e3])[:, None]).to(dtype)
    x[4, 5] = -x[4].abs().max() * 2
    assert torch.equal(row_absmax(x), x.float().abs().amax(1, keepdim=True).clamp_min(1e-30))
    codes, step = quantize_activations(x, qint8)
    assert ((codes * step - x.float()).abs() <= 0.501 * step).all()
    codes, step = quantize_activations(x, qint8, torch.tensor(0.01))
    assert torch.equal(codes, (x.float() * torch.tensor(0.01).reciprocal()).round().clamp(-128, 127))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maxima_of_what_is_not_finite(value):
    x = torch.randn(3, 50, dtype=torch.bfloat16)
    x[1, 7] = value
    found = row_absmax(x)
    assert torch.isfinite(found).flatten().tolist() == [True, False, True]
    assert torch.equal(found[1].isnan(), torch.tensor([value]).isnan())


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
def test_one_scale_for_all_of_x(layer, rows, bias, dtype, static):
    """One row, or a static scale."""
    module = layer("int8", 64, 96, dtype)
    module.bias = torch.nn.Parameter(torch.randn(64).to(dtype), False) if bias else None
    weight = module.weight.dequantize(torch.float32).double()
    prepare(module, smallest=0)
    x = (torch.randn(rows, 96) * 3).to(dtype)
    scale = torch.tensor(0.04) if static else None
    codes, step = quantize_activations(x, qint8, scale)
    want = (codes.double() * step.double()) @ weight.t() + (module.bias.double() if bias else 0)
    with torch.no_grad():
        got = linear(x, module.weight, module.bias, activation=qint8, input_scale=scale)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= (2e-6 if dtype == torch.float32 else 5e-3) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_one_row_is_as_exact_as_many(layer, dtype, bias):
    module = layer("int8", 64, 96, dtype)
    module.bias = torch.nn.Parameter(torch.randn(64).to(dtype), False) if bias else None
    weight = module.weight.dequantize(torch.float32).double()
    prepare(module, smallest=0)
    x = (torch.randn(1, 96) * 20).to(dtype)
    with torch.no_grad():
        got, many = (linear(rows, module.weight, module.bias) for rows in (x, x.repeat(3, 1)))
    want = x.double() @ weight.t() + (module.bias.double() if bias else 0)
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 3e-3 * want.norm()
    assert (got.double() - many.double()).norm() <= 3e-3 * want.norm()


@pytest.mark.parametrize("activation", [None, qint8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_one_row_that_has_no_scale(layer, value, activation):
    module = layer("int8")
    prepare(module, smallest=0)
    x = torch.full((1, 192), value, dtype=torch.bfloat16)
    with torch.no_grad():
        got = linear(x, module.weight, activation=activation)
    assert not torch.isfinite(got).any() if value else torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (7, 40), (300, 260)])
def test_kept_products(dtype, shape, monkeypatch):
    rows, columns = shape
    x, matrix, scale = torch.randn(rows, 32).to(dtype), torch.randn(32, columns).to(dtype), torch.rand(columns)
    want = x.double() @ matrix.double() * scale.double()
    for bound in (settings.workspace_bytes, 4000):
        monkeypatch.setattr(settings, "workspace_bytes", bound)
        out = torch.full((rows, columns + 5), 7, dtype=dtype)
        scaled_into(out[:, :columns], matmul(x, matrix), scale)
        assert (out[:, :columns].double() - want).norm() <= (1e-6 if dtype == torch.float32 else 6e-3) * want.norm()
        assert torch.equal(out[:, columns:], torch.full((rows, 5), 7, dtype=dtype))


def test_a_static_scale_of_zero_is_no_division_by_zero(layer):
    """An uncalibrated scale gives what it gave in torch's arithmetic: no exception of Python's."""
    module = layer("int8")
    prepare(module, smallest=0)
    x = torch.randn(2, 192, dtype=torch.bfloat16)
    with torch.no_grad():
        got = linear(x, module.weight, activation=qint8, input_scale=torch.tensor(0.0))
    assert got.shape == (2, module.weight.shape[0])


def test_nan_reaches_its_row_only(layer):
    module = layer("int8")
    prepare(module, smallest=0)
    x = torch.randn(3, 192, dtype=torch.bfloat16)
    x[1, 7] = float("nan")
    with torch.no_grad():
        out = module(x)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_dequantize_as_the_formula_says(kind, dtype):
    weight = QTensor.quantize(torch.randn(70, 96), kind)
    out = dequantize_rows(weight, 3, 70, torch.empty(67, 96, dtype=dtype))
    want = weight.dequantize(torch.float64)[3:]
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert (out.double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int6", "int8"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_symmetric_codes_with_one_scale(layer, kind, packed, dtype):
    """Codes below 8 bits are several in a byte, and 0 is not the code of zero."""
    module = layer(kind, 64, 96, dtype)
    weight = QTensor.quantize(torch.randn(64, 96).to(dtype), kind, group_size=None, symmetric=True)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    want = weight.dequantize(torch.float64)
    if packed:
        prepare(module, smallest=0)
    out = dequantize_rows(module.weight, 0, 64, torch.empty(64, 96, dtype=dtype))
    assert (out.double() - want).norm() <= {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype] * want.norm()


@pytest.mark.parametrize("kind", ["float8", "fp8_e5m2"])
def test_every_float8_number(kind):
    codes = torch.arange(256, dtype=torch.uint8)
    weight = QTensor.quantize(torch.randn(1, 256), kind)
    numbers = codes.view(weight.qtype.dtype).float()
    finite = numbers.isfinite()
    weight.qdata, weight.scale = codes.view(weight.qtype.dtype).view(1, -1), torch.ones(1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        out = dequantize_rows(weight, 0, 1, torch.empty(1, 256, dtype=dtype))[0]
        assert torch.equal(out[finite].float(), numbers[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_dequantizes_the_rows_asked_for(kind, monkeypatch):
    table = QTensor.quantize(torch.randn(100, 64), kind)
    whole = table.dequantize()
    seen = []
    dequantize = QTensor.dequantize
    monkeypatch.setattr(QTensor, "dequantize", lambda self, *a: seen.append(self.shape[0]) or dequantize(self, *a))
    rows = torch.tensor([[5, 99], [0, 5]])
    assert torch.equal(F.embedding(rows, table), whole[rows])
    assert seen in ([], [4])  # by the same steps, or as a tensor of these rows; never the whole table


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_an_embedding_s_index_out_of_range(kind):
    table = QTensor.quantize(torch.randn(10, 64), kind)
    for tensor in (table, table[::2]):
        for index in (-1, 10):
            with pytest.raises(IndexError):
                F.embedding(torch.tensor([1, index]), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float8", "int4", "int2", "nf4"])
def test_the_workspace_is_bounded(layer, kind, dtype, monkeypatch):
    """Every buffer that a thread keeps, together; packed int4 with many rows as well."""
    module = layer(kind, 1024, 512, bias=False)
    weight = module.weight.dequantize(torch.float64)
    prepare(module, smallest=0)
    buffers.release()
    monkeypatch.setattr(settings, "workspace_bytes", 300_000)
    x = torch.randn(70, 512).to(dtype)
    want = x.double() @ weight.t()
    with torch.no_grad():
        got = linear(x, module.weight)
    assert (got.double() - want).norm() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype] * want.norm()
    assert 0 < buffers.held_bytes() <= 300_000
    buffers.release()


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_devices_take_the_reference(kind):
    """The reference needs no CPU operator: another device's problem gets it, and it is right."""
    weight = QTensor.quantize(torch.randn(48, 64), kind)
    x = torch.randn(3, 64)
    want = x.double() @ weight.dequantize(torch.float64).t()
    got = reference.run(x, weight, None)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()
    from dataclasses import replace

    from requanto.linear.registry import choose, problem_of

    assert choose(replace(problem_of(weight, x.dtype, 3), device="mps")).implementation.name == "reference"


@pytest.mark.parametrize("kind", ["int4", "uint8", "nf4", "codebook4"])
def test_where_no_gpu_kernel_runs_weights_are_dequantized_in_parts(kind, monkeypatch):
    """Nothing of that path needs a GPU: torch's own operators, some rows of the weight at a time."""
    from dataclasses import replace

    from requanto.linear.gpu import conditions, paths
    from requanto.linear.registry import choose, problem_of

    monkeypatch.setattr(conditions, "available", lambda: False)
    weight = QTensor.quantize(torch.randn(48, 64), kind)
    x, bias = torch.randn(3, 64), torch.randn(48)
    for device in ("cuda", "xpu"):
        chosen = choose(replace(problem_of(weight, x.dtype, 3), device=device)).implementation
        assert chosen.name == "gpu-dequantize"
        assert "no kernel" in chosen.reason
    monkeypatch.setattr(paths, "PART", 64 * 10)
    want = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    got = chosen.run(x, weight, bias)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()
    want = torch.randn(2, 48, dtype=torch.float64)
    got = chosen.run(want.float(), weight.t(), None)
    want = want.float().double() @ weight.dequantize(torch.float64)
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


def test_explain_names_the_paths(layer):
    model = torch.nn.Sequential(layer("int8", 1024, 1024), layer("float8", 256, 256))
    found = explain(model, rows=(1, 512))
    assert [(c.name, c.rows) for c in found] == [("0.weight", 1), ("0.weight", 512), ("1.weight", 1), ("1.weight", 512)]
    names = {implementation.name for implementation in implementations()}
    assert {c.implementation for c in found} <= names
    assert all(choice.implementation.startswith("cpu-") for choice in found)
    with torch.no_grad():
        model[0](torch.randn(2, 1024, dtype=torch.bfloat16))
    assert explain(model, rows=(1, 512)) == found


def test_buffers_are_real_inside_a_meta_device_context():
    """Models are built in one, and quantized inside it."""
    weight = torch.randn(8, 256)
    buffers.release()
    with torch.device("meta"):
        found = QTensor.quantize(weight, "int4")
    assert torch.equal(found.dequantize(), QTensor.quantize(weight, "int4").dequantize())
