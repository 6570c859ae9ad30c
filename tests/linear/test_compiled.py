"""Kernels that torch.compile makes on request. They need a C++ compiler, and half a minute where torch's cache is empty."""

import os
import shutil
import threading

import pytest
import torch

from requanto import QTensor
from requanto.linear import int4, linear
from requanto.linear.explain import explain
from requanto.linear.prepare import prepare
from requanto.settings import settings

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither CXX, g++ nor clang++ is here")
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setattr(settings, "compiled", True)


def quantized(kind: str, out_features: int, in_features: int, **how: object) -> torch.nn.Linear:
    module = torch.nn.Linear(in_features, out_features, bias=True)
    module.weight = torch.nn.Parameter(QTensor.quantize(torch.randn(out_features, in_features), kind, **how), False)
    return module


def check(module: torch.nn.Linear, rows: int, dtype: torch.dtype, path: str) -> None:
    """Against float64 of the same codes; the path is the one asked for, the codes come back."""
    module.bias = torch.nn.Parameter(module.bias.to(dtype), False)
    stored = module.weight.qdata.view(torch.uint8).clone()
    weight = module.weight.dequantize(torch.float32).double()
    prepare(module, smallest=0)
    assert explain(module, rows=(rows,), dtype=dtype)[0].implementation == path
    x = torch.randn(rows, module.in_features).to(dtype)
    with torch.inference_mode():
        got = module(x)
    want = x.double() @ weight.t() + module.bias.double()
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= LIMITS[dtype] * want.norm()
    assert torch.equal(module.weight.qdata.view(torch.uint8), stored)


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_float8(rows):
    check(quantized("float8", 300, 208), rows, torch.bfloat16, "cpu-compiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float8_in_other_dtypes(dtype):
    """In bfloat16 only are many rows as exact as they should be."""
    check(quantized("float8", 96, 77), 2, dtype, "cpu-compiled")
    check(quantized("float8", 96, 77), 40, dtype, "cpu-workspace")


def test_every_float8_number():
    """Both halves of a word, both bytes of a half; NaN apart, which the codes of a weight never are."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([codes.roll(shift) for shift in range(4)])
    weight = QTensor.quantize(torch.randn(4, 256), "float8")
    weight.qdata, weight.scale = codes.view(torch.float8_e4m3fn), torch.ones(4, 1)
    numbers = codes.view(torch.float8_e4m3fn).float().nan_to_num(0)
    weight.qdata = numbers.to(torch.float8_e4m3fn)
    got = linear(torch.eye(256, dtype=torch.bfloat16), weight)
    assert torch.equal(got.float(), numbers.t())


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("kind", ["int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nibbles(kind, dtype, symmetric):
    check(quantized(kind, 320, 192, group_size=64, symmetric=symmetric), 40, dtype, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (64, 192), (128, 128), (1024, 128)])
def test_one_block_or_a_few(out_features, in_features):
    check(quantized("int4", out_features, in_features, group_size=64), 33, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_in_parts_as_whole(monkeypatch):
    module = quantized("int4", 640, 128, group_size=64)
    prepare(module, smallest=0)
    x = torch.randn(40, 128).bfloat16()
    with torch.no_grad():
        whole = linear(x, module.weight)
        monkeypatch.setattr(settings, "workspace_bytes", 2 * 128 * 64 * 2 * 3)
        assert torch.equal(linear(x, module.weight), whole)


def test_shapes_share_a_kernel():
    """A model has many shapes, and each kernel takes seconds to make."""
    check(quantized("float8", 300, 208), 40, torch.bfloat16, "cpu-compiled")
    counters = torch._dynamo.utils.counters["stats"]
    made = counters["unique_graphs"]
    for out_features, in_features in ((96, 64), (500, 128), (70, 1024)):
        check(quantized("float8", out_features, in_features), 40, torch.bfloat16, "cpu-compiled")
    assert counters["unique_graphs"] == made


@pytest.mark.parametrize("kind", ["float8", "int4"])
def test_threads_agree_with_one_thread(kind):
    module = quantized(kind, 256, 256)
    prepare(module, smallest=0)
    inputs = [torch.randn(rows, 256).bfloat16() for rows in (1, 40, 50, 2)]
    with torch.no_grad():
        want = [linear(x, module.weight) for x in inputs]
    got: list[list[torch.Tensor]] = [[] for _ in range(4)]

    def work(thread: int) -> None:
        with torch.no_grad():
            got[thread] = [linear(x, module.weight) for x in inputs]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs in got:
        assert len(outs) == len(inputs)
        assert all(torch.equal(out, right) for out, right in zip(outs, want))


def test_never_unasked(monkeypatch):
    monkeypatch.setattr(settings, "compiled", False)
    module = quantized("float8", 96, 64)
    assert {choice.implementation for choice in explain(module, rows=(1, 40), dtype=torch.bfloat16)} == {
        "cpu-workspace"
    }
