"""Accuracy at given bits, compared with other libraries, on the reporting half of the yardsticks.

    python benchmarks/accuracy.py --peer-python hqq=/envs/peers/bin/python sdnq=/envs/peers/bin/python ...
    python benchmarks/accuracy.py --only requanto/int4 hqq --models reactions causal      # adds to the stored results
    python benchmarks/accuracy.py --table --plot docs/images/accuracy.png               # of the stored results

Each library quantizes the Linear layers of each model by its own public call, in the Python that ``--peer-python`` names for
it (default: this one), which needs torch, transformers, safetensors and the library. The dequantized weights are put into
the float model and measured here (`yardsticks.measure`): weights are compared, not kernels. If a library is missing or
fails, its row contains the reason. Rows with samples get `yardsticks.samples`.

Every finished row is stored in benchmarks/results/accuracy.json, and is not measured again unless ``--again`` is given. One
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import ROWS, Row
from common import RESULTS, command, machine
from safetensors.torch import load_file
from yardsticks import REPORT
from yardsticks.makers import MAKERS
from yardsticks.measure import CLASSES, LANGUAGE, LEFT_FLOAT, figures, load
from yardsticks.samples import samples

OUT = RESULTS / "accuracy.json"
CHILD = Path(__file__).with_name("accuracy_child.py")
#: models that all libraries quantize; convolutions are left out
MODELS = tuple(name for name in REPORT["models"] if name != "convolutional")
SMALL = tuple(name for name in MODELS if name != "gemma")


def stored() -> dict[str, Any]:
    """The results of earlier runs."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"rows": {}}


def keep(row: Row, model: str, found: dict[str, Any], sizes: dict[str, int]) -> None:
    """Adds the figures of a row to the results, which are read again."""
    everything = stored()
    rows = everything["rows"]
    one = rows.setdefault(row.name, {"models": {}})
    one |= {"library": row.library, "label": row.label, "setting": row.setting, "samples": row.samples}
    if version := found.pop("version", None):
        one["version"] = version
    one["models"][model] = found
    order = [known.name for known in ROWS if known.name in rows]
    everything["rows"] = {name: rows[name] for name in order}  # drops rows that are no longer in ROWS
    everything["sizes"], everything["machine"] = sizes, machine()
    everything.setdefault("commands", [])
    said = re.sub(r"=/\S+", "=PYTHON", command())
    if said not in everything["commands"]:
        everything["commands"].append(said)
    part = OUT.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    part.replace(OUT)


def wanted(row: Row, model: str, named: bool, again: bool) -> bool:
    """Whether to run a row on a model: not what is known, and on the large model no extra rows unless they are named."""
    if row.decoders and model not in LANGUAGE:
        return False
    if row.extra and not named and model not in SMALL:
        return False
    return again or model not in stored()["rows"].get(row.name, {}).get("models", {})


def children(tasks: Sequence[tuple[Row, str]], python: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Runs the tasks of one library in its own process; yields its answers, one at a time.

    A process that dies answers the task at which it died with the reason; the others run in a new one.
    """
    rest = list(tasks)
    while rest:
        job = {"left": LEFT_FLOAT, "tasks": [_task(row, model, folder) for row, model in rest]}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = os.pathsep.join([str(Path(python).parent), os.environ.get("PATH", "")])
        if python != sys.executable:
            environment["PYTHONPATH"] = ""  # another library's Python must not see Requanto's sources
        with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
            # Libraries print to stdout, one of them at the start of Python.
            read, write = os.pipe()
            try:
                child = subprocess.Popen(
                    [python, str(CHILD), str(folder / "job.json"), str(write)],
                    env=environment, cwd=folder, pass_fds=[write], text=True,
                    stdin=subprocess.PIPE, stdout=errors, stderr=errors,
                )  # fmt: skip
            except OSError as error:
                os.close(read)
                yield from ({"row": r.name, "model": m, "failed": f"no such Python: {error.strerror}"} for r, m in rest)
                return
            finally:
                os.close(write)
            assert child.stdin is not None
            with os.fdopen(read, encoding="utf-8") as answers:
                while rest and (line := answers.readline()):
                    yield json.loads(line)
                    rest.pop(0)
                    child.stdin.write("\n")
                    child.stdin.flush()
            child.stdin.close()
            child.wait()
            if rest:
                errors.seek(0)
                said = (errors.read().strip().splitlines() or ["no message"])[-1][:300]
                row, model = rest.pop(0)
                yield {"row": row.name, "model": model, "failed": f"ended with {child.returncode}: {said}"}


def _task(row: Row, model: str, folder: Path) -> dict[str, Any]:
    inputs = folder / f"{model}-samples.pt"
    if not inputs.exists():
        torch.save(samples(model), inputs)
    return {
        "row": {"name": row.name, "library": row.library, "setting": row.setting},
        "model": model,
        "class": CLASSES[model],
        "path": str(MAKERS[model]().resolve()),
        "samples": str(inputs),
        "out": str(folder / "weights.safetensors"),
    }


def measured(answer: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The figures of the weights that a child wrote."""
    file = Path(answer.pop("file"))
    model = load(answer["model"])
    start = time.perf_counter()
    with torch.no_grad():
        for name, value in load_file(file).items():
            model.get_parameter(name).copy_(value)
    file.unlink()
    found = figures(answer["model"], model, **(sizes if answer["model"] in LANGUAGE else {}))
    return {name: round(value, 6) for name, value in found.items()} | {
        "measure_seconds": round(time.perf_counter() - start, 1)
    }


def main() -> None:
    """Runs the selected rows, library after library."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", nargs="*", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names, patterns, or libraries")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--again", action="store_true", help="measure rows again that have figures")
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--questions", type=int, default=0, help="multiple choice, on both texts together")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="print the stored results and stop")
    parser.add_argument("--plot", type=Path, help="draw the stored results and stop")
    options = parser.parse_args()
    if options.table or options.plot:
        import accuracy_report

        if options.table:
            print(accuracy_report.tables(stored()))
        if options.plot:
            accuracy_report.draw(stored(), options.plot)
        return
    pythons = dict(pair.split("=", 1) for pair in options.peer_python)
    rows = [row for row in ROWS if any(fnmatch(row.name, one) or row.library == one for one in options.only)]
    unknown = set(pythons) - {row.library for row in ROWS}
    if options.list or not rows or unknown:
        print("\n".join(row.name for row in ROWS))
        raise SystemExit(
            f"no library is called {', '.join(sorted(unknown))}" if unknown else not rows and "no such row"
        )
    torch.set_num_threads(1)
    sizes = {"tokens": options.tokens, "asked": options.questions}
    named = options.only != ["*"]
    for library in dict.fromkeys(row.library for row in rows):
        own = [row for row in rows if row.library == library]
        tasks = [(r, m) for m in options.models for r in own if wanted(r, m, named, options.again)]
        with tempfile.TemporaryDirectory() as folder:
            for answer in children(tasks, pythons.get(library, sys.executable), Path(folder)):
                if "file" in answer:
                    answer |= measured(answer, sizes)
                name = answer.pop("row")
                row = next(row for row in own if row.name == name)
                print(f"{row.name} {json.dumps(answer)}", file=sys.stderr, flush=True)
                keep(row, answer.pop("model"), answer, sizes)


if __name__ == "__main__":
    main()
