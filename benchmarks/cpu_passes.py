"""Times the single passes of GEMMs on a CPU: reasons for how `requanto.linear` is written. CPU time, one thread.

    PYTHONPATH=src:kernels python benchmarks/cpu_passes.py              # with compiled kernels: needs a C++ compiler

Time of other processes does not count, so the figures hold on a busy machine too. In ns for each element of x or of a
weight. Writes benchmarks/results/cpu_passes.json.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from common import RESULTS, write

from requanto import QTensor, qint8
from requanto.linear.activations import quantize_unsigned, split_16bit
from requanto.linear.cpu import float8, fused_dequantize, int4, int4_gemm, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache
from requanto.linear.cpu.aot import calls as compiled
from requanto.linear.cpu.dequantize import dequantize_rows
from requanto.linear.cpu.scratch_matmul import scaled_into

ROWS, K, N = 256, 4096, 512
ROUNDS = 40


def timed(calls: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Median ns of CPU time for each of ``count`` elements; the calls alternate."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append(time.thread_time() - start)
    return {name: round(median(times) / count * 1e9, 4) for name, times in taken.items()}


def activations() -> dict[str, float]:
    """Quantizing x, and the operators that it avoids."""
    x = torch.randn(ROWS, K, dtype=torch.bfloat16)
    wide = x.float() * 30
    scale, out = torch.rand(K), torch.empty_like(x)
    return timed(
        {
            "aminmax, bfloat16": lambda: torch.aminmax(x, dim=1),
            "aminmax, float32": lambda: torch.aminmax(wide, dim=1),
            "amin and amax, float32": lambda: (wide.amin(1), wide.amax(1)),
            "float32 to uint8": lambda: wide.to(torch.uint8),
            "float32 to int8": lambda: wide.to(torch.int8),
            "bfloat16 times bfloat16": lambda: x * x,
            "float32 times float32": lambda: wide * wide,
            "bfloat16 times float32 scales": lambda: out.copy_(torch.mul(x, scale)),
            "the same in kept buffers": lambda: scaled_into(out, x, scale),
            "x to int8": lambda: quantize_unsigned(x, qint8, None),
            "x to 16 bits": lambda: split_16bit(x),
        },
        x.numel(),
    )


def _plain_nibbles(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, out: torch.Tensor) -> None:
    """The simple version of `int4_gemm._planes`: one byte at a time, in the result's dtype."""
    count, length, half = blocks.shape
    codes = torch.empty(length, count, 2, half, dtype=torch.int8)
    bytes_ = blocks.transpose(0, 1)
    torch.bitwise_and(bytes_, 15, out=codes[:, :, 0].view(torch.uint8))
    torch.bitwise_right_shift(bytes_, 4, out=codes[:, :, 1].view(torch.uint8))
    out.copy_(codes.sub_(8).view(out.shape))
    groups = out.view(len(scale), -1, out.shape[1])
    torch.addcmul(zero[:, None].to(out.dtype), groups, scale[:, None].to(out.dtype), out=groups)


def weights() -> dict[str, float]:
    """Dequantization into bfloat16, by operators and, into oneDNN's order, by compiled kernels."""
    half, group = int4.rows_per_block() // 2, 64
    count, groups = N // (2 * half), K // group
    blocks = torch.randint(0, 256, (count, K, half), dtype=torch.uint8)
    scale, zero = torch.rand(groups, N), torch.rand(groups, N)
    sides = scale.view(groups, count, 2, half).permute(2, 0, 1, 3).reshape(2, groups, 1, -1).contiguous()
    zeros = torch.rand_like(sides)
    out = torch.empty(K, N, dtype=torch.bfloat16)
    weight = QTensor.quantize(torch.randn(N, K, dtype=torch.bfloat16), "float8")
    rows = torch.empty(N, K, dtype=torch.bfloat16)
    calls = {
        "int4, byte by byte": lambda: _plain_nibbles(blocks, scale, zero, out),
        "int4": lambda: int4_gemm._planes(blocks, sides, zeros, torch.bfloat16),
        "float8": lambda: dequantize_rows(weight, 0, N, rows, scaled=False),
    }
    for kind in ("int8", "int4", "float8"):
        stored = QTensor.quantize(torch.randn(N, K, dtype=torch.bfloat16), kind)
        if fused_dequantize.ready(stored, torch.bfloat16):
            calls[f"{kind}, stored form, compiled"] = lambda stored=stored: fused_dequantize.fill(stored, 0, N, rows)
    if onednn_bf16.fits(N, K):
        if not (compiled.ready(compiled.NIBBLES) and compiled.ready(compiled.FLOAT8)):
            return timed(calls, N * K)
        buffer = onednn_bf16.blocked(N, K)
        pairs = torch.rand(count, groups, 2 * half, 2).bfloat16().view(torch.int32).squeeze(-1)
        bytes_ = float8.LAYOUT.pack(weight._spec, weight._storage.parts)["qdata"]
        own = pairs.view(-1, 1, 2, half)
        nibbles = compiled.fill_nibbles(blocks, groups, lambda weight: own)
        e4m3 = compiled.fill_e4m3(bytes_, torch.rand(N))
        calls["int4, compiled"] = lambda: nibbles(buffer, weight)
        calls["float8, compiled"] = lambda: e4m3(buffer, weight)
    return timed(calls, N * K)


