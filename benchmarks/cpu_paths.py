"""Times every implementation that could run a GEMM: at which sizes `requanto.linear` should switch between them.

    PYTHONPATH=src:kernels python benchmarks/cpu_paths.py

Needs a C++ compiler, AVX-512 and exact int8 GEMMs. Microseconds for each GEMM; the implementations alternate, each over
several weights. Writes benchmarks/results/cpu_paths.json.
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
from requanto.linear.cpu import int4, int4_gemm, int8, int8_gemm, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import calls
from requanto.linear.registry import MakePlan

SHAPES = ((192, 576), (576, 576), (1536, 576), (1024, 2048), (2048, 2048), (4096, 4096))
ROWS = (1, 8, 12, 16, 32, 64, 128, 512)
#: Approximate number of weight elements that one round reads, and the maximum number of copies.
READ, COPIES = 50e6, 30
ROUNDS = 5


def timed(paths: dict[str, tuple[Callable[[torch.Tensor], object], list[torch.Tensor]]]) -> dict[str, float]:
    """Median microseconds of one GEMM, without the first round."""
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(ROUNDS + 1):
        for name, (call, weights) in paths.items():
            start = time.perf_counter()
            for weight in weights:
                call(weight)
            if turn:
                taken[name].append((time.perf_counter() - start) / len(weights))
    return {name: round(1e6 * median(times), 1) for name, times in taken.items()}


def planned(make_plan: MakePlan, x: torch.Tensor, weights: list[QTensor]) -> tuple[Callable[..., object], list[object]]:
    """An implementation with its cached plans for x, as layers use it after the first GEMM."""
    made = [(make_plan(weight, len(x), x.dtype), weight) for weight in weights]
    return lambda pair: pair[0](x, pair[1], None), made


def gemms(shape: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Times of each implementation, by rows of x."""
    copies = max(3, min(COPIES, int(READ / (shape[0] * shape[1]))))
    floats = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(copies)]
    # A separate set of int4 weights for each implementation: they store scales in different orders.
    fours, others, eights = ([QTensor.quantize(weight, kind) for weight in floats] for kind in ("int4", "int4", "int8"))
    for weight in fours + others:
        weight.pack(int4.layout())
    for weight in eights:
        weight.pack(onednn_int8.layout(*shape))
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
        paths = {
            "bf16": (lambda w, x=x: F.linear(x, w), floats),
            "int8, split": (lambda w, x=x: int8_gemm.run_split(x, w, None), eights),
            "int8, compiled": planned(int8.make_plan, x, eights),
            "int4, compiled": planned(int4_gemm.make_plan, x, fours),
        }
        if rows <= 128:
            paths["int4, operator"] = planned(int4.make_plan, x, others)
        paths["int8 x int8, oneDNN"] = (lambda w, x=x: int8_gemm.run_int8(x, w, None, qint8), eights)
        paths["int8 x int8, compiled"] = planned(int8.make_plan_quantized, x, eights)
        found[str(rows)] = timed(paths)
        print(shape, rows, found[str(rows)], flush=True)
    return found


def quantizing() -> dict[str, dict[str, float]]:
    """Times of quantizing x to int8 by its size, with operators and with the kernel."""
    found = {}
    for rows, length in ((1, 576), (32, 576), (512, 576), (128, 4096), (512, 4096)):
        xs = [torch.randn(rows, length, dtype=torch.bfloat16) for _ in range(20)]
        codes, steps = torch.empty(rows, length, dtype=torch.uint8), torch.empty(rows, 1)
        paths = {
            "operators": (lambda x: quantize_unsigned(x, qint8, None, int8_gemm.MIN_ROWS), xs),
            "kernel": (lambda x, codes=codes, steps=steps: calls.rows_to_int8(x, codes, steps), xs),
        }
        found[f"{rows} x {length}"] = timed(paths)
    return found


def convolutions() -> dict[str, dict[str, dict[str, float]]]:
    """Times of a convolution by output pixels: with torch's operator on the dequantized weight, and as GEMM of patches."""
    limits = images.MAX_PIXELS, images.MAX_PIXELS_1X1, images.WEIGHTS_PER_PIXEL

    def run(weight: torch.Tensor, x: torch.Tensor, patches: bool) -> torch.Tensor:
        images.MAX_PIXELS = images.MAX_PIXELS_1X1 = 2**31 if patches else 0
        images.WEIGHTS_PER_PIXEL = 1
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
    images.MAX_PIXELS, images.MAX_PIXELS_1X1, images.WEIGHTS_PER_PIXEL = limits
    return found


def main() -> None:
    """Measures, prints, writes."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    families = (calls.NIBBLES, calls.INT8, calls.INT8_INT8, calls.FLOAT8)
    if not (onednn_bf16.works() and onednn_int8.works() and all(calls.ready(family) for family in families)):
        raise SystemExit("not all implementations are available on this machine (see the log): nothing was measured")
    with torch.no_grad():
        results = {f"{n} x {k}": gemms((n, k)) for n, k in SHAPES}
        results["quantizing x"] = quantizing()
        results |= convolutions()
    print(results["quantizing x"])
    write(RESULTS / "cpu_paths.json", {"unit": "microseconds, by rows of x or output pixels", "results": results})


if __name__ == "__main__":
    main()
