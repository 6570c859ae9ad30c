"""Products against float64, and what is in no table: a read gets the dequantized values with a log line, a write raises."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor

KINDS = ["int2", "int4", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]
KINDS += ["int3", "int7", "uint1", "uint8", "nf4", "fp6_e3m2", "codebook3", "nvfp4", "mxfp4", "mxfp8"]
# relative error of a product that the design allows
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


PRODUCTS = {
    "linear": ((7, 64), (5, 64), lambda x, w: F.linear(x, w), lambda x, w: x @ w.t()),
    "linear of three axes": ((2, 3, 64), (5, 64), lambda x, w: F.linear(x, w), lambda x, w: x @ w.t()),
    "linear of one axis": ((64,), (5, 64), lambda x, w: F.linear(x, w), lambda x, w: x @ w.t()),
    "matmul": ((7, 64), (5, 64), lambda x, w: torch.matmul(x, w.t()), lambda x, w: x @ w.t()),
    "mm": ((7, 64), (5, 64), lambda x, w: torch.mm(x, w.t()), lambda x, w: x @ w.t()),
    "@": ((3, 7, 64), (5, 64), lambda x, w: x @ w.t(), lambda x, w: x @ w.t()),
    "@ on the left": ((64, 7), (5, 64), lambda x, w: w @ x, lambda x, w: w @ x),
    "along the rows": ((7, 5), (5, 64), lambda x, w: x @ w, lambda x, w: x @ w),
    "bmm": ((3, 7, 64), (3, 5, 64), lambda x, w: torch.bmm(x, w.transpose(1, 2)), lambda x, w: x @ w.mT),
    "bmm on the left": ((3, 64, 7), (3, 5, 64), lambda x, w: torch.bmm(w, x), lambda x, w: w @ x),
    "experts by index": ((7, 64), (3, 5, 64), lambda x, w: F.linear(x, w[1]), lambda x, w: x @ w[1].t()),
    "conv1d": ((2, 4, 9), (5, 4, 3), lambda x, w: F.conv1d(x, w), lambda x, w: F.conv1d(x, w)),
    "conv2d": ((2, 4, 6, 6), (5, 4, 3, 3), lambda x, w: F.conv2d(x, w), lambda x, w: F.conv2d(x, w)),
    "conv_transpose2d": ((2, 5, 4, 4), (5, 4, 3, 3), F.conv_transpose2d, F.conv_transpose2d),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_against_float64(name, kind, dtype):
    x_shape, w_shape, product, reference = PRODUCTS[name]
    x, weight = random(*x_shape, dtype=dtype), random(*w_shape, seed=1, dtype=dtype)
    axis = 0 if name.startswith("conv") else None
    tensor = QTensor.quantize(weight, kind, axis=axis)
    out = product(x, tensor)
    wanted = reference(x.double(), tensor.dequantize(torch.float32).double())
    assert type(out) is torch.Tensor
    assert (out.dtype, out.shape) == (dtype, wanted.shape)
    assert error(out, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_bias_addmm_and_baddbmm(kind):
    x, bias = random(7, 64), random(5, seed=2)
    tensor = QTensor.quantize(random(5, 64, seed=1), kind)
    wanted = x.double() @ tensor.dequantize().double().t() + bias.double()
    assert error(F.linear(x, tensor, bias), wanted) <= 1e-6
    assert error(torch.addmm(bias, x, tensor.t()), wanted) <= 1e-6
    scaled = torch.addmm(bias, x, tensor.t(), beta=0.5, alpha=2)
    assert error(scaled, 2 * (wanted - bias.double()) + 0.5 * bias.double()) <= 1e-6
    experts, batch, add = QTensor.quantize(random(3, 5, 64, seed=1), kind), random(3, 7, 64), random(3, 1, 5, seed=3)
    wanted = add.double() + batch.double() @ experts.dequantize().double().mT
    assert error(torch.baddbmm(add, batch, experts.transpose(1, 2)), wanted) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [[2, 2, 7], [0, 0, 7], [3, 5, 6], [0, 0, 0]])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_of_experts(kind, ends, transposed):
    """Rows sorted by expert: here one by one, in float64; rows past the last end belong to nobody."""
    weight = random(3, 64, 5, seed=1) if transposed else random(3, 5, 64, seed=1)
    tensor = QTensor.quantize(weight, kind, transposed=transposed)
    x, offsets = random(7, 64).bfloat16(), torch.tensor(ends, dtype=torch.int32)
    out = F.grouped_mm(x, tensor if transposed else tensor.transpose(1, 2), offs=offsets)
    assert (out.shape, out.dtype) == ((7, 5), torch.bfloat16)
    float_weight = tensor.dequantize(torch.float32).double()
    float_weight = float_weight.mT if transposed else float_weight
    for row in range(ends[-1]):
        expert = next(e for e, end in enumerate(ends) if row < end)
        wanted = x[row].double() @ float_weight[expert].t()
        assert error(out[row], wanted) <= 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_reads_the_rows_asked_for(kind):
    tensor = QTensor.quantize(random(9, 64), kind)
    indices = torch.tensor([[0, 8, 8], [3, 0, 1]])
    assert torch.equal(F.embedding(indices, tensor), tensor.dequantize()[indices])
    with pytest.raises(NotImplementedError, match="max_norm rewrites the embedding table"):
        F.embedding(indices, tensor, max_norm=1.0)
    for bad in (indices.double(), indices > 1):
        with pytest.raises(ValueError, match="indices must be integers"):
            requanto.linear.embedding(bad, tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_inputs_and_bias(kind):
    """What training an adapter on top needs: the gradients of the dequantized weight, in float64."""
    x, bias = random(7, 64).requires_grad_(), random(5, seed=2).requires_grad_()
    tensor = QTensor.quantize(random(5, 64, seed=1), kind)
    direction = random(7, 5, seed=3)
    (F.linear(x, tensor, bias) * direction).sum().backward()
    assert error(x.grad, direction.double() @ tensor.dequantize().double()) <= 1e-6
    assert error(bias.grad, direction.double().sum(0)) <= 1e-6


def test_autocast_decides_the_dtype():
    tensor = QTensor.quantize(random(5, 64), "int4")
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(random(3, 64), tensor).dtype == torch.bfloat16
    assert F.linear(random(3, 64), tensor).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind):
    tensor = QTensor.quantize(random(5, 64), kind)
    assert F.linear(torch.empty(0, 64), tensor).shape == (0, 5)
    assert F.linear(torch.empty(2, 0, 64), tensor).shape == (2, 0, 5)


def test_shapes_that_do_not_fit_are_told():
    tensor = QTensor.quantize(random(5, 64), "int4")
    with pytest.raises(ValueError, match=r"x of shape \(3, 32\) does not fit a weight of shape \(5, 64\).*must be 64"):
        F.linear(random(3, 32), tensor)
    with pytest.raises(ValueError, match=r"x must be a float tensor, found torch\.int64"):
        F.linear(torch.ones(3, 64, dtype=torch.int64), tensor)


READS = {
    "aten.add.Tensor": lambda q: q + 1.0,
    "aten.mul.Tensor": lambda q: q * 2,
    "aten.div.Tensor": lambda q: q / 2,
    "aten.sum.default": lambda q: q.sum(),
    "aten.max.default": lambda q: q.max(),
    "aten.neg.default": lambda q: -q,
    "aten.cat.default": lambda q: torch.cat([q, torch.ones(1, 64)]),
    "aten.stack.default": lambda q: torch.stack([q, q], 1),
    "aten.linalg_vector_norm.default": lambda q: q.norm(),
    "aten.zeros_like.default": lambda q: torch.zeros_like(q),
    "aten.eq.Tensor": lambda q: q == q,
    "aten._softmax.default": lambda q: q.softmax(-1),
    "aten.expand.default": lambda q: q.expand(2, 5, 64),
    "aten.unsqueeze.default": lambda q: q[None],
    "aten.view.default": lambda q: q.view(5, 4, 16),
    "aten.index.Tensor": lambda q: q[torch.tensor([0, 2]), torch.tensor([1, 1])],
    "aten.native_layer_norm.default": lambda q: F.layer_norm(q, (64,)),
    "aten.var_mean.correction": lambda q: torch.var_mean(q, 1)[0],
    "aten.add_.Tensor": lambda q: torch.ones(5, 64).add_(q),
    "linear": lambda q: F.linear(q, torch.ones(3, 64)),
    "conv2d": lambda q: F.conv2d(q.view(1, 5, 8, 8), torch.ones(2, 5, 3, 3)),
    "matmul": lambda q: q @ q.t(),
    "einsum": lambda q: torch.einsum("ij,kj->ik", q, torch.ones(3, 64)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("name", READS)
def test_an_operator_outside_the_table_reads_the_values_and_is_logged_once(name, kind, inference, caplog):
    tensor = QTensor.quantize(random(5, 64), kind)
    before, values = tensor.clone(), tensor.dequantize()
    with torch.inference_mode(inference):
        found, again, wanted = READS[name](tensor), READS[name](tensor), READS[name](values)
    torch.testing.assert_close(found, wanted, check_stride=False)
    torch.testing.assert_close(again, wanted, check_stride=False)
    assert torch.equal(tensor, before)
    lines = [record.getMessage() for record in caplog.records if "reads the values" in record.getMessage()]
    assert len(lines) == 1
    if name.startswith("aten"):
        assert lines[0].startswith(name)


WRITES = {
    "aten.zero_.default": lambda q: q.zero_(),
    "aten.fill_.Scalar": lambda q: q.fill_(1.0),
    "aten.normal_.default": lambda q: nn.init.normal_(q),
    "aten.mul_.Tensor": lambda q: q.mul_(3),
    "aten.add.out": lambda q: torch.add(torch.ones(5, 64), 1, out=q),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITES)
def test_an_operator_that_writes_names_itself_and_the_way_out(name, inference):
    tensor = QTensor.quantize(random(5, 64), "int4")
    before = tensor.clone()
    with torch.inference_mode(inference), pytest.raises(NotImplementedError) as caught:
        WRITES[name](tensor)
    message = str(caught.value)
    assert message.startswith(f"{name} is not defined on a quantized weight")
    assert ".dequantize()" in message
    assert torch.equal(tensor, before)


LOST = {
    "an item": lambda q: q.__setitem__(0, 1.0),
    "an item of data": lambda q: q.data.__setitem__((slice(None), 3), 1.0),
    "a row": lambda q: q[1].zero_(),
    "a row of a view": lambda q: q.view(5, 4, 16)[0].fill_(1.0),
    "a transposed view": lambda q: q.view(5, 4, 16).transpose(0, 1).mul_(2),
    "a chunk": lambda q: q.unsqueeze(0).chunk(2, 2)[1].copy_(torch.zeros(1, 5, 32)),
    "out": lambda q: torch.add(torch.ones(64), 1, out=q[0]),
    "unbound rows": lambda q: q.unbind()[2].add_(1),
    "a detached row": lambda q: q[0].detach().zero_(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", LOST)
def test_what_torch_returns_as_a_view_cannot_be_written_into(name, inference):
    """The values are a copy: a write would change nothing in the weight."""
    tensor = QTensor.quantize(random(5, 64), "int4")
    before = tensor.clone()
    with (
        torch.inference_mode(inference),
        pytest.raises(NotImplementedError, match=r"the weight would not change.*dequ"),
    ):
        LOST[name](tensor)
    assert torch.equal(tensor, before)


def test_values_that_were_read_are_ordinary_tensors_from_the_next_operator_on():
    rows = QTensor.quantize(random(5, 64), "int4")[0]
    assert type(rows + 1) is torch.Tensor
    assert type(rows.clone()) is torch.Tensor
    changed = rows.clone()
    changed.zero_()
    assert rows.any()
    x = random(3, 64).requires_grad_()
    (x @ rows).sum().backward()
    torch.testing.assert_close(x.grad, rows.clone().expand(3, 64))


def test_gradients_pass_an_operator_that_reads_the_values():
    x, y = random(3, 5, 64).requires_grad_(), random(3, 5, 64).requires_grad_()
    tensor = QTensor.quantize(random(5, 64, seed=1), "int4")
    for weight, input in ((tensor, x), (tensor.dequantize(), y)):
        (F.layer_norm(weight, (64,)) * input + weight[None] * input.square()).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_a_quantized_weight_is_not_copied_into_or_compared_with_floats():
    """Both would go unnoticed: a float parameter filled with rounded values, a weight found equal to its rounding."""
    tensor = QTensor.quantize(random(5, 64), "int4")
    with pytest.raises(NotImplementedError, match=r"into a float tensor: call \.dequantize\(\)"):
        torch.empty(5, 64).copy_(tensor)
    with pytest.raises(NotImplementedError, match=r"equal\(\) of a quantized and a float tensor"):
        torch.equal(tensor, random(5, 64))
