"""Kernels of torch's compiler. They need a C++ compiler, and 20 s each where none is kept (tests/conftest.py)."""

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from made_weights import made

from requanto import QTensor
from requanto.dtypes.qtypes import qint8
from requanto.linear import linear
from requanto.linear.activations import quantize_unsigned
from requanto.linear.cpu import fused_dequantize, int4, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache, calls, processes
from requanto.linear.cpu.aot.processes import make
from requanto.linear.cpu.aot.trust import intact, write
from requanto.linear.explain import explain
from requanto.linear.prepack import prepare
from requanto.linear.registry import choose, problem_of
from requanto.runtime.settings import parse_compiled, registry_state, settings

pytestmark = [
    pytest.mark.skipif(cache.compiler() is None, reason="no C++ compiler: neither CXX nor torch's usual one is here"),
    pytest.mark.skipif(not onednn_bf16.works(), reason="oneDNN's order of bfloat16 weights is another one here"),
]
KEPT = os.environ["REQUANTO_CACHE"]
LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setattr(settings, "compiled", True)


def quantized(kind: str, out_features: int, in_features: int, **how: object) -> torch.nn.Linear:
    module = torch.nn.Linear(in_features, out_features, bias=True)
    values = torch.randn(out_features, in_features)
    if kind == "int8":  # packed in 16 bits only
        values = values.bfloat16()
    module.weight = torch.nn.Parameter(QTensor.quantize(values, kind, **how), False)
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
    check(quantized("float8", 128, 64), 40, dtype, "cpu-dequantize")


