"""Convolutions, embeddings and dequantized values on a real GPU. Run by `make gpu-test`."""

import copy

import pytest
import torch
import torch.nn.functional as F

from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import layout
from requanto.tensor.qtensor import QTensor

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
BOUND = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
KINDS = [
    "int8",
    "uint8",
    "int7",
    "int6",
    "int5",
    "int4",
    "int3",
    "int2",
    "uint1",
    "float8",
    "nf4",
    "codebook3",
    "nvfp4",
    "mxfp6",
]


@pytest.fixture(autouse=True)
def kernels():
    torch.manual_seed(0)
    assert rules.available()


def weight(kind, *shape, dtype=torch.bfloat16, **how):
    return QTensor.quantize(torch.randn(shape, device=DEVICE).to(dtype), kind, **how)


def wide(quantized):
    """The weight in float32 by the CPU's operators."""
    return copy.deepcopy(quantized).cpu().dequantize(torch.float32).to(DEVICE)


def error(found, expected):
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_and_embedding(kind, dtype):
    table = weight(kind, 300, 512, dtype=dtype)
    want, index = wide(table), torch.randint(0, 300, (3, 7), device=DEVICE)
    for _ in range(2):
        assert error(table.dequantize(), want) <= BOUND[dtype]
        assert error(F.embedding(index, table), want[index]) <= BOUND[dtype]
        if layout.fits(table):
            table.pack(layout.EXEC)


def test_dequantize_takes_no_memory_but_its_result():
    one = weight("int4", 4096, 4096)
    one.dequantize()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = one.dequantize()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * out.nbytes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("function", "shape", "how"), [
    (F.conv2d, (64, 32, 3, 3), {"padding": 1}), (F.conv2d, (64, 8, 3, 3), {"groups": 4, "stride": 2}),
    (F.conv2d, (64, 32, 4, 4), {"padding": "same"}),
    (F.conv_transpose2d, (32, 48, 3, 3), {"stride": 2, "output_padding": 1}),
])  # fmt: skip
def test_convolutions(function, shape, how, channels_last):
    quantized = weight("int4", *shape, axis=0)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 32, 17, 16, device=DEVICE, dtype=torch.bfloat16).to(memory_format=form).requires_grad_()
    out = function(x, quantized, **how)
    dy = torch.randn_like(out)
    out.backward(dy)
    exact = x.detach().float().requires_grad_()
    want = function(exact, wide(quantized), **how)
    want.backward(dy.float())
    assert error(out, want) <= 1e-2
    assert error(x.grad, exact.grad) <= 1e-2
    with torch.no_grad():
        assert error(function(x, quantized, **how), out) <= 1e-2


def test_a_captured_graph_reads_codes():
    table, kernel = weight("nf4", 100, 64), weight("int8", 16, 1, 3, 3, axis=0)
    index, x = torch.arange(8, device=DEVICE), torch.randn(1, 1, 8, 64, device=DEVICE, dtype=torch.bfloat16)

    def step():
        return F.conv2d(x + F.embedding(index, table), kernel)

    with torch.no_grad():
        want = step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        index.copy_(torch.arange(8, device=DEVICE))
        graph.replay()
        assert error(out, want) <= 1e-2
        index.add_(3)
        graph.replay()
        assert error(out, step()) <= 1e-2
