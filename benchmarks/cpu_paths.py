"""Every path that could serve a product, side by side: where `requanto.linear` changes from one to another.

    PYTHONPATH=src:kernels python benchmarks/cpu_paths.py

Needs a C++ compiler, AVX-512 and int8 products that are exact. Microseconds of a product, the paths in turns, each over
several weights in a row. Writes benchmarks/results/cpu_paths.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from common import RESULTS, write

from requanto import QTensor, qint8
from requanto.linear import convolution as images
from requanto.linear.activations import quantize_unsigned
from requanto.linear.cpu import int4, int4_gemm, int8, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import calls
from requanto.linear.registry import Bind

SHAPES = ((192, 576), (576, 576), (1536, 576), (1024, 2048), (2048, 2048), (4096, 4096))
ROWS = (1, 8, 12, 16, 32, 64, 128, 512)
#: Numbers of weights that are read in a row, about, and copies at most.
READ, COPIES = 50e6, 30
ROUNDS = 5


def timed(paths: dict[str, tuple[Callable[[torch.Tensor], object], list[torch.Tensor]]]) -> dict[str, float]:
    """Median microseconds of one product, the first round apart."""
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(ROUNDS + 1):
        for name, (call, weights) in paths.items():
            start = time.perf_counter()
            for weight in weights:
                call(weight)
            if turn:
                taken[name].append((time.perf_counter() - start) / len(weights))
    return {name: round(1e6 * median(times), 1) for name, times in taken.items()}


def bound(bind: Bind, x: torch.Tensor, weights: list[QTensor]) -> tuple[Callable[..., object], list[object]]:
    """A path made ready for x, as layers have it after the first product."""
    made = [(bind(weight, len(x), x.dtype), weight) for weight in weights]
    return lambda pair: pair[0](x, pair[1], None), made


def products(shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """By rows of x."""
    copies = max(3, min(COPIES, int(READ / (shape[0] * shape[1]))))
    floats = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(copies)]
    # One set of int4 for each of its paths, which keep scales in an order of their own.
    fours, others, eights = ([QTensor.quantize(weight, kind) for weight in floats] for kind in ("int4", "int4", "int8"))
    for weight in fours + others:
        weight.pack(int4.pack(weight))
    for weight in eights:
        weight.pack(onednn_int8.pack(weight))
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
        paths = {
            "bf16": (lambda w, x=x: F.linear(x, w), floats),
            "int8, split": (lambda w, x=x: onednn_int8.run_split(x, w, None), eights),
            "int8, compiled": bound(int8.bind, x, eights),
            "int4, compiled": bound(int4_gemm.bind, x, fours),
        }
        if rows <= 128:
            paths["int4, operator"] = bound(int4.bind, x, others)
        paths["int8 x int8, oneDNN"] = (lambda w, x=x: onednn_int8.run_int8(x, w, None, qint8), eights)
        paths["int8 x int8, compiled"] = bound(int8.bind_quantized, x, eights)
        found[str(rows)] = timed(paths)
        print(shape, rows, found[str(rows)], flush=True)
    return found


def quantizing() -> dict[str, dict[str, float]]:
    """x to int8, by its size: operators, and the kernel."""
    found = {}
    for rows, length in ((1, 576), (32, 576), (512, 576), (128, 4096), (512, 4096)):
        xs = [torch.randn(rows, length, dtype=torch.bfloat16) for _ in range(20)]
        codes, steps = torch.empty(rows, length, dtype=torch.uint8), torch.empty(rows, 1)
        paths = {
            "operators": (lambda x: quantize_unsigned(x, qint8, None, onednn_int8.LEAST), xs),
            "kernel": (lambda x, codes=codes, steps=steps: calls.rows_to_int8(x, codes, steps), xs),
        }
        found[f"{rows} x {length}"] = timed(paths)
    return found


def convolutions() -> dict[str, dict[str, dict[str, float]]]:
    """A convolution by its output pixels: the weight made for torch's operator, and the product of patches."""
    limits = images.PIXELS, images.PIXELS_ONE_BY_ONE, images.WEIGHTS_A_PIXEL

    def run(weight: torch.Tensor, x: torch.Tensor, patches: bool) -> torch.Tensor:
        images.PIXELS = images.PIXELS_ONE_BY_ONE = 2**31 if patches else 0
        images.WEIGHTS_A_PIXEL = 1
        return F.conv2d(x, weight, padding=weight.shape[2] // 2)

    found: dict[str, dict[str, dict[str, float]]] = {}
    for channels, kernel in ((1280, 3), (640, 3), (1280, 1)):
        copies = max(3, min(COPIES, int(READ / (channels * channels * kernel**2))))
        floats = [torch.randn(channels, channels, kernel, kernel, dtype=torch.bfloat16) for _ in range(copies)]
        own = found[f"convolution {channels} to {channels}, {kernel} x {kernel}"] = {}
        for size in (4, 8, 11, 16, 32):
            x = torch.randn(1, channels, size, size, dtype=torch.bfloat16)
            paths = {"bf16": (lambda w, x=x, k=kernel: F.conv2d(x, w, padding=k // 2), floats)}
            for kind in ("int8", "int4", "float8"):
                for name, patches in (("convolution", False), ("patches", True)):
                    weights = [torch.nn.Parameter(QTensor.quantize(w, kind, axis=0), False) for w in floats]
                    paths[f"{kind}, {name}"] = (lambda w, x=x, patches=patches: run(w, x, patches), weights)
            own[f"{size * size} pixels"] = timed(paths)
            print(list(found)[-1], size, own[f"{size * size} pixels"], flush=True)
    images.PIXELS, images.PIXELS_ONE_BY_ONE, images.WEIGHTS_A_PIXEL = limits
    return found


def main() -> None:
    """Measures, prints, writes."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    families = (calls.NIBBLES, calls.INT8, calls.INT8_INT8, calls.FLOAT8)
    if not (onednn_bf16.works() and onednn_int8.works() and all(calls.ready(family) for family in families)):
        raise SystemExit("this machine has not all of the paths (see the log): nothing to choose, nothing measured")
    with torch.no_grad():
        results = {f"{n} x {k}": products((n, k)) for n, k in SHAPES}
        results["quantizing x"] = quantizing()
        results |= convolutions()
    print(results["quantizing x"])
    write(RESULTS / "cpu_paths.json", {"unit": "microseconds, by rows of x or output pixels", "results": results})


if __name__ == "__main__":
    main()