@pytest.mark.parametrize(("out_features", "in_features"), [(100, 192), (320, 208)])
def test_float8_that_is_no_whole_blocks(out_features, in_features):
    check(quantized("float8", out_features, in_features), 40, torch.bfloat16, "cpu-dequantize")


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
    check(quantized(kind, 320, 384, group_size=group_size, **how), 90, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("rows", [1, 90])
@pytest.mark.parametrize("shape", [(320, 384), (300, 960), (4096, 2048)])
def test_nibbles_with_scales_in_blocks(rows, shape):
    """In several parts where the weight is large."""
    module = torch.nn.Linear(shape[1], shape[0])
    weight = made("qint4 {} group=32 affine scales=6 signed block=64", *shape, dtype=torch.bfloat16)
    module.weight = torch.nn.Parameter(weight, False)
    check(module, rows, torch.bfloat16, "cpu-int4pack" if rows == 1 else "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nibbles_in_other_dtypes(dtype, rows):
    """For them torch has no vector kernel: one row takes three times as long as dequantizing, 64 rows 45 times."""
    check(quantized("int4", 320, 192, group_size=64), rows, dtype, "cpu-dequantize")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_where_a_kernel_s_call_pays():
    """A small weight costs less than the calls: torch's operator serves it with more rows than a large one."""
    for shape, rows, path in (
        ((2048, 2048), 8, "cpu-int4pack"),
        ((2048, 2048), 9, "cpu-compiled-int4"),
        ((512, 1024), 13, "cpu-int4pack"),
        ((512, 1024), 14, "cpu-compiled-int4"),
        ((256, 384), 38, "cpu-int4pack"),
        ((256, 384), 39, "cpu-compiled-int4"),
    ):
        check(quantized("int4", *shape, group_size=64), rows, torch.bfloat16, path)


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_form_of_the_scales_at_a_time(symmetric):
    """torch's operator and the kernel want them in different orders; whichever is asked for, it is right and alone."""
    module = quantized("int4", 256, 256, group_size=64, symmetric=symmetric)
    prepare(module, smallest=0)
    weight, few, many = module.weight, torch.randn(1, 256).bfloat16(), torch.randn(200, 256).bfloat16()
    with torch.no_grad():
        first = linear(few, module.weight), linear(many, module.weight)
        size = weight.nbytes
        for _ in range(2):
            assert torch.equal(linear(few, module.weight), first[0])
            assert weight.nbytes == size
            assert torch.equal(linear(many, module.weight), first[1])
            assert weight.nbytes == size
    assert weight._storage.derived["int4 scales"].nbytes == 256 * 4 * 4


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize(("out_features", "in_features"), [(320, 192), (64, 64), (64, 128), (128, 64), (704, 1024)])
def test_int8(rows, out_features, in_features):
    check(quantized("int8", out_features, in_features), rows, torch.bfloat16, "cpu-compiled-int8")


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
def test_where_int8_takes_which_path():
    half, bfloat16 = torch.float16, torch.bfloat16
    for shape, rows, dtype, path in (
        ((128, 64), 1, half, "cpu-compiled-int8"),
        ((128, 64), 40, half, "cpu-onednn-split"),
        ((1024, 2112), 1, half, "cpu-compiled-int8"),
        ((1024, 2112), 2, half, "cpu-onednn-split"),
        ((2048, 4096), 1, bfloat16, "cpu-compiled-int8"),
        ((2048, 4096), 2, bfloat16, "cpu-onednn-split"),
        ((1984, 4096), 2, bfloat16, "cpu-compiled-int8"),
        ((2048, 4160), 256, bfloat16, "cpu-onednn-split"),
        ((2048, 4160), 257, bfloat16, "cpu-compiled-int8"),
        ((300, 192), 40, bfloat16, "cpu-compiled-int8"),
        ((100, 192), 40, bfloat16, "cpu-onednn-split"),
        ((320, 208), 1, bfloat16, "cpu-onednn-split"),
    ):
        check(quantized("int8", *shape), rows, dtype, path)


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
def test_every_int8_number():
    """At every place of a block, a word and a pair."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    module = quantized("int8", 64, 256)
    module.weight.qdata = torch.stack([codes.roll(shift) for shift in range(64)])
    module.weight.scale = torch.ones(64, 1)
    numbers = module.weight.qdata.float()
    prepare(module, smallest=0)
    with torch.no_grad():
        assert torch.equal(linear(torch.eye(256).bfloat16(), module.weight).float(), numbers.t())
        assert torch.equal(linear(torch.eye(256)[77:78].bfloat16(), module.weight).float(), numbers.t()[77:78])


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize("bias", [True, False])
def test_one_row_of_int8_activations(dtype, scale, bias):
    """The same codes as with more rows, whose products are sums of integers."""
    module = quantized("int8", 320, 192)
    prepare(module, smallest=0)
    x = torch.randn(1, 192).to(dtype)
    how = {"activation": qint8, "input_scale": None if scale is None else torch.tensor(scale)}
    offset = torch.randn(320).to(dtype) if bias else None
    static = scale is not None
    path = "cpu-compiled-int8-int8" if dtype == torch.bfloat16 and not static else "cpu-onednn-int8"
    assert choose(problem_of(module.weight, dtype, 1, qint8, static=static)).implementation.name == path
    with torch.no_grad():
        got = linear(x, module.weight, offset, **how)
        several = linear(x.expand(3, -1), module.weight, offset, **how)[:1]
    step = x.double().abs().amax() / 127 if scale is None else torch.tensor(scale).double()
    codes = (x.double() / step).round().clamp(-128, 127)
    want = step * codes @ module.weight.dequantize(torch.float32).double().t()
    want = want if offset is None else want + offset.double()
    assert got.dtype == dtype
    limit = LIMITS[dtype] if dtype != torch.float32 else 1e-5
    assert (got.double() - want).norm() <= limit * want.norm()
    assert (got.double() - several.double()).norm() <= limit * want.norm()


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("length", [16, 33, 576])
def test_rows_to_int8(rows, length):
    """The codes are those of the operators, bit for bit."""
    x = torch.randn(rows, length).bfloat16()
    x[-1] = 0
    codes, steps = torch.empty(rows, length, dtype=torch.uint8), torch.empty(rows, 1)
    calls.rows_to_int8(x, codes, steps)
    want, own = quantize_unsigned(x, qint8, None)
    assert torch.equal(codes, want)
    assert torch.equal(steps, own)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("length", [16, 33, 576])
def test_sums_are_finished_with_one_rounding(rows, length):
    sums, steps, bias = torch.randn(rows, length) * 1e6, torch.rand(rows, 1), torch.randn(length) * 1e5
    out = torch.empty(rows, length, dtype=torch.bfloat16)
    calls.finish(sums, steps, bias, out)
    want = sums.double() * steps.double() + bias.double()
    assert ((out.double() - want).abs() <= 2**-8 * want.abs() + 1e-2).all()


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
@pytest.mark.parametrize("activation", [None, qint8])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0])
def test_a_row_of_numbers_that_are_none(activation, number):
    module = quantized("int8", 128, 64)
    prepare(module, smallest=0)
    x = torch.randn(1, 64).bfloat16()
    x[:] = 0 if number == 0 else x
    x[0, 5] = number
    with torch.no_grad():
        got = linear(x, module.weight, activation=activation)
    assert bool((got == 0).all()) if number == 0 else not bool(torch.isfinite(got).any())


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
def test_int8_in_another_order_than_the_known_one(monkeypatch):
    """oneDNN's own product reads whatever oneDNN stores."""
    monkeypatch.setattr(onednn_int8, "_probed", lambda rows, length: None)
    for activation in (None, qint8):
        for rows in (1, 40):
            module = quantized("int8", 320, 192)
            stored = module.weight.qdata.clone()
            prepare(module, smallest=0)
            assert module.weight.layout_name.startswith("onednn-int8-")  # a name that other machines do not know
            assert torch.equal(module.weight.qdata, stored)
            assert torch.equal(module.weight.clone().qdata, stored)
            x = torch.randn(rows, 192).bfloat16()
            with torch.no_grad():
                got = linear(x, module.weight, activation=activation)
            want = x.double() @ module.weight.dequantize(torch.float32).double().t()
            assert (got.double() - want).norm() <= 2e-2 * want.norm()


@pytest.mark.skipif(not onednn_int8.works(), reason="oneDNN's int8 product is not exact here")
def test_small_int8_weights_are_packed_for_kernels_only(monkeypatch):
    x = torch.randn(3, 256).bfloat16()
    for compiled_too, layout in ((True, onednn_int8.BLOCKED.name), (False, "plain")):
        monkeypatch.setattr(settings, "compiled", compiled_too)
        module = quantized("int8", 320, 256)
        with torch.no_grad():
            linear(x, module.weight)
        assert module.weight.layout_name == layout


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_equal_weights():
    """A group of equal weights has a scale beside which its shift would be rounded away."""
    module = torch.nn.Linear(128, 64)
    weight = torch.randn(64, 128)
    weight[:32, :64], weight[5, 64:] = 1000.25, 0
    module.weight = torch.nn.Parameter(QTensor.quantize(weight, "int4", group_size=64, symmetric=False), False)
    check(module, 1200, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 128), (64, 192), (128, 128), (1024, 128)])
