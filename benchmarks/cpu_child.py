"""What benchmarks/cpu.py runs in processes of its own: one library on one class of processor, beside float.

A process reads its orders as one JSON argument, and prints a line of JSON for each weight, dtype and number of rows.
The instructions that it may use are set by environment variables before it starts (`cpu.CLASSES`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from cpu_libraries import LIBRARIES, Layer

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
#: Approximate bytes of bfloat16 weights that a round reads, and the maximum number of copies of a weight.
READ, COPIES = 64e6, 24
#: Rows of x from which one copy is enough, since a GEMM is no longer bound by memory.
MANY = 128
#: A candidate that is this many times slower than float is timed once in a cell, if a call takes longer than SLOW seconds,
#: and left out where a call is expected to take longer than LONGEST.
TIMES, SLOW, LONGEST = 3.0, 0.05, 4.0
Calls = Sequence[Callable[[], object]]


class Cell:
    """Times candidates alternately, each over its copies of a weight, like the layers of a model."""

    def __init__(self, threads: int) -> None:
        # CPU time of one thread is the same while other processes run. With several, waiting threads would be counted.
        self.clock = time.process_time if threads == 1 else time.perf_counter
        self.unit = "CPU time" if threads == 1 else "wall time"

    def once(self, calls: Calls) -> float:
        begin = self.clock()
        for call in calls:
            call()
        return (self.clock() - begin) / len(calls)

    def run(self, candidates: dict[str, Calls], floats: Sequence[str], seconds: float) -> dict[str, dict[str, float]]:
        """Milliseconds of a call, and the ratio to the best float of the same rounds, by candidate."""
        first = {}
        for name, calls in candidates.items():
            for call in calls[1:]:
                call()  # packs
            self.once(calls[:1])
            first[name] = self.once(calls[:1])
        best = min(first[name] for name in floats)
        slow = {name for name, taken in first.items() if taken > max(SLOW, TIMES * best)}
        times: dict[str, list[float]] = {name: [first[name]] if name in slow else [] for name in candidates}
        start, turn = time.perf_counter(), 0
        while turn < 3 or time.perf_counter() - start < seconds * (len(candidates) - len(slow)):
            for name, calls in candidates.items():
                if name not in slow:
                    times[name].append(self.once(calls))
            turn += 1
        middle = {name: median(taken) for name, taken in times.items()}
        tenth = {name: sorted(taken)[len(taken) // 10] for name, taken in times.items()}
        base = min(floats, key=middle.__getitem__)
        return {
            name: {
                "ms": round(middle[name] * 1e3, 5),
                "best_ms": round(tenth[name] * 1e3, 5),
                "ratio": round(median(b / t for b, t in zip(times[base], taken)), 4)
                if name not in slow
                else round(middle[base] / middle[name], 4),
                "best_ratio": round(tenth[base] / tenth[name], 4),
                "rounds": len(taken),
            }
            for name, taken in times.items()
        }


def reading_speed(threads: int) -> float:
    """GB/s of reading memory that no cache holds, by torch's sum of float32."""
    cell, numbers = Cell(threads), [torch.zeros(2**24, dtype=torch.float32, device="cpu") for _ in range(3)]
    taken = [cell.once([numbers_.sum for numbers_ in numbers]) for _ in range(7)]
    return round(4 * 2**24 / sorted(taken)[1] / 1e9, 2)


def _float_calls(weights: dict[str, list[torch.Tensor]], x: torch.Tensor, copies: int) -> dict[str, Calls]:
    found: dict[str, Calls] = {}
    for name, copied in weights.items():
        own = x.to(DTYPES[name])
        found[name] = [lambda w=w, own=own: F.linear(own, w) for w in copied[:copies]]
    return found


def measured(orders: dict[str, Any]) -> Any:
    """A result for each shape, dtype and number of rows."""
    threads, seconds = orders["threads"], orders["seconds"]
    cell, make = Cell(threads), LIBRARIES[orders["library"]]
    yield {"reading_gb_per_s": reading_speed(threads), "clock": cell.unit}
    for shape in map(tuple, orders["shapes"]):
        torch.manual_seed(0)
        whole = torch.randn(shape, dtype=torch.float32, device="cpu") / 64
        copies = max(2, min(COPIES, int(READ / (2 * whole.numel()))))
        both = {name: [whole.to(DTYPES[name]) for _ in range(copies)] for name in ("bf16", "f32")}
        for dtype in orders["dtypes"]:
            layers = make(whole, DTYPES[dtype], copies, orders["kinds"], threads)
            floats = dict(both)
            if dtype == "f16":
                floats["f16"] = [whole.half() for _ in range(copies)]
            before: dict[str, float] = {}  # seconds of a call a row of x
            for rows in orders["rows"]:
                x = torch.randn(rows, shape[1], dtype=torch.float32, device="cpu").to(DTYPES[dtype])
                used = 1 if rows >= MANY else copies
                candidates = _float_calls(floats, x, used)
                for name, own in layers.items():
                    candidates[name] = [_bound(layer, x) for layer in own[:used]]
                left = {name for name in candidates if before.get(name, 0.0) * rows > LONGEST}
                candidates = {name: calls for name, calls in candidates.items() if name not in left}
                # Some libraries' tensors are not made for inference_mode.
                with torch.inference_mode() if orders["library"] == "requanto" else torch.no_grad():
                    found = cell.run(candidates, [f for f in ("bf16", "f32") if f in candidates], seconds)
                before |= {name: figures["ms"] / 1e3 / rows for name, figures in found.items()}
                row = {"shape": shape, "dtype": dtype, "rows": rows, "results": found}
                yield row | ({"too_slow": sorted(left)} if left else {})
            yield {"shape": shape, "dtype": dtype, "bytes": {name: own[0].nbytes for name, own in layers.items()}}
            del layers


def _bound(layer: Layer, x: torch.Tensor) -> Callable[[], object]:
    prepared = layer.prepare(x)
    return lambda: layer(prepared)


def main() -> None:
    orders = json.loads(sys.argv[1])
    torch.set_num_threads(orders["threads"])
    for row in measured(orders):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
