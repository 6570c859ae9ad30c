"""Rotated weights: the transform itself, products, gradients, views, files, and what is refused."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint import flatten, rebuild, spec_text
from requanto.config.config import format_version_of
from requanto.dtypes.qtypes import qint8
from requanto.linear import linear
from requanto.scales.rotation import fit_rotation, rotate
from requanto.tensor.sharding import join_weights, slice_weight

KINDS = ["int4", "int2", "int8", "float8", "nf4", "codebook3", "nvfp4", "mxfp8"]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def hadamard(size):
    """By its definition: the sign of entry i, j is the parity of the bits that i and j share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


@pytest.mark.parametrize("block", [2, 4, 8, 64, 128, 512, 1024])
def test_it_is_the_hadamard_transform_of_each_block(block):
    x = random(3, 5, 3 * block)
    wanted = (x.double().view(3, 5, 3, block) @ hadamard(block)).flatten(-2)
    assert relative(rotate(x, block), wanted) < 3e-7
    assert relative(rotate(rotate(x, block), block), x) < 5e-7  # its own inverse
    assert rotate(x.bfloat16(), block).dtype == torch.bfloat16
    assert rotate(x[:0], block).shape == (0, 5, 3 * block)


def test_its_gradient_is_itself():
    x = random(4, 32).double().requires_grad_()
    direction = random(4, 32, seed=1)
    (rotate(x.float(), 16) * direction).sum().backward()
    assert relative(x.grad, rotate(direction, 16)) < 1e-6


@pytest.mark.parametrize(
    ("wanted", "length", "block"),
    [(1024, 576, 64), (1024, 1536, 512), (64, 4096, 64), (1024, 7, None), (None, 64, None)],
)
def test_blocks_divide_the_row(wanted, length, block):
    assert fit_rotation(wanted, length) == block


@pytest.mark.parametrize("value", [0, 3, 48, "haar", 1.0])
def test_what_is_no_rotation_is_refused(value):
    with pytest.raises(ValueError, match="rotation must be True, False, 'hadamard' or the size of a block"):
        QuantoConfig(weights="int4", rotation=value)
    with pytest.raises(ValueError, match="w: rotation must be"):
        QTensor.quantize(random(4, 64), "int4", rotation=value, name="w")


def test_the_codes_are_those_of_the_rotated_rows():
    weight = random(6, 192)
    tensor = QTensor.quantize(weight, "int4", rotation=True)
    plain = QTensor.quantize(rotate(weight, 64), "int4")
    assert tensor.rotation == 64
    assert torch.equal(tensor.qdata, plain.qdata)
    wanted = (plain.dequantize(torch.float64).view(6, 3, 64) @ hadamard(64)).flatten(-2)
    assert relative(tensor.dequantize(torch.float64), wanted) < 1e-6


