"""Kernels that torch.compile makes on request. They need a C++ compiler, and half a minute where torch's cache is empty."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from requanto import QTensor
from requanto.linear import blocked, compiled, int4, linear
from requanto.linear.explain import explain
from requanto.linear.prepare import prepare
from requanto.settings import settings

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: neither CXX, g++ nor clang++ is here"),
    pytest.mark.skipif(not blocked.works(), reason="oneDNN's order of bfloat16 weights is another one here"),
]
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
@pytest.mark.parametrize(("out_features", "in_features"), [(320, 192), (64, 64), (64, 128), (128, 64), (704, 1024)])
def test_float8(rows, out_features, in_features):
    check(quantized("float8", out_features, in_features), rows, torch.bfloat16, "cpu-compiled-float8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float8_in_other_dtypes(dtype):
    """In bfloat16 only are many rows as exact as they should be."""
    check(quantized("float8", 128, 64), 2, dtype, "cpu-compiled-float8")
    check(quantized("float8", 128, 64), 40, dtype, "cpu-workspace")


@pytest.mark.parametrize(("out_features", "in_features"), [(300, 192), (320, 208)])
def test_float8_that_is_no_whole_blocks(out_features, in_features):
    check(quantized("float8", out_features, in_features), 40, torch.bfloat16, "cpu-workspace")


def test_every_float8_number():
    """At every place of a block and of a pair; NaN apart, which the codes of a weight never are."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([codes.roll(shift) for shift in range(64)])
    module = quantized("float8", 64, 256)
    numbers = codes.view(torch.float8_e4m3fn).float().nan_to_num(0)
    module.weight.qdata, module.weight.scale = numbers.to(torch.float8_e4m3fn), torch.ones(64, 1)
    prepare(module, smallest=0)
    with torch.no_grad():
        got = linear(torch.eye(256, dtype=torch.bfloat16), module.weight)
        row = linear(torch.eye(256)[77:78], module.weight)
    assert torch.equal(got.float(), numbers.t())
    assert torch.equal(row, numbers.t()[77:78])


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("kind", ["int4", "int3", "int2", "uint4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_nibbles(kind, symmetric, group_size):
    how = {} if kind == "uint4" else {"symmetric": symmetric}
    check(quantized(kind, 320, 384, group_size=group_size, **how), 70, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nibbles_in_other_dtypes(dtype):
    check(quantized("int4", 320, 192, group_size=64), 70, dtype, "cpu-workspace")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_where_a_kernel_s_call_pays():
    """A small weight costs less than the call: torch's operator serves it up to 64 rows, large ones up to 23."""
    for shape, rows, path in (
        ((2048, 2048), 23, "cpu-int4pack"),
        ((2048, 2048), 24, "cpu-compiled-int4"),
        ((1024, 2048), 64, "cpu-int4pack"),
        ((1024, 2048), 65, "cpu-compiled-int4"),
    ):
        module = quantized("int4", *shape, group_size=64)
        prepare(module)
        assert explain(module, rows=(rows,), dtype=torch.bfloat16)[0].implementation == path


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_equal_weights():
    """A group of equal weights has a scale beside which its shift would be rounded away."""
    module = torch.nn.Linear(128, 64)
    weight = torch.randn(64, 128)
    weight[:32, :64], weight[5, 64:] = 1000.25, 0
    module.weight = torch.nn.Parameter(QTensor.quantize(weight, "int4", group_size=64, symmetric=False), False)
    check(module, 70, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (64, 192), (128, 128), (1024, 128)])
def test_one_block_or_a_few(out_features, in_features):
    check(quantized("int4", out_features, in_features, group_size=64), 65, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("kind", ["int4", "float8"])
def test_in_parts_as_whole(kind, monkeypatch):
    module = quantized(kind, 640, 128)
    prepare(module, smallest=0)
    x = torch.randn(70, 128).bfloat16()
    with torch.no_grad():
        whole = linear(x, module.weight)
        # four blocks of rows at a time, of ten: the last part begins in the one before
        monkeypatch.setattr(settings, "workspace_bytes", 8 * 4 * 64 * 128 * 2)
        assert blocked.starts(640, blocked.rows_at_once(640, 128)) == [0, 256, 384]
        assert torch.equal(linear(x, module.weight), whole)
        monkeypatch.setattr(settings, "workspace_bytes", 1000)
        assert torch.equal(linear(x, module.weight), whole)


def test_shapes_share_a_kernel():
    """A model has many shapes, and each kernel takes seconds to make."""
    check(quantized("float8", 320, 192), 40, torch.bfloat16, "cpu-compiled-float8")
    counters = torch._dynamo.utils.counters["stats"]
    made = counters["unique_graphs"]
    for out_features, in_features in ((128, 64), (512, 128), (192, 1024)):
        check(quantized("float8", out_features, in_features), 40, torch.bfloat16, "cpu-compiled-float8")
    assert counters["unique_graphs"] == made


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_another_order_than_the_known_one(monkeypatch):
    """On a machine whose oneDNN stores weights differently, the eager way gives the same."""
    monkeypatch.setattr(blocked, "works", lambda: False)
    check(quantized("int4", 320, 192, group_size=64), 70, torch.bfloat16, "cpu-compiled-int4")
    check(quantized("float8", 320, 192), 40, torch.bfloat16, "cpu-workspace")


def test_set_after_the_first_product(monkeypatch):
    """float8 has no packed form but for compiled kernels: the setting is looked at again."""
    module = quantized("float8", 1024, 1024)
    x = torch.randn(3, 1024).bfloat16()
    with torch.no_grad():
        monkeypatch.setattr(settings, "compiled", False)
        eager = linear(x, module.weight)
        assert module.weight.packed is None
        monkeypatch.setattr(settings, "compiled", True)
        got = linear(x, module.weight)
        assert module.weight.packed is not None
        monkeypatch.setattr(settings, "compiled", False)
        assert torch.equal(linear(x, module.weight), eager)
    assert (got.float() - eager.float()).norm() <= 1e-2 * eager.float().norm()


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch):
    """A cache from another processor did that: half of the numbers were not written."""
    monkeypatch.setattr(compiled, "_made", set())
    monkeypatch.setattr(compiled, "_kernel", lambda *key: lambda codes, scale, words: words[..., :32].zero_())
    module = quantized("float8", 64, 64)
    prepare(module, smallest=0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="computes something else than its source"):
        linear(torch.randn(5, 64).bfloat16(), module.weight)


WIDTHS = """
import torch
from requanto.linear import compiled
codes = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
scale, words = torch.rand(128), torch.empty(2, 32, 64, dtype=torch.int32)
compiled.e4m3_words(codes, scale * 2.0**120, words)
want = codes.view(torch.float8_e4m3fn).float() * scale.view(2, 1, 64)
got = words.view(torch.bfloat16).view(2, 32, 64, 2).transpose(2, 3).reshape(2, 64, 64).float()
known = torch.isfinite(want)
assert ((got - want).abs() <= 2**-8 * want.abs())[known].all()
"""


def test_one_cache_for_two_widths_of_vectors(tmp_path):
    """torch does not key its cache of kernels by ATEN_CPU_CAPABILITY."""
    for capability in ("avx512", "avx2"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", WIDTHS], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["float8", "int4"])
def test_threads_agree_with_one_thread(kind):
    module = quantized(kind, 256, 256)
    prepare(module, smallest=0)
    inputs = [torch.randn(rows, 256).bfloat16() for rows in (1, 70, 90, 2)]
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
    module = quantized("float8", 128, 64)
    assert {choice.implementation for choice in explain(module, rows=(1, 40), dtype=torch.bfloat16)} == {
        "cpu-workspace"
    }
