"""Values of weights by the GPU's kernels, in Triton's interpreter: dequantize, embeddings, convolutions.

Every test fails where torch's operators decode a weight.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from gpu_stand_in import gpu, reference
from made_weights import ACT_ORDER, EVERY, made, meaning
from reference import TOLERANCE, error

import requanto
from requanto.dtypes.qtypes import qtypes
from requanto.linear import embedding, registry
from requanto.linear.gpu import convolution, dequantize, layout, paths
from requanto.tensor.qtensor import QTensor

HALF, FULL = torch.float16, torch.float32
KINDS = sorted({kind.name.removeprefix("q") for kind in qtypes.values()})


@pytest.fixture(autouse=True)
def only_kernels():
    torch.manual_seed(0)
    with gpu() as decoded:
        yield decoded
        assert not decoded, "torch's operators decoded a weight"


def same(found, weight, dtype):
    """Equal to the values by torch's operators up to the rounding of the last step."""
    want = reference(weight)
    assert found.shape == want.shape
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps * want.abs().double() + (1e-7 * want.abs().max() if weight.affine else 0)
    assert ((found.double() - want.double()).abs() <= step).all()
    if not weight.affine and weight.rotation is None and not weight.rank:
        assert torch.equal(found, want.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(kind):
    pick = random.Random(f"{kind} {random.random()}").choice
    dtype, transposed, k = pick([FULL, HALF]), pick([False, True]), pick([80, 256])
    values = torch.randn(*((k, 24) if transposed else (24, k))).to(pick([FULL, HALF]))
    weight = QTensor.quantize(values, kind, transposed=transposed)
    for packed in (False, True):
        if packed:
            if not layout.fits(weight):
                continue
            weight.pack(layout.EXEC)
        same(weight.dequantize(dtype), weight, dtype)
        assert weight.dequantize().dtype == weight.dtype
        assert weight.dequantize(torch.float64).dtype == torch.float64


OTHERS = [
    ("int3", {"scale_bits": 6}), ("int4", {"zero_point": "integer"}), ("uint8", {"zero_point": "integer", "group_size": 32}),
    ("nf4", {"scale_bits": 8}), ("int4", {"rotation": 64}), ("nf4", {"rotation": 64, "column_scale": "root"}),
    ("int8", {"low_rank": 4}), ("int4", {"column_scale": "mean", "low_rank": 4, "rotation": True}),
]  # fmt: skip


@pytest.mark.parametrize("part", [2**27, 6000])
@pytest.mark.parametrize(("kind", "how"), OTHERS)
def test_all_that_belongs_to_a_weight(kind, how, part, monkeypatch):
    monkeypatch.setattr(dequantize, "PART_BYTES", part)
    for shape in ((24, 128), (3, 10, 128)):
        weight = QTensor.quantize(torch.randn(shape), kind, **how)
        dtype = random.choice([FULL, HALF])
        assert error(weight.dequantize(dtype), reference(weight).double()) <= TOLERANCE[dtype] / 4
        assert error(weight.values_without_lowrank(), reference(weight.without_lowrank()).double()) <= 1e-6
        index = torch.tensor([5, 0, 5, 9])
        if weight.dim() == 2:
            assert error(embedding(index, weight), reference(weight)[index].double()) <= 1e-6


@pytest.mark.parametrize("form", EVERY)
def test_words_of_other_formats(form):
    weight = made(form, 24, 256)
    assert error(weight.dequantize(), meaning(weight)) <= 1e-6
    index = torch.tensor([[3, 23], [0, 3]])
    assert error(embedding(index, weight), meaning(weight)[index]) <= 1e-6
    if form == ACT_ORDER:
        assert weight.order is not None


@pytest.mark.parametrize(
    "kind", ["int4", "int8", "uint8", "float8", "nf4", "int3", "int5", "nvfp4", "mxfp4", "codebook4"]
)
def test_embedding(kind):
    table = QTensor.quantize(torch.randn(40, 256).to(HALF), kind)
    rows = reference(table, HALF)
    for dtype in (torch.int32, torch.int64):
        index = torch.randint(0, 40, (2, 3), dtype=dtype)
        for _ in range(2):
            found = F.embedding(index, table, padding_idx=1)
            assert found.dtype == HALF
            assert error(found, rows[index.long()].double()) <= 5e-4 / (1 if table.affine else 1e6)
            if layout.fits(table):
                table.pack(layout.EXEC)
    assert F.embedding(torch.empty(0, 3, dtype=torch.int64), table).shape == (0, 3, 256)
    for wrong in (40, -1):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([0, wrong]), table)