def test_one_block_or_a_few(out_features, in_features):
    check(quantized("int4", out_features, in_features, group_size=64), 1200, torch.bfloat16, "cpu-compiled-int4")


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
@pytest.mark.parametrize("kind", ["int4", "float8", "int8"])
def test_in_parts_as_whole(kind, monkeypatch):
    module = quantized(kind, 640, 128)
    prepare(module, smallest=0)
    x = torch.randn(150, 128).bfloat16()
    with torch.no_grad():
        whole = linear(x, module.weight)
        # four blocks of rows at a time, of ten: the last part begins in the one before
        monkeypatch.setattr(settings, "workspace_bytes", 8 * 4 * 64 * 128 * 2)
        assert onednn_bf16.first_rows(640, onednn_bf16.rows_at_once(640, 128)) == [0, 256, 384]
        assert torch.equal(linear(x, module.weight), whole)
        monkeypatch.setattr(onednn_bf16, "MAX_CAT_NUMEL", 0)
        assert torch.equal(linear(x, module.weight), whole)
        monkeypatch.setattr(settings, "workspace_bytes", 1000)
        assert torch.equal(linear(x, module.weight), whole)


def test_shapes_share_a_kernel():
    """A model has many shapes, and each kernel takes 20 s to make."""
    check(quantized("float8", 320, 192), 40, torch.bfloat16, "cpu-compiled-float8")
    made = set(cache._loaded)
    for out_features, in_features in ((128, 64), (512, 128), (192, 1024)):
        check(quantized("float8", out_features, in_features), 40, torch.bfloat16, "cpu-compiled-float8")
    assert set(cache._loaded) == made


