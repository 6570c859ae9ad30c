"""Checkpoints of other libraries: what Requanto does with each, and what the format's own library does on this machine.

    python benchmarks/formats.py --peer-python all=/envs/peers/bin/python gptqmodel=/envs/gptq/bin/python
    python benchmarks/formats.py --only 'gguf-*' mlx --again         # some rows anew
    python benchmarks/formats.py --table                             # of the stored results, into docs/formats.md too

For each row of formats_rows.py: a writer makes the checkpoint with the format's own library where that runs on a CPU
(formats_writers, kept in the cache folder of the yardsticks, under formats/); a process of this Python opens it with
Requanto (formats_child.py); and each library that may open it does so in a process of its own without Requanto
(formats_peer.py). ``--peer-python`` names the Python of a library, ``all`` that of the others and of the writers. One
thread. Results are added to benchmarks/results/formats.json row by row; rows that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from common import RESULTS, command, machine
from formats_rows import ROWS, Row

HERE = Path(__file__).parent
OUT = RESULTS / "formats.json"
DOCUMENT = HERE.parent / "docs" / "formats.md"
LIMIT = 1200  # seconds for one process


def stored() -> dict[str, Any]:
    """The results of earlier runs."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {"rows": {}}


def keep(row: Row, **found: Any) -> None:
    """Adds to a row of the results, which are read again."""
    everything = stored()
    rows = everything["rows"]
    one = rows.setdefault(row.name, {})
    one |= {"format": row.format, "label": row.label, "base": row.base} | found
    everything["rows"] = {known.name: rows[known.name] for known in ROWS if known.name in rows}
    everything["machine"] = machine()
    commands = everything.setdefault("commands", [])
    said = command()
    for word in said.split():
        if "=/" in word:
            said = said.replace(word, f"{word.split('=')[0]}=PYTHON")
    if said not in commands:
        commands.append(said)
    part = OUT.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    part.replace(OUT)


def process(arguments: Sequence[str], own: bool, log: Path) -> str:
    """Runs a child.

    Args:
        own: whether it may see Requanto.
        log: what it prints.

    Returns:
        the last line it printed if it failed; empty if it did not.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "REQUANTO_FOREIGN": "always"}
    environment["PATH"] = os.pathsep.join([str(Path(arguments[0]).parent), os.environ.get("PATH", "")])
    paths = [str(HERE), *([os.environ["PYTHONPATH"]] if own and os.environ.get("PYTHONPATH") else [])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("w", encoding="utf-8") as written:
        try:
            done = subprocess.run(
                arguments, env=environment, cwd=HERE, stdout=written, stderr=written, timeout=LIMIT, check=False
            )
            failed = "" if done.returncode == 0 else f"ended with {done.returncode}: "
        except subprocess.TimeoutExpired:
            return f"no answer after {LIMIT} s"
        except OSError as error:
            return f"no such Python: {error.strerror}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return failed and failed + (lines or ["no message"])[-1][:300]


def checkpoint(row: Row, python: str, again: bool) -> Path:
    """The folder of a row's checkpoint, written if it is missing.

    Raises:
        RuntimeError: the writer failed.
    """
    from formats_bases import BASES, CACHE, ggufs

    folder = CACHE / row.name
    if again or not (folder / "written.json").exists():
        base = BASES[row.base]()
        setting = dict(row.setting)
        for name, value in setting.items():
            if isinstance(value, str) and value.startswith("GGUFS/"):
                setting[name] = str(ggufs() / value.removeprefix("GGUFS/"))
        CACHE.mkdir(parents=True, exist_ok=True)
        arguments = [python, "-m", "formats_writers", row.writer, str(folder), str(base), json.dumps(setting)]
        if failed := process(arguments, False, CACHE / f"{row.name}.log"):
            raise RuntimeError(f"the writer of {row.name} {failed} ({CACHE / f'{row.name}.log'})")
    return folder


def answer(arguments: list[str], own: bool, log: Path) -> dict[str, Any]:
    """What a child wrote to the file that is its last argument."""
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "answer.json"
        failed = process([*arguments, str(target)], own, log)
        found = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {"opens": False}
    if failed:
        return found | {"error": failed, "failed": found.get("failed", {}) | {"process": failed}}
    return found


def run(row: Row, pythons: dict[str, str], options: argparse.Namespace) -> None:
    """Runs what is missing of a row."""
    start = time.perf_counter()
    known = {} if options.again else stored()["rows"].get(row.name, {})
    folder = checkpoint(row, pythons["all"], options.write)
    log = folder.parent / f"{row.name}.log"
    keep(row, written=json.loads((folder / "written.json").read_text(encoding="utf-8")))
    if "own" in options.sides and "requanto" not in known:
        keep(row, requanto=answer([sys.executable, str(HERE / "formats_child.py"), str(folder)], True, log))
    peers = dict(stored()["rows"][row.name].get("peers", {}))
    for library in row.peers:
        python = pythons.get(library, pythons["all"])
        if "peers" in options.sides and (options.again or library not in peers):
            peers[library] = answer([python, str(HERE / "formats_peer.py"), library, str(folder)], False, log)
    keep(row, peers={library: peers[library] for library in row.peers if library in peers})
    print(f"{row.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Runs the selected rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", nargs="*", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="names, patterns, or formats")
    parser.add_argument("--sides", nargs="+", default=["own", "peers"], choices=["own", "peers", "write"])
    parser.add_argument("--again", action="store_true", help="run rows again that have results")
    parser.add_argument("--write", action="store_true", help="write the checkpoints again, too")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--table", action="store_true", help="print the stored results and stop")
    options = parser.parse_args()
    if options.table:
        import formats_report

        print(formats_report.tables(stored()))
        if DOCUMENT.exists():
            formats_report.into(DOCUMENT, stored())
        return
    rows = [row for row in ROWS if any(fnmatch(row.name, one) or row.format == one for one in options.only)]
    if options.list or not rows:
        print("\n".join(f"{row.name}: {json.dumps(asdict(row))}" for row in ROWS))
        raise SystemExit(None if rows else "no such row")
    pythons = {"all": sys.executable} | dict(pair.split("=", 1) for pair in options.peer_python)
    failures = []
    for row in rows:
        try:
            run(row, pythons, options)
        except RuntimeError as error:
            failures.append(str(error))
            print(error, file=sys.stderr, flush=True)
    if failures:
        raise SystemExit(f"{len(failures)} rows failed")


if __name__ == "__main__":
    main()
