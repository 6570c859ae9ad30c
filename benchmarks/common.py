"""Timing for the benchmarks: interleaved, on rotating buffers, paired with a baseline; results with command and machine."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """A description of this machine."""
    model, flags = platform.processor(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        lines = {key.strip(): value.strip() for key, value in lines.items()}
        model, flags = lines.get("model name", model), lines.get("flags", "")
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
    return {
        "processor": model,
        "instructions": [name for name in wanted if name in flags.split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def command() -> str:
    """The command line that repeats this run."""
    return "python " + shlex.join([os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(_anywhere, sys.argv[1:])])


def _anywhere(word: str) -> str:
    """An argument without absolute paths: an interpreter becomes PYTHON, another file its name."""
    path = Path(word)
    return word if not path.is_absolute() else "PYTHON" if path.name.startswith("python") else path.name


def interleaved(
    candidates: dict[str, Sequence[Callable[[], object]]], baseline: str, seconds: float = 1.0, least: int = 5
) -> dict[str, dict[str, float]]:
    """Times callables alternately: every round runs each of them on all of its buffers, like the layers of a model.

    Args:
        candidates: by name, the same work on different buffers, so many that no cache holds them.
        baseline: name of the candidate that the others are compared with, in the same round.
        seconds: approximate time for each candidate.

    Returns:
        By name: ``ms`` (median), ``best_ms`` (the fastest tenth: what a quiet machine gives), ``ratio`` (median over the
        rounds of baseline / own; above 1 is faster) and ``best_ratio``.
    """
    for calls in candidates.values():
        for call in calls:
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start, turn = time.perf_counter(), 0
    while time.perf_counter() - start < seconds * len(candidates) or turn < least:
        for name, calls in candidates.items():
            begin = time.perf_counter()
            for call in calls:
                call()
            times[name].append((time.perf_counter() - begin) / len(calls))
        turn += 1
    base = times[baseline]
    tenth = {name: sorted(taken)[len(taken) // 10] for name, taken in times.items()}
    return {
        name: {
            "ms": median(taken) * 1e3,
            "best_ms": tenth[name] * 1e3,
            "ratio": median(b / t for b, t in zip(base, taken)),
            "best_ratio": tenth[baseline] / tenth[name],
            "rounds": len(taken),
        }
        for name, taken in times.items()
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, with command and machine."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"command": command(), "machine": machine(), **results}, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
