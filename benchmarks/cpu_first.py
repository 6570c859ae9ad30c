"""The first token of a quantized model in a new process: what its first forward takes more than the second one.

    PYTHONPATH=src:kernels python benchmarks/cpu_first.py

SmolLM2-135M-Instruct in each type, in a process of its own, with the CPU library that `REQUANTO_CACHE` or the installed
package has, and once with an empty cache, where it is built first (a source checkout). Writes
benchmarks/results/cpu_first.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, write

KINDS = ("bf16", "int8", "int4", "float8", "nf4", "int8 x int8")


def worker(kind: str) -> None:
    """Prints the seconds of importing, loading, and two forwards."""
    import torch

    start = time.perf_counter()
    import requanto

    import_s = time.perf_counter() - start
    import transformers

    sys.path.append(str(Path(__file__).parents[1] / "integration_tests"))
    from real_models import smollm2_dir

    torch.set_num_threads(2)
    weights, _, activations = kind.partition(" x ")
    options: dict[str, Any] = {}
    if kind != "bf16":
        options["quantization_config"] = requanto.QuantoConfig(weights=weights, activations=activations or None)
    folder = smollm2_dir()
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", **options
    ).eval()
    load_s = time.perf_counter() - start
    ids, taken = torch.zeros(1, 8, dtype=torch.int64, device="cpu"), []
    with torch.inference_mode():
        for _ in range(3):
            start = time.perf_counter()
            model(ids)
            taken.append(time.perf_counter() - start)
    adds = taken[0] - min(taken[1:])
    print(json.dumps({"import_s": import_s, "load_s": load_s, "adds_s": adds, "forwards_s": taken}))


def run(kind: str, cache: str | None) -> dict[str, Any]:
    """One process."""
    environment = os.environ | ({} if cache is None else {"REQUANTO_CACHE": cache})
    command = [sys.executable, __file__, "--worker", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} ended with status {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--file", type=Path, default=RESULTS / "cpu_first.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    found: dict[str, Any] = {}
    for kind in options.kinds:
        found[kind] = run(kind, None)
    with tempfile.TemporaryDirectory() as empty:
        found["int4, empty cache"] = run("int4", empty)
    for name, figures in found.items():
        print(name, ", ".join(f"{what} {value:.3f}" for what, value in figures.items() if what != "forwards_s"))
    write(options.file, {"results": found})


if __name__ == "__main__":
    main()
