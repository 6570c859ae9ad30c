"""Times every implementation that could run a GEMM: at which rows `requanto.linear` should switch between them.

    PYTHONPATH=src:kernels REQUANTO_CPU=vnni python benchmarks/cpu_paths.py [--quick]

Microseconds of CPU time for each GEMM on one thread; the implementations alternate, each over several weights. Writes
benchmarks/results/cpu_paths.json, which keeps the other levels' results. `--quick` prints one shape and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, write

from requanto import QTensor
from requanto.linear import convolution as images
from requanto.linear.cpu import gemm, library, multiply
from requanto.linear.cpu.strips import STRIPS
from requanto.linear.cpu.weights import described

SHAPES = ((576, 576), (2048, 2048), (4096, 4096))
ROWS = (1, 4, 8, 16, 24, 32, 64, 128, 512, 2048)
#: One type for each way to multiply.
KINDS = ("int4", "int8", "float8")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
#: Approximate number of weight elements that one round reads, and the maximum number of copies.
READ, COPIES = 50e6, 12
ROUNDS = 3


def timed(paths: dict[str, tuple[Callable[[Any], object], list]]) -> dict[str, float]:
    """Median microseconds of one GEMM, without the first round."""
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(ROUNDS + 1):
        for name, (call, weights) in paths.items():
            start = time.thread_time()
            for weight in weights:
                call(weight)
            if turn:
                taken[name].append((time.thread_time() - start) / len(weights))
    return {name: round(1e6 * median(times), 1) for name, times in taken.items()}


def gemms(shape: tuple[int, int], dtype: torch.dtype, most: int) -> dict[str, dict[str, float]]:
    """Times of each implementation, by rows of x."""
    copies = max(2, min(COPIES, int(READ / (shape[0] * shape[1]))))
    floats = [torch.randn(shape, dtype=dtype) for _ in range(copies)]
    packed = {kind: [QTensor.quantize(weight, kind) for weight in floats] for kind in KINDS}
    for weight in [weight for weights in packed.values() for weight in weights]:
        weight.pack(STRIPS)
    found = {}
    tiles = library.find().has_tiles
    for rows in [rows for rows in ROWS if rows <= most]:
        x = torch.randn(rows, shape[1], dtype=dtype)
        paths: dict = {"float": (lambda w, x=x: F.linear(x, w), floats)}
        for kind, weights in packed.items():
            paths[f"{kind}, kernel"] = (lambda w, x=x: gemm.make_plan(w, len(x), x.dtype)(x, w, None), weights)
            if tiles:  # where `arithmetic` should change from integers to tiles of bfloat16
                for name, how in (
                    ("integers", gemm.BLOCKS16 if kind == "int8" else gemm.BLOCKS8),
                    ("tiles", gemm.PARTS if kind == "int8" and dtype != torch.bfloat16 else gemm.FLOAT),
                ):
                    if kind != "float8":
                        calls = [
                            gemm.Call(described(w), 0, how, rows, dtype, narrow=how == gemm.FLOAT) for w in weights
                        ]
                        paths[f"{kind}, {name}"] = (lambda call, x=x: call(x, None, None), calls)
            paths[f"{kind}, dequantized"] = (lambda w, x=x: multiply.run(x, w, None), weights)
        found[str(rows)] = timed(paths)
        print(shape, dtype, rows, found[str(rows)], flush=True)
    return found


def convolutions(dtype: torch.dtype) -> dict[str, dict[str, dict[str, float]]]:
    """Times of a convolution by output pixels: with torch's operator on the dequantized weight, and as GEMM of patches."""
    limits = images.MAX_PIXELS, images.MAX_PIXELS_1X1, images.WEIGHTS_PER_PIXEL

    def run(weight: torch.Tensor, x: torch.Tensor, patches: bool) -> torch.Tensor:
        images.MAX_PIXELS = images.MAX_PIXELS_1X1 = (2**31,) * 2 if patches else (0, 0)
        images.WEIGHTS_PER_PIXEL = 1
        return F.conv2d(x, weight, padding=weight.shape[2] // 2)

    found: dict[str, dict[str, dict[str, float]]] = {}
    for channels, kernel in ((1280, 3), (320, 3), (1280, 1)):
        copies = max(2, min(COPIES, int(READ / (channels * channels * kernel**2))))
        floats = [torch.randn(channels, channels, kernel, kernel, dtype=dtype) for _ in range(copies)]
        own = found[f"convolution {channels} to {channels}, {kernel} x {kernel}"] = {}
        for size in (4, 8, 11, 16, 32):
            x = torch.randn(1, channels, size, size, dtype=dtype)
            paths = {"float": (lambda w, x=x, k=kernel: F.conv2d(x, w, padding=k // 2), floats)}
            for kind in KINDS:
                for name, patches in (("convolution", False), ("patches", True)):
                    weights = [torch.nn.Parameter(QTensor.quantize(w, kind, axis=0), False) for w in floats]
                    paths[f"{kind}, {name}"] = (lambda w, x=x, patches=patches: run(w, x, patches), weights)
            own[f"{size * size} pixels"] = timed(paths)
            print(list(found)[-1], size, own[f"{size * size} pixels"], flush=True)
    images.MAX_PIXELS, images.MAX_PIXELS_1X1, images.WEIGHTS_PER_PIXEL = limits
    return found


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, fewer rows; print only")
    parser.add_argument("--convolutions", action="store_true", help="these alone; print only")
    parser.add_argument("--shape", default="2048x2048", help="of --quick")
    parser.add_argument("--rows", type=int, default=128, help="most rows of --quick")
    parser.add_argument("--dtype", default="bfloat16,float32", help="of --quick")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    used = library.find()
    if used is None:
        raise SystemExit("the CPU kernels are not available on this machine (see the log): nothing was measured")
    print("level", used.level)
    with torch.no_grad():
        if options.convolutions:
            for name in options.dtype.split(","):
                convolutions(getattr(torch, name))
        elif options.quick:
            n, k = map(int, options.shape.split("x"))
            for name in options.dtype.split(","):
                gemms((n, k), getattr(torch, name), options.rows)
        else:
            file = RESULTS / "cpu_paths.json"
            levels = json.loads(file.read_text()).get("levels", {}) if file.exists() else {}
            own: dict = {f"{n} x {k}": {str(d): gemms((n, k), d, 2048) for d in DTYPES} for n, k in SHAPES}
            own["convolutions"] = {str(dtype): convolutions(dtype) for dtype in DTYPES}
            levels[used.level] = own
            write(file, {"unit": "microseconds, by rows of x or output pixels", "levels": levels})


if __name__ == "__main__":
    main()