def test_an_embedding_whose_adapter_is_trained(only_kernels):
    table = QTensor.quantize(torch.randn(10, 64), "int4", low_rank=2)
    table.set_lowrank(table.up.detach().requires_grad_(), table.down.detach().requires_grad_())
    index = torch.tensor([1, 1, 4])
    embedding(index, table).sum().backward()
    assert table.up.grad[[1, 4]].abs().sum() > 0
    assert not table.up.grad[[0, 2, 3]].any()
    before = table.down.grad.clone()
    table.dequantize().sum().backward()
    assert (table.down.grad - before).abs().sum() > 0


CONVOLUTIONS = {
    "conv1d": (F.conv1d, (2, 16, 19), (24, 16, 3), {"padding": 1}),
    "conv2d": (F.conv2d, (2, 16, 7, 6), (24, 16, 3, 3), {"stride": 2, "padding": (1, 0)}),
    "unbatched": (F.conv2d, (16, 7, 6), (24, 16, 3, 3), {"padding": "valid"}),
    "same": (F.conv2d, (2, 16, 7, 6), (24, 16, 4, 3), {"padding": "same", "dilation": (1, 2)}),
    "in groups": (F.conv2d, (2, 16, 7, 6), (24, 4, 3, 3), {"groups": 4, "padding": 1}),
    "depthwise": (F.conv2d, (2, 24, 7, 6), (24, 1, 3, 3), {"groups": 24}),
    "conv3d": (F.conv3d, (1, 8, 4, 5, 6), (12, 8, 3, 3, 3), {"padding": 1}),
    "transposed 1d": (F.conv_transpose1d, (2, 24, 5), (24, 16, 3), {"stride": 3}),
    "transposed": (F.conv_transpose2d, (2, 24, 5, 4), (24, 16, 3, 3), {"stride": 2, "output_padding": 1, "padding": 1}),
    "transposed in groups": (F.conv_transpose2d, (24, 5, 4), (24, 4, 3, 3), {"groups": 3, "dilation": 2}),
    "transposed 3d": (F.conv_transpose3d, (1, 8, 2, 3, 2), (8, 8, 2, 2, 2), {"stride": 2}),
}