@pytest.mark.skipif(not int4.works(), reason="this processor has no packed form of int4")
def test_another_order_than_the_known_one(monkeypatch):
    """On a machine whose oneDNN stores weights differently, the eager way gives the same."""
    monkeypatch.setattr(onednn_bf16, "works", lambda: False)
    check(quantized("int4", 320, 192, group_size=64), 70, torch.bfloat16, "cpu-dequantize")
    check(quantized("float8", 320, 192), 40, torch.bfloat16, "cpu-dequantize")


def test_set_after_the_first_product(monkeypatch):
    """float8 has no packed form but for compiled kernels: the setting is looked at again."""
    module = quantized("float8", 1024, 1024)
    x = torch.randn(3, 1024).bfloat16()
    with torch.no_grad():
        monkeypatch.setattr(settings, "compiled", False)
        eager = linear(x, module.weight)
        assert not module.weight.is_packed
        monkeypatch.setattr(settings, "compiled", True)
        got = linear(x, module.weight)
        assert module.weight.is_packed
        monkeypatch.setattr(settings, "compiled", False)
        assert torch.equal(linear(x, module.weight), eager)
    assert (got.float() - eager.float()).norm() <= 1e-2 * eager.float().norm()


def test_a_row_that_needs_a_gradient():
    module = quantized("float8", 128, 64)
    x = torch.randn(1, 64, dtype=torch.bfloat16, requires_grad=True)
    prepare(module, smallest=0)
    linear(x, module.weight).sum().backward()
    want = module.weight.dequantize(torch.float32).sum(0)
    assert (x.grad.float() - want).norm() <= 1e-2 * want.norm()


class _Half:
    """A kernel of another processor: half of the numbers are not written."""

    def __init__(self, name, path):
        del name, path

    def __call__(self, codes, scale, words):
        words[..., :32].zero_()


@pytest.fixture
def nothing_loaded(monkeypatch, tmp_path):
    """A process that has loaded nothing, and a machine that keeps nothing."""
    monkeypatch.setattr(cache, "_loaded", {})
    monkeypatch.setattr(cache, "_failed", {})
    monkeypatch.setattr(cache, "_building", {})
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "kept"))
    for found in (cache._can_be_made, cache._all_cached, cache._log_missing_compiler):
        found.cache_clear()
    yield tmp_path / "kept"
    for found in (cache._can_be_made, cache._all_cached, cache._log_missing_compiler):
        found.cache_clear()


def copy_kept(paths: dict[str, Path]) -> None:
    """In place of `cache._make`: the packages that these tests keep, made there if need be."""
    usual = {name: Path(KEPT).absolute() / path.name for name, path in paths.items()}
    make({name: path for name, path in usual.items() if not intact(path)})
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, usual[name].read_bytes())


def as_unasked(monkeypatch, caplog, why: str) -> None:
    """Nobody has asked for compiled kernels, and they cannot be had: eager operators, and one line that says why."""
    monkeypatch.setattr(settings, "compiled", None)
    module = quantized("float8", 1024, 1024)
    x = torch.randn(3, 1024).bfloat16()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="requanto"):
        got = [linear(x, module.weight) for _ in range(2)]
    assert not module.weight.is_packed
    assert explain(module, rows=(3,), dtype=torch.bfloat16)[0].implementation == "cpu-dequantize"
    monkeypatch.setattr(settings, "compiled", False)
    with torch.no_grad():
        want = linear(x, module.weight)
    assert all(torch.equal(out, want) for out in got)
    assert len([record for record in caplog.records if why in record.getMessage()]) == 1


