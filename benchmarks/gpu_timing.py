"""Timing on a GPU, and tables and plots of the results, for `matmul.py` and `model.py`.

Work is timed inside a CUDA graph, which excludes the time of Python; on a CPU (dry runs) with a wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3


def graph_ms(calls: Sequence[Callable[[], object]], replays: int, device: str = "cuda") -> float:
    """Median milliseconds of one call, all of them captured in one graph and replayed.

    The calls run once before the capture, on a side stream as torch requires: this compiles their kernels.
    """
    if device == "cpu":
        return wall_ms(calls, replays)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + WARM_UP):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    times = sorted(times[WARM_UP:])
    return times[len(times) // 2]


def wall_ms(calls: Sequence[Callable[[], object]], repeats: int, device: str = "cpu") -> float:
    """Median milliseconds of one call in wall time, including launches."""
    times = []
    for call in calls:
        call()
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def synchronize(device: str) -> None:
    """Waits for the device, so that the work is timed and not only its launch."""
    if device != "cpu":
        torch.accelerator.synchronize()


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats with three digits, None as a dash."""
    cells = [["-" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [list(head), ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(path: Path, panels: dict[str, dict[str, dict[Any, float]]], ylabel: str, xlabel: str = "") -> str:
    """Draws one panel for each title and one line for each name; x are numbers (log scale) or words. Returns a message."""
    try:
        import matplotlib
    except ImportError:
        return f"no {path.name}: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            style = {"linestyle": "--"} if ":" in name else {}  # a peer's
            if all(isinstance(x, (int, float)) for x in points):
                axis.plot(list(points), list(points.values()), marker=".", label=name, **style)
                axis.set_xscale("log", base=2)
            else:
                axis.bar([str(x) for x in points], list(points.values()), label=name, alpha=0.6)
                axis.tick_params(axis="x", rotation=30)
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.legend(fontsize="x-small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return f"wrote {path}"
