"""Times GPU work inside CUDA graphs, which excludes the time of Python; on a CPU (dry runs) with a wall clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

Call = Callable[[], object]
#: Shortest graph in microseconds: the gap between an event and the first kernel is then below one percent.
GRAPH_US = 500.0
MOST_CALLS = 100
#: Time for one of the two runs, and bounds on its replays.
RUN_US = 20e3
REPLAYS = (5, 100)


@dataclass(frozen=True)
class Timing:
    """us: microseconds of one call, the mean of two runs' medians. spread: their difference, as a share of the smaller.

    first: what the first call gave in the last replay. how: ``"graph"``, ``"cold"``, ``"events"`` or ``"wall"``. why: why
    no graph was captured.
    """

    us: float
    spread: float
    first: object = None
    how: str = "graph"
    why: str = ""

    def row(self) -> dict[str, object]:
        """The columns of a row of results."""
        found = {"us": self.us, "spread": self.spread, "how": self.how}
        return found | ({"not_captured": self.why} if self.why else {})


def time_calls(calls: Sequence[Call], device: str, *, may_fail: bool = False) -> Timing:
    """Times one call; the calls do the same work on different buffers, which together exceed the L2 cache.

    Args:
        may_fail: work that no graph can capture (a peer's) is timed with events around the calls instead of raising.
    """
    if device == "cpu":
        return _wall(calls)
    try:
        return _in_graph(calls)
    except Exception as error:
        if not may_fail:
            raise
        torch.cuda.synchronize()
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        first, run = calls[0](), lambda: [call() for call in calls]
        return Timing(*_two_runs(run, len(calls)), first, "events", why)


def time_cold(call: Call, device: str, buffer: torch.Tensor) -> Timing:
    """Times a call on one weight that fits the L2 cache, as if the cache held none of it.

    A buffer larger than the cache is read before each call, and the time of that alone is subtracted.
    """

    def read_and_call() -> object:
        buffer.sum()
        return call()

    both, reading = time_calls([read_and_call], device, may_fail=True), time_calls([buffer.sum], device)
    us = both.us - reading.us
    spread = (both.us * both.spread + reading.us * reading.spread) / max(us, 1e-3)
    return replace(both, us=max(us, 1e-3), spread=spread, how="cold" if both.how == "graph" else both.how)


def _in_graph(calls: Sequence[Call]) -> Timing:
    graph, _ = capture(calls)
    once = _event_us(graph.replay)
    repeats = int(min(max(1, GRAPH_US // max(once, 1e-3)), max(1, MOST_CALLS // len(calls))))
    del graph
    graph, first = capture(list(calls) * repeats)
    return Timing(*_two_runs(graph.replay, len(calls) * repeats), first)


def capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of all calls, and what the first of them gives when it is replayed.

    The calls run once before on a side stream, as torch requires: this compiles their kernels.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = calls[0]()
        for call in calls[1:]:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, first


def _two_runs(run: Call, count: int) -> tuple[float, float]:
    """(microseconds of one of ``count`` calls, spread): two runs of the same, each the median of its replays."""
    least, most = REPLAYS
    repeats = int(min(most, max(least, RUN_US // max(_event_us(run), 1e-3))))
    a, b = (median(_event_us(run) for _ in range(repeats)) / count for _ in range(2))
    return (a + b) / 2, abs(a - b) / min(a, b)


def _event_us(run: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _wall(calls: Sequence[Call]) -> Timing:
    """One warm call, then each call once, twice."""
    first = calls[0]()
    runs = []
    for _ in range(2):
        start = time.perf_counter()
        for call in calls:
            call()
        runs.append((time.perf_counter() - start) * 1e6 / len(calls))
    return Timing(sum(runs) / 2, abs(runs[0] - runs[1]) / min(runs), first, "wall")


def host_us(call: Call, device: str, calls: int = 200) -> float:
    """Microseconds of CPU time that one eager call takes: the device works behind, and is waited for between batches only.

    The work must take less time on the device than on the host; the fastest of several batches is returned.
    """
    call()
    best = float("inf")
    for _ in range(1 if device == "cpu" else 5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) * 1e6 / calls)
    synchronize(device)
    return best


def steps_us(call: Call, device: str, steps: int) -> float:
    """Microseconds of one of several eager calls in a row, Python included; the device is waited for at the end.

    So a step costs what takes longer, host or device, as in generation.
    """
    call()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        call()
    synchronize(device)
    return (time.perf_counter() - start) * 1e6 / steps


def synchronize(device: str) -> None:
    """Waits for the device, so that the work is timed and not only its launch."""
    if device != "cpu":
        torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN (the largest number, of integers): an element that a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