def test_a_kernel_that_computes_something_else_is_refused(nothing_loaded, monkeypatch, caplog):
    monkeypatch.setattr(cache, "Kernel", _Half)
    monkeypatch.setattr(cache, "_make", lambda paths: None)
    monkeypatch.setattr(cache, "intact", lambda path: True)
    # Kernels for the stored form would be refused as well, in a line of their own.
    monkeypatch.setattr(fused_dequantize, "SMALLEST", 2**30)
    module = quantized("float8", 64, 64)
    with pytest.raises(cache.KernelUnavailable, match="computes other values than its source"):
        prepare(module, smallest=0)
    as_unasked(monkeypatch, caplog, "computes other values than its source")


def test_without_a_compiler(nothing_loaded, monkeypatch, caplog):
    monkeypatch.setattr(cache, "compiler", lambda: None)
    with pytest.raises(cache.KernelUnavailable, match=r"no C\+\+ compiler for 'e4m3', 'row'"):
        prepare(quantized("float8", 64, 64), smallest=0)
    as_unasked(monkeypatch, caplog, "no C++ compiler was found")


def test_with_a_compiler_that_fails(nothing_loaded, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 1)  # one after the other: after the first no other is tried
    as_unasked(monkeypatch, caplog, "do not use compiled kernels in this process: compiling the kernel")


def test_one_failure_to_compile_is_enough(nothing_loaded, monkeypatch, caplog, tmp_path):
    """Where the compiler does not work no other kernel is tried, until one is asked for and comes off."""
    monkeypatch.setattr(settings, "compiled", None)
    tried = []

    def fails(paths):
        tried.extend(paths)
        raise cache.CannotBeMade("no place to write")

    monkeypatch.setattr(cache, "_make", fails)
    with caplog.at_level(logging.WARNING, logger="requanto"):
        assert not any(calls.ready(family) for family in (calls.STORED_INT8, calls.STORED_INT4, calls.FLOAT8))
    assert tried == ["stored-int8"]
    assert [record.getMessage().count("in this process") for record in caplog.records].count(1) == 1
    assert not cache.wanted(calls.STORED_INT8)

    monkeypatch.setattr(cache, "_make", copy_kept)
    before = registry_state.version
    monkeypatch.setattr(settings, "compiled", True)
    assert calls.ready(calls.STORED_INT8)
    monkeypatch.setattr(settings, "compiled", None)
    assert registry_state.version != before
    assert cache.wanted(calls.STORED_INT8)
    assert calls.ready(calls.STORED_INT4)


def test_a_kernel_s_own_failure_leaves_the_others(nothing_loaded, monkeypatch):
    """The compiler works, one source does not."""
    monkeypatch.setattr(settings, "compiled", None)
    child = [sys.executable, "-c", "raise SystemExit('no such node')"]
    monkeypatch.setattr(
        processes.subprocess,
        "Popen",
        lambda command, popen=subprocess.Popen, **how: popen(child if "-m" in command else command, **how),
    )
    assert not calls.ready(calls.STORED_INT8)
    assert not cache.wanted(calls.STORED_INT8)
    with pytest.raises(cache.KernelUnavailable, match="no such node") as raised:
        cache.make({"stored-int4": cache.path_of("stored-int4", calls.SOURCES["stored-int4"])})
    assert not isinstance(raised.value, cache.CannotBeMade)


def test_another_default_dtype(nothing_loaded, monkeypatch):
    """Numbers that kernels are compared on are float32 whatever a model is being built in."""
    monkeypatch.setenv("REQUANTO_CACHE", KEPT)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for family in ("int4", "float8", "int8", "int8 x int8", "stored int8", "stored int4", "stored float8"):
            assert calls.ready(family)
    finally:
        torch.set_default_dtype(torch.float32)


