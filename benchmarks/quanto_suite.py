"""Runs optimum-quanto's own tests of its public names on Requanto, through `install_as_optimum_quanto`.

    python benchmarks/quanto_suite.py                    # downloads the source archive of 0.2.7 with pip
    python benchmarks/quanto_suite.py --sdist FILE       # uses this source archive

The tests are unpacked into a temporary folder. Left out: tests of tensors packed for CUDA kernels, which no
public name creates, tests that download models, and the test of `optimum-cli`, whose package is not required here. Writes
benchmarks/results/quanto_suite.json; exit code 1 if any test fails. Needs pytest, transformers and diffusers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as tree
from collections import Counter
from pathlib import Path

VERSION = "0.2.7"
LEFT_OUT = ("tensor/weights/optimized", "library/test_mm.py", "models", "cli")
# Read by pytest before any test imports optimum.quanto.
PLUGIN = "import requanto\nrequanto.install_as_optimum_quanto()\n"


def fetch(folder: Path) -> Path:
    """Downloads the source archive with pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([*command, f"optimum-quanto=={VERSION}"], check=True)
    (archive,) = folder.glob("optimum_quanto-*.tar.gz")
    return archive


def run(archive: Path, folder: Path, arguments: list[str]) -> Path:
    """Runs the tests; returns pytest's report as XML."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (tests,) = folder.glob("optimum_quanto-*/test*")
    (folder / "on_requanto.py").write_text(PLUGIN)
    report = folder / "report.xml"
    ignored = [f"--ignore={tests / path}" for path in LEFT_OUT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path[1:]]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", str(tests), *ignored, "-p", "on_requanto", "-q", f"--junit-xml={report}"]
    subprocess.run([*command, "-p", "no:cacheprovider", *arguments], env=environment, cwd=tests)
    return report


def count(report: Path) -> tuple[Counter, list[str]]:
    """Number of tests for each outcome, and the names of those that failed."""
    found: Counter = Counter()
    failed = []
    for case in tree.parse(report).iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        outcome = {"failure": "failed", "error": "failed"}.get(outcome, outcome)
        found[outcome] += 1
        if outcome == "failed":
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return found, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="path of the source archive, to download nothing")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        archive = arguments.sdist.resolve() if arguments.sdist else fetch(Path(scratch))
        found, failed = count(run(archive, Path(scratch), more))
    import torch

    record = {
        "command": "python benchmarks/quanto_suite.py",
        "machine": f"{platform.machine()}, {'with' if torch.cuda.is_available() else 'without'} a GPU",
        "torch": torch.__version__,
        "suite": f"optimum-quanto {VERSION}, without {', '.join(LEFT_OUT)}",
        "passed": found["passed"],
        "skipped": found["skipped"],
        "failed": failed,
    }
    target = Path(__file__).parent / "results" / "quanto_suite.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    sys.exit(bool(failed) or not found["passed"])


if __name__ == "__main__":
    main()
