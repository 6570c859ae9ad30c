"""What `requanto_autoload.pth` costs: starts of Python with it and with REQUANTO_AUTOLOAD=0, in turn.

    python benchmarks/startup.py

The environment must have Requanto installed by pip, which installs the .pth file. PYTHONDONTWRITEBYTECODE must not be
set, or the module is compiled at every start. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

from common import RESULTS, command, machine


def start(setting: str) -> tuple[float, float]:
    """Seconds and CPU seconds of one start of Python.

    Args:
        setting: value of REQUANTO_AUTOLOAD.
    """
    environment = {**os.environ, "REQUANTO_AUTOLOAD": setting}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env=environment, check=True)
    wall = time.perf_counter() - wall
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200, help="pairs of starts")
    options = parser.parse_args()
    check = "import sys; sys.exit('requanto_autoload' not in sys.modules)"
    if subprocess.run([sys.executable, "-c", check], env={**os.environ, "REQUANTO_AUTOLOAD": "1"}).returncode:
        sys.exit(
            "requanto_autoload.pth is not installed for this Python: pip install . (or -e .) in the checkout first"
        )
    found: dict[str, list[tuple[float, float]]] = {"1": [], "0": []}
    for turn in range(options.repeats):
        for setting in ("1", "0") if turn % 2 else ("0", "1"):
            found[setting].append(start(setting))
    result = {
        "command": command(),
        "machine": machine(),
        "starts": options.repeats,
        "milliseconds": {
            name: {
                kind: round(1e3 * how(values[column] for values in found[setting]), 3)
                for kind, how, column in (("median", median, 0), ("cpu_median", median, 1), ("cpu_least", min, 1))
            }
            for name, setting in (("with", "1"), ("without", "0"))
        },
        "median_of_differences_ms": round(1e3 * median(a[0] - b[0] for a, b in zip(found["1"], found["0"])), 3),
    }
    text = json.dumps(result, indent=2)
    print(text)
    (RESULTS / "startup.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