@pytest.mark.parametrize("parts", [1, 3, 7])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_its_gradient(name, parts, monkeypatch):
    """In parts, too: some groups of channels, or a part of one group's."""
    function, x_shape, w_shape, how = CONVOLUTIONS[name]
    monkeypatch.setattr(convolution, "SCRATCH_BYTES", 4 * torch.Size(w_shape).numel() // parts)
    kind, extra = random.choice(
        [("int4", {}), ("int8", {}), ("float8", {}), ("int4", {"column_scale": "mean"}), ("nf4", {})]
    )
    weight = QTensor.quantize(torch.randn(w_shape), kind, axis=0, **extra)
    wide = reference(weight).double()
    channels = w_shape[1] * how.get("groups", 1) if "transpose" in function.__name__ else w_shape[0]
    x, bias = torch.randn(x_shape), torch.randn(channels)
    exact = x.double().requires_grad_(), bias.double().requires_grad_()
    want = function(exact[0], wide, exact[1], **how)
    assert error(function(x, weight, bias, **how), want.detach()) <= 1e-6
    ours = x.requires_grad_(), bias.requires_grad_()
    got = function(ours[0], weight, ours[1], **how)
    dy = torch.randn_like(got)
    got.mul_(1).backward(dy)
    want.backward(dy.double())
    for one, other in zip(ours, exact):
        assert error(one.grad, other.grad) <= 1e-6, kind


def test_a_backward_keeps_codes_instead_of_values():
    weight, x = (
        QTensor.quantize(torch.randn(24, 16, 3, 3), "int4", axis=0),
        torch.randn(1, 16, 6, 6, requires_grad=True),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = F.conv2d(x, weight)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in weight.inner_tensors().values()}
    grad = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    wide = reference(weight)
    want = torch.autograd.grad(F.conv2d(x, wide).square().sum(), x, create_graph=True)[0]
    assert error(grad, want) <= 1e-5
    second, wanted = (torch.autograd.grad(one.square().sum(), x)[0] for one in (grad, want))
    assert error(second, wanted) <= 1e-5
    out = F.conv2d(x, weight)
    weight._storage.parts["scale"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("scratch", [2**30, 100])
def test_wrong_arguments_of_convolutions_are_those_of_torch(scratch, monkeypatch):
    monkeypatch.setattr(convolution, "SCRATCH_BYTES", scratch)
    weight, x = QTensor.quantize(torch.randn(8, 4, 3, 3), "int8"), torch.randn(1, 8, 6, 6)
    wide = reference(weight)
    for args, how in (
        ((torch.ones(9),), {"groups": 2}), ((torch.ones(1),), {"groups": 2}), ((), {}), ((), {"groups": 3}),
        ((), {"groups": 0}), ((torch.ones(8, dtype=HALF),), {"groups": 2}), ((None, 1, 1, 1, 2, 5), {}),
        ((None, 1), {"stride": 2}), ((), {"groups": 2, "size": 3}), ((), {"padding": "some"}),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError, ValueError)) as wanted:
            F.conv2d(x, wide, *args, **how)
        with pytest.raises(wanted.type) as found:
            F.conv2d(x, weight, *args, **how)
        assert str(found.value).splitlines()[0].replace("QTensor", "Tensor") == str(wanted.value).splitlines()[0]


def test_autocast_and_float64():
    weight, x = QTensor.quantize(torch.randn(8, 4, 3, 3), "int8"), torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", dtype=HALF):
        assert F.conv2d(x, weight).dtype == HALF
        assert F.conv2d(x.double(), weight).dtype == torch.float64
    table = QTensor.quantize(torch.randn(8, 128), "int4", low_rank=3, rotation=64)
    with torch.autocast("cpu", dtype=HALF):
        assert error(embedding(torch.arange(8), table), reference(table).double()) <= 1e-6


@pytest.mark.parametrize("part", [2**29, 8 * 64 * 5])
def test_products_in_float64(part, monkeypatch):
    monkeypatch.setattr(paths, "SCRATCH_BYTES", part)
    for weight in (
        QTensor.quantize(torch.randn(24, 64), "nf4"),
        QTensor.quantize(torch.randn(24, 64), "int4", scale_bits=6),
    ):
        x, bias, wide = torch.randn(3, 64, dtype=torch.float64), torch.randn(24).double(), reference(weight).double()
        assert registry.choose(registry.problem_of(weight, x.dtype, 3)).implementation.name == "triton-dequantize"
        leaf = x.clone().requires_grad_()
        out = requanto.linear.linear(leaf, weight, bias)
        assert error(out, x @ wide.T + bias) <= 1e-7  # of affine weights, values differ in the last bit of float32
        out.sum().backward()
        assert error(leaf.grad, wide.sum(0).expand(3, -1)) <= 1e-6
        assert error(requanto.linear.linear(x, weight), x @ wide.T) <= 1e-7


def test_operators_that_read_values(caplog):
    weight = QTensor.quantize(torch.randn(8, 64), "int5")
    assert torch.equal(weight * 2, weight.dequantize() * 2)
    assert "reads the values of a quantized weight" in caplog.text
    assert requanto.linear.reference.run(torch.randn(2, 64).double(), weight, None).dtype == torch.float64