def test_outliers_cost_less():
    weight = random(64, 256)
    weight[:, ::50] *= 20
    errors = [relative(QTensor.quantize(weight, "int4", rotation=r).dequantize(), weight) for r in (None, True)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients(kind, transposed, dtype):
    shape = (128, 12) if transposed else (12, 128)
    tensor = QTensor.quantize(random(*shape, dtype=dtype), kind, rotation=True, transposed=transposed)
    assert tensor.rotation == 128
    meaning = tensor.dequantize(torch.float32).double()
    for weight, values in ((tensor, meaning), (tensor.t(), meaning.t())):
        x = random(7, values.shape[1], seed=1, dtype=dtype).requires_grad_()
        bias = random(values.shape[0], seed=2, dtype=dtype)
        out = F.linear(x, weight, bias)
        assert out.dtype == dtype
        assert relative(out, x.double() @ values.t() + bias.double()) <= TOLERANCE[dtype]
        with torch.no_grad():
            assert relative(F.linear(x, weight), x.double() @ values.t()) <= TOLERANCE[dtype]
        direction = random(*out.shape, seed=3, dtype=dtype)
        (out * direction).sum().backward()
        assert relative(x.grad, direction.double() @ values) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_embeddings_and_convolutions(kind):
    experts = QTensor.quantize(random(3, 12, 64), kind, rotation=True)
    x, ends = random(9, 64, seed=2).bfloat16(), torch.tensor([2, 2, 9], dtype=torch.int32)
    meaning = experts.dequantize(torch.float32).double()
    out = F.grouped_mm(x, experts.to(torch.bfloat16).transpose(1, 2), offs=ends)
    assert relative(out, torch.cat([x[:2].double() @ meaning[0].T, x[2:].double() @ meaning[2].T])) < 1e-2
    assert torch.equal(experts[1].dequantize(), experts.dequantize()[1])
    assert relative(F.linear(x.float(), experts[1]), x.double() @ meaning[1].T) < 1e-6
    table, rows = QTensor.quantize(random(12, 64), kind, rotation=True), torch.tensor([[0, 11], [5, 5]])
    torch.testing.assert_close(F.embedding(rows, table), table.dequantize()[rows])
    kernel, image = QTensor.quantize(random(5, 4, 3, 3), kind, rotation=True), random(2, 4, 6, 6)
    assert kernel.rotation == 4  # rows of 36 weights
    torch.testing.assert_close(F.conv2d(image, kernel), F.conv2d(image, kernel.dequantize()))


def test_int8_activations_are_those_of_the_rotated_input():
    weight = QTensor.quantize(random(16, 128), "int8", rotation=True)
    x = random(5, 128, seed=1)
    x[:, 3] *= 50  # an outlier that no other channel can share a scale with
    wanted = x.double() @ weight.dequantize(torch.float64).t()
    plain = QTensor.quantize(weight.dequantize(), "int8")
    rotated, straight = (relative(linear(x, w, activation=qint8), wanted) for w in (weight, plain))
    assert rotated < 0.5 * straight
    with pytest.raises(ValueError, match=r"static input_scale .* rotated in blocks of 128"):
        linear(x, weight, activation=qint8, input_scale=torch.tensor(0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_views_copies_and_files(kind):
    tensor = QTensor.quantize(random(12, 256), kind, group_size=32, rotation=64)
    whole = tensor.dequantize()
    assert torch.equal(tensor[2:7].dequantize(), whole[2:7])
    assert torch.equal(tensor[:, 64:192].dequantize(), whole[:, 64:192])
    pieces = [slice_weight(tensor, 1, 0, 128), slice_weight(tensor, 1, 128, 256)]
    assert torch.equal(join_weights(pieces, 1), tensor)
    with pytest.raises(
        NotImplementedError, match=r"rotated in blocks of 64 can be sliced between blocks only.*rotation=32"
    ):
        slice_weight(tensor, 1, 32, 64)
    assert torch.equal(tensor[:, 32:64], whole[:, 32:64])  # read as floats
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    for again in (copy.deepcopy(tensor), torch.load(buffer, weights_only=True), tensor.to(torch.bfloat16)):
        assert torch.equal(again, tensor)
        assert again.rotation == 64
    line = spec_text(tensor)
    assert line.endswith("rotation=64")
    assert format_version_of({"w": line}) == (3 if kind in ("nvfp4", "mxfp8") else 2)
    parts = {key.removeprefix("w_"): part for key, part in flatten({"w": tensor}).items()}
    assert torch.equal(rebuild("w", line, parts, torch.float32), tensor)
    with pytest.raises(ValueError, match="unlike quantized weights"):
        tensor.copy_(QTensor.quantize(random(12, 256), kind, group_size=32))


def test_an_adapter_beside_it_is_in_the_weights_own_basis():
    tensor, up, down = (
        QTensor.quantize(random(12, 64), "int4", rotation=True),
        random(12, 2, seed=1),
        random(2, 64, seed=2),
    )
    before = tensor.dequantize(torch.float64)
    tensor.add_(up @ down)
    assert relative(tensor.dequantize(torch.float64), before + up.double() @ down.double()) < 1e-6
    x = random(5, 64, seed=3)
    assert relative(F.linear(x, tensor), x.double() @ (before + up.double() @ down.double()).t()) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_it_is_one_graph(backend, transposed):
    torch._dynamo.reset()
    shape = (64, 12) if transposed else (12, 64)
    weight = QTensor.quantize(random(*shape), "int4", group_size=16, rotation=True, transposed=transposed)
    layer = nn.Linear(*reversed(shape)).requires_grad_(False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = random(3, shape[1], seed=1)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))


def test_quantize_map_and_requantize():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))

    model, x = network(), random(5, 64)
    requanto.quantize(model, weights="int4", group_size=16, rotation="hadamard")
    model(x).sum().backward()
    trained = model(x)
    requanto.freeze(model)
    torch.testing.assert_close(model(x), trained)
    qmap = requanto.quantization_map(model)
    assert (qmap["0"]["rotation"], qmap["2"]["rotation"]) == (64, 16)
    assert torch.equal(requanto.requantize(network(), flatten(model.state_dict()), qmap)(x), model(x))
