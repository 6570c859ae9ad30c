"""Quantized GEMMs on every class of processor that this one can be capped to, relative to the best float of that class.

    python benchmarks/cpu.py --threads 1                                  # Requanto, all classes of this processor
    python benchmarks/cpu.py --libraries llama.cpp openvino --peers-python PYTHON    # others, an interpreter that has them
    python benchmarks/cpu.py --table                                      # the tables of docs/cpu.md, from the results
    python benchmarks/cpu.py --below                                      # cells that miss their goal

A class is a set of instructions: REQUANTO_CPU caps Requanto's kernels, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and
MKL_ENABLE_INSTRUCTIONS torch's own. "native" caps nothing. Each library and class runs in a process of its own, which
also times bf16 and float32 `F.linear`: the faster of the two, in the same rounds, is 1. One thread: CPU time; more:
wall time. Adds to benchmarks/results/cpu.json, so parts can be measured one by one.
Whole models: benchmarks/cpu_models.py; convolutions and embeddings: benchmarks/cpu_layers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, command, machine
from cpu_libraries import KINDS, LIBRARIES
from cpu_tables import ROWS, below, markdown, plot, show, speeds

FILE = RESULTS / "cpu.json"
#: out_features, in_features: a large model's layer, one that is no multiple of 64, and SmolLM2's.
SHAPES = ((4096, 4096), (1000, 1112), (576, 1536))


def _caps(level: str, aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {
        "REQUANTO_CPU": level,
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }


#: By class: the flag of /proc/cpuinfo that it needs, and what caps a processor to it.
CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "avx2": ("avx2", _caps("avx2", "avx2", "AVX2", "AVX2")),
    "avxvnni": ("avx_vnni", _caps("avxvnni", "avx2", "AVX2_VNNI", "AVX2")),
    "avx512": ("avx512bw", _caps("avx512", "avx512", "AVX512_CORE", "AVX512")),
    "vnni": ("avx512_vnni", _caps("vnni", "avx512", "AVX512_CORE_VNNI", "AVX512")),
    "bf16": ("avx512_bf16", _caps("bf16", "avx512", "AVX512_CORE_BF16", "AVX512")),
    "amx": ("amx_bf16", {"REQUANTO_CPU": "amx"}),
    "native": ("", {}),
}


def here() -> list[str]:
    """Classes that this processor can run."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return [name for name, (flag, _) in CLASSES.items() if flag in flags and flag]


def run(library: str, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one library on one class, up to the end, a failure or the time limit."""
    python = sys.executable if library == "requanto" else options.peers_python
    orders = {
        "library": library,
        "threads": options.threads,
        "seconds": options.seconds,
        "shapes": options.shapes,
        "dtypes": options.dtypes,
        "rows": options.rows,
        "kinds": options.kinds,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **CLASSES[kind][1]}
    rows: list[dict[str, Any]] = []
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [python, str(Path(__file__).with_name("cpu_child.py")), json.dumps(orders)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        stop = threading.Timer(options.timeout, child.kill)
        stop.start()
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):
                print(f"  {library}: {line.strip()}", flush=True)
                continue
            rows.append(json.loads(line))
            if "results" in rows[-1]:
                show(rows[-1])
        status = child.wait()
        in_time = stop.is_alive()
        stop.cancel()
        errors.seek(0)
        if status:
            why = f"exit status {status}: {errors.read().strip()[-300:]}"
            rows.append({"failed": why if in_time else f"longer than {options.timeout:.0f} s"})
            print(f"{library}: {rows[-1]['failed']}", flush=True)
    print(f"{library} {kind}, {options.threads} thread(s): {time.monotonic() - start:.0f} s", flush=True)
    return rows


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a part after it was measured again: cells that were not are kept."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get("shape", ())), row.get("dtype"), row.get("rows"), "bytes" in row, "failed" in row

    kept = {key(row): row for row in old if "failed" not in row}
    for row in new:
        before = kept.get(key(row), {})
        # Types that were left out this time keep what they had; their ratios belong to another run's float.
        kept[key(row)] = before | row | {"results": before["results"] | row["results"]} if "results" in before else row
    return list(kept.values())


def commit() -> str:
    """Commit of this checkout."""
    root = str(RESULTS.parent.parent)
    found = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def main() -> None:
    """Measures and stores, or prints what is stored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", nargs="*", choices=list(CLASSES), help="default: all that this processor has")
    parser.add_argument("--libraries", nargs="*", choices=list(LIBRARIES), default=["requanto"])
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), help="types of Requanto's weights")
    parser.add_argument("--dtypes", nargs="*", choices=["bf16", "f16", "f32"], default=["bf16", "f16", "f32"])
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--shapes", nargs="*", type=lambda text: [int(n) for n in text.split("x")], default=SHAPES)
    parser.add_argument("--seconds", type=float, default=0.05, help="for each candidate of a cell, about")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for each library and class")
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that has the other libraries")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--table", action="store_true", help="print the stored results as markdown and stop")
    parser.add_argument("--speed", action="store_true", help="print GB/s of weights read by one row and stop")
    parser.add_argument("--below", action="store_true", help="print stored cells that miss their goal and stop")
    parser.add_argument(
        "--plot", action="store_true", help="draw docs/images/cpu_speed.png of the stored results and stop"
    )
    options = parser.parse_args()
    stored = json.loads(options.file.read_text()) if options.file.exists() else {"parts": {}}
    if options.table or options.below or options.plot or options.speed:
        if options.table:
            print(markdown(stored))
        if options.below:
            print("\n".join(below(stored)))
        if options.speed:
            print("\n".join(speeds(stored)))
        if options.plot:
            plot(stored, RESULTS.parent.parent / "docs" / "images" / "cpu_speed.png")
        return
    torch.set_num_threads(options.threads)
    for library in options.libraries:
        for kind in options.classes or here():
            about = machine()
            rows = run(library, kind, options)
            name = f"{library} {kind} {options.threads}"
            old = stored["parts"].get(name, {}).get("rows", [])
            about |= {"threads": options.threads, "caps": CLASSES[kind][1]}
            part = {"library": library, "class": kind, "threads": options.threads, "command": command()}
            stored["parts"][name] = {**part, "commit": commit(), "machine": about, "rows": merge(old, rows)}
            options.file.write_text(json.dumps(stored, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