def test_nowhere_to_keep_them(nothing_loaded, monkeypatch, caplog, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "file" / "kept"))
    with pytest.raises(cache.KernelUnavailable, match="Set REQUANTO_CACHE to a writable directory"):
        prepare(quantized("float8", 64, 64), smallest=0)
    as_unasked(monkeypatch, caplog, "Set REQUANTO_CACHE to a writable directory")


def test_a_file_that_is_no_kernel_is_made_anew(nothing_loaded, monkeypatch):
    made = []

    def take_the_one_of_these_tests(paths):
        made.extend(paths)
        copy_kept(paths)

    monkeypatch.setattr(cache, "_make", take_the_one_of_these_tests)
    broken = cache.path_of("e4m3", calls.SOURCES["e4m3"])
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"PK: cut off")
    check(quantized("float8", 64, 64), 5, torch.bfloat16, "cpu-compiled-float8")
    assert sorted(made) == ["e4m3", "row"]


def test_kept_for_later_processes(tmp_path):
    """One that is there is used; two processes at once make that of another width of vectors once; later ones use it."""
    environment = {**os.environ, "REQUANTO_CACHE": str(tmp_path)}
    path = tmp_path / cache.path_of("e4m3", calls.SOURCES["e4m3"]).name
    copy_kept({"e4m3": path})

    def errors_of(*processes: dict[str, str]) -> list[str]:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", ONE_KERNEL],
                env={**environment, **more},
                stderr=subprocess.PIPE,
                text=True,
            )
            for more in processes
        ]
        errors = [process.communicate()[1] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), "".join(errors)[-2000:]
        return errors

    def packages() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.so")}

    before, avx2 = packages(), {"ATEN_CPU_CAPABILITY": "avx2"}
    assert list(before) == [path.name]
    assert sum("compiling" in errors for errors in errors_of(avx2, avx2)) == 1
    after = packages()
    assert len(after) == 2
    assert after.items() > before.items()
    for more in ({}, avx2):
        (errors,) = errors_of(more)
        assert "compiling" not in errors
        assert "imported the compiler: False" in errors
    assert packages() == after


ONE_KERNEL = """
import sys
import types
import torch
from requanto.linear.cpu.aot import calls
codes = torch.randint(0, 256, (2, 64, 64), dtype=torch.uint8)
scale, words = torch.rand(128), torch.empty(2, 32, 64, dtype=torch.int32)
buffer = types.SimpleNamespace(view=words.view)
calls.fill_e4m3(codes, scale)(buffer, None)
want = codes.view(torch.float8_e4m3fn).float() * scale.view(2, 1, 64)
got = words.view(torch.bfloat16).view(2, 32, 64, 2).transpose(2, 3).reshape(2, 64, 64).float()
known = torch.isfinite(want)
assert ((got - want).abs() <= 2**-8 * want.abs())[known].all()
print("imported the compiler:", "torch._inductor" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["float8", "int4", "int8"])
def test_threads_agree_with_one_thread(kind):
    module = quantized(kind, 256, 256)
    prepare(module, smallest=0)
    inputs = [torch.randn(rows, 256).bfloat16() for rows in (1, 170, 290, 2)]
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


def test_unasked(monkeypatch):
    """Where there is a compiler, they are the usual way."""
    monkeypatch.setattr(settings, "compiled", None)
    check(quantized("float8", 128, 64), 40, torch.bfloat16, "cpu-compiled-float8")


def test_what_the_environment_says():
    assert [parse_compiled(text) for text in ("", "0", "1")] == [None, False, True]
    with pytest.raises(ValueError, match="REQUANTO_COMPILE is 'yes', expected 1"):
        parse_compiled("yes")


def test_forbidden(monkeypatch):
    monkeypatch.setattr(settings, "compiled", False)
    module = quantized("float8", 128, 64)
    assert {choice.implementation for choice in explain(module, rows=(1, 40), dtype=torch.bfloat16)} == {
        "cpu-dequantize"
    }
