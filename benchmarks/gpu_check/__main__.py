"""The command: `python -m gpu_check`. See `gpu_check/__init__.py`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check import __doc__ as about
from gpu_check import report
from gpu_check.rows import done
from gpu_check.serve import Child, environment

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        "gpu_check", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for all that is written (default: benchmarks/results)")
    parser.add_argument(
        "--budget", type=float, default=285.0,
        help="seconds that the run may take (default: 285); the summary counts the cases that had no time left",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", metavar="NAME",
        help="only these stages or families, e.g. goals models splits int8; --list shows cases as STAGE/FAMILY/...",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the file, run the other cases and those that failed"
    )
    parser.add_argument(
        "--wheels", type=Path, help="folder with wheels of other libraries; unpacked for this run, nothing is installed"
    )
    parser.add_argument("--table", type=Path, help="a table of tuned tiles (kernels.json) for this run")
    parser.add_argument(
        "--processes", type=int, default=16, help="processes that compile before the run (default: 16); 0: none"
    )
    parser.add_argument(
        "--dry", action="store_true", help="no GPU: tiny shapes in Triton's interpreter; times mean nothing"
    )
    parser.add_argument(
        "--summarize", type=Path, metavar="FILE", help="only remake gpu_check.md and .png from the rows"
    )
    parser.add_argument("--before", type=Path, metavar="FILE", help="rows of an earlier run: what has changed since?")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the cases; prints the summary last, since a remote call may return only the end of the output."""
    options = arguments(argv)
    if options.summarize is not None:
        print(report.write(options.summarize, options.out, options.before))
        return 0
    if problem := missing(needs_device=not (options.dry or options.list)):
        print(f"gpu_check: {problem} Nothing was measured.", file=sys.stderr)
        return 2
    from gpu_check.cases import dry_cases, every_case  # needs torch and the kernels

    cases = dry_cases() if options.dry else every_case()
    if options.only:
        known = {word for case in cases for word in (case.stage, case.family)}
        unknown = sorted(set(options.only) - known)
        if unknown:
            print(f"--only: found {', '.join(unknown)}; expected some of {', '.join(sorted(known))}", file=sys.stderr)
            return 2
        cases = [c for c in cases if c.stage == "ceilings" or {c.stage, c.family} & set(options.only)]
    if options.list:
        print(*(case.key for case in cases), sep="\n")
        return 0
    options.out = options.out or HERE.parent / "results"
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "gpu_check.jsonl"
    if file.exists() and not options.resume:
        file.rename(file.with_suffix(".before.jsonl"))
    known = done(file) if options.resume else set()
    cases = [case for case in cases if case.key not in known]
    with tempfile.TemporaryDirectory() as folder, (options.out / "gpu_check.log").open("a") as log:
        run = make_run(options, Path(folder), file, log)
        run.append(header(options))
        if options.processes and not options.dry:
            run.compile(cases, min(options.processes, len(os.sched_getaffinity(0))))
        run.measure(cases)
        run.append({"case": "end", "stage": "end", "family": "end", "op": "end", "left_out": run.left_out})
    print(report.write(file, before=options.before))
    return 0


def make_run(options: argparse.Namespace, folder: Path, file: Path, log: Any) -> Any:
    """The run, with the folder's sub-folders for tuned tiles and for peers."""
    from gpu_check.parent import Run

    cache = folder / "cache"
    cache.mkdir()
    if options.table is not None:
        shutil.copy(options.table, cache / "kernels.json")
    late = install(options.wheels, folder / "wheels") if options.wheels is not None else None
    variables = environment(ROOT, dry=options.dry, cache=cache, late=late)
    start = lambda setup: Child({"dry": options.dry} | setup, variables, log)  # noqa: E731

    def keep_table(row: dict[str, Any]) -> None:
        if row.get("entries"):
            shutil.copy(cache / "kernels.json", options.out / "kernels.json")

    budget = 1e9 if options.dry else options.budget
    return Run(file, budget, start, options.dry, keep_table, partial(print, flush=True))


def install(wheels: Path, target: Path) -> Path:
    """Unpacks wheels into a folder; if that fails, one by one: a wheel that does not fit costs its own peer only."""
    found = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    command += ["--disable-pip-version-check", "--target", str(target)]
    if not found:
        print(f"--wheels: no wheel in {wheels}", file=sys.stderr)
    elif subprocess.run([*command, *found], capture_output=True).returncode:
        for wheel in found:
            done = subprocess.run([*command, wheel], capture_output=True, text=True)
            if done.returncode:
                print(f"{Path(wheel).name}: not installed: {done.stderr.strip()[-300:]}", file=sys.stderr)
    return target


def missing(needs_device: bool) -> str:
    """What this Python lacks for a run, and what to do about it; empty if nothing."""
    for name in ("torch", "triton", "safetensors", "packaging"):
        if importlib.util.find_spec(name) is None:
            return (
                f"{sys.executable} has no package {name}. Name a Python that has torch, Triton and Requanto's other "
                "requirements: make gpu-check PY=..."
            )
    import torch

    if not needs_device or torch.cuda.is_available():
        return ""
    dry = "`python -m gpu_check --dry` runs every path without one."
    if torch.version.cuda is None and torch.version.hip is None:
        return f"a GPU is needed, and torch {torch.__version__} of {sys.executable} is built without CUDA. {dry}"
    return f"a GPU is needed, and torch {torch.__version__} of {sys.executable} finds none. {dry}"


def header(options: argparse.Namespace) -> dict[str, Any]:
    """The first row: what was run."""
    try:
        found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        commit = found.stdout.strip() or None
    except OSError:  # a machine without git, a checkout without history
        commit = None
    asked = [f"--budget {options.budget:g}", *(["--only", *options.only] if options.only else [])]
    asked += [
        word for word, on in (("--dry", options.dry), ("--resume", options.resume), ("--table", options.table)) if on
    ]
    return {
        "case": "start", "stage": "start", "family": "start", "op": "start", "commit": commit,
        "command": " ".join(["python -m gpu_check", *asked]),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