def gemms() -> dict[str, float]:
    """An int8 GEMM with few rows, in microseconds, of weights that do not fit into the cache."""
    copies = 6
    codes = [torch.randint(-127, 128, (K, K), dtype=torch.int8) for _ in range(copies)]
    packed = [onednn_int8.QLinearWeight(torch.ops.onednn.qlinear_prepack(one, None), K) for one in codes]
    scale, x = torch.ones(K), torch.randint(0, 256, (8, K), dtype=torch.uint8)

    def run(rows: int) -> Callable[[], None]:
        def call() -> None:
            for weight in packed:
                onednn_int8.int8_gemm(x[:rows], weight, scale)

        return call

    return timed({f"{rows} rows": run(rows) for rows in (1, 2, 3, 4, 6, 8)}, 1000 * copies)


def orders() -> dict[str, float]:
    """A GEMM with a bfloat16 weight in the cache, plain and in oneDNN's order, in microseconds."""
    if not onednn_bf16.fits(N, K):
        return {}
    weight, buffer = torch.randn(N, K, dtype=torch.bfloat16), onednn_bf16.blocked(N, K)
    buffer.words.copy_(weight.view(N // 64, 64, K // 2, 2).transpose(1, 2).contiguous().view(torch.int32).squeeze(-1))
    calls: dict[str, Callable[[], object]] = {}
    for rows in (16, 128):
        x = torch.randn(rows, K, dtype=torch.bfloat16)
        calls[f"{rows} rows, plain"] = lambda x=x: F.linear(x, weight)
        calls[f"{rows} rows, oneDNN's order"] = lambda x=x: buffer.matmul(x)
    return timed(calls, 1000)


def kernels() -> dict[str, float]:
    """Times of building a compiled kernel (wall time, empty directory, all processors), of loading and of calling it."""
    if cache.compiler() is None:
        return {}
    name = "rows-to-int8"
    source = compiled.SOURCES[name]
    before = os.environ.get("REQUANTO_CACHE")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["REQUANTO_CACHE"] = scratch
        try:
            path = cache.path_of(name, source)
            start = time.perf_counter()
            cache.make({name: path})
            one = time.perf_counter() - start
            start = time.perf_counter()
            cache.make({other: cache.path_of(other, compiled.SOURCES[other]) for other in compiled.SOURCES})
            rest = time.perf_counter() - start
            start = time.perf_counter()
            kernel = cache.Kernel(name, path)
            cache.check(kernel, source, name)
            load = time.perf_counter() - start
        finally:
            os.environ.pop("REQUANTO_CACHE")
            if before is not None:
                os.environ["REQUANTO_CACHE"] = before
    x, codes, steps = source.example()
    calls = {"call, us": lambda: kernel(x, codes, steps), "call through torch.compile, us": torch_compiled(source)}
    figures = {"make one, s": one, "make all at once, s": one + rest, "load and check, ms": 1000 * load}
    return {what: round(value, 2) for what, value in figures.items()} | timed(calls, 1000)


def torch_compiled(source: cache.Source) -> Callable[[], object]:
    """A call of the same function through torch.compile."""
    arguments = source.example()
    call = torch.compile(source.function, dynamic=True)
    call(*arguments)
    return lambda: call(*arguments)


def main() -> None:
    """Measures, prints, writes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        found = {"x": activations(), "weights": weights(), "int8 products, us": gemms()}
        found["bfloat16 products, us"] = orders()
        found["compiled kernels"] = kernels()
    for what, figures in found.items():
        for name, ns in figures.items():
            print(f"{what:8} {name:26} {ns:.3f}")
    write(
        RESULTS / "cpu_passes.json",
        {"unit": "ns of CPU time for each number; products: microseconds each; kernels: as they say", "results": found},
    )


if __name__ == "__main__":
    main()
