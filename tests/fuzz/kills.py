"""Kills saves at every call to the file system, and lets calls fail; counts what is there afterwards.

    python tests/fuzz/kills.py --count 1500 --failures 500 --seed 0 --out kills.json

A save is killed with SIGKILL before its n-th call, for every n of every scenario if ``--count`` allows, else for a seeded
choice. Then the directory is loaded: it must hold the old checkpoint or the new one, with its companions; files of others
must be the same files; and after the next save nothing may be left behind. Calls that fail (no space, input/output error, no
permission) must leave the old checkpoint, or the new one if the save reports none. Prints a JSON summary; the exit status is
1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import kill_calls
from kill_scenarios import Scenario, debris, foreign, scenarios

Place = tuple[str, int, int | None, bool]


class Bench:
    """One scenario, with digests of its old, new and later state."""

    def __init__(self, name: str, scenario: Scenario, place: Path) -> None:
        self.name, self.scenario, self.place = name, scenario, place
        self.base = place.with_name(f"{place.name}-base")
        scenario.build(self.base)
        self.fresh()
        self.states = {scenario.state(place): "old"}
        result = kill_calls.run(lambda: scenario.save(place))
        if result.error is not None:
            raise RuntimeError(f"{name}: {result.error}")
        self.calls, self.renames = result.calls, result.renames
        self.fresh()
        self.writes = kill_calls.run(lambda: scenario.save(place), fail=errno.ENOSPC).calls
        self.states[scenario.state(place)] = "new"
        scenario.after(place / scenario.target)
        self.after = scenario.state(place)
        if debris(place) or len(self.states) != 2 or self.after in self.states:
            raise RuntimeError(f"{name}: {debris(place)} {self.states}")

    def fresh(self) -> None:
        """Restores the state before the save."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.base, self.place, symlinks=True)
        link = self.place / self.scenario.target
        if link.is_symlink():
            link.unlink()
            link.symlink_to(self.place / "elsewhere")

    def state(self) -> str:
        """Returns "old", "new" or what is wrong."""
        try:
            return self.states.get(self.scenario.state(self.place), "a mixture")
        except Exception as error:
            return f"no load: {type(error).__name__}: {error}"

    def one(self, at: int, fail: int | None = None, lasting: bool = False) -> tuple[str, list[str]]:
        """Kills (or fails) one save; returns what is there afterwards and a list of faults."""
        self.fresh()
        before = foreign(self.place, self.scenario)
        result = kill_calls.run(lambda: self.scenario.save(self.place), at, fail, lasting)
        found = self.state()
        faults = [] if found in ("old", "new") else [found]
        if fail is not None and result.error is None and found == "old":
            faults.append("no error, and nothing was saved")
        if result.error is not None and "Traceback" in result.error:
            faults.append(result.error)
        if foreign(self.place, self.scenario) != before:
            faults.append("a file of others was touched")
        try:
            self.scenario.after(self.place / self.scenario.target)
            if self.scenario.state(self.place) != self.after:
                faults.append("the next save is not what is there")
        except Exception as error:
            faults.append(f"the next save failed: {type(error).__name__}: {error}")
        if foreign(self.place, self.scenario) != before:
            faults.append("a file of others was touched by the next save")
        faults += [f"left behind: {name}" for name in debris(self.place)]
        return found, faults


def run(places: list[Place], benches: dict[str, Bench], seconds: float) -> dict[str, Any]:
    """Runs a list of kills and failures; returns the summary."""
    counts: dict[str, Counter] = {"killed": Counter(), "failed": Counter()}
    faults: list[dict[str, Any]] = []
    started = time.monotonic()
    done = 0
    for name, at, fail, lasting in places:
        if time.monotonic() - started > seconds:
            break
        found, wrong = benches[name].one(at, fail, lasting)
        counts["killed" if fail is None else "failed"][found if found in ("old", "new") else "wrong"] += 1
        done += 1
        faults += [{"scenario": name, "call": at, "errno": fail, "lasting": lasting, "fault": text} for text in wrong]
    return {
        "done": done,
        "killed": dict(counts["killed"]),
        "failed": dict(counts["failed"]),
        "calls": {name: bench.calls for name, bench in benches.items()},
        "seconds": round(time.monotonic() - started, 1),
        "faults": faults,
    }


def choose(benches: dict[str, Bench], kills: int, failures: int, seed: int) -> list[Place]:
    """Returns kills and failing calls in a seeded order; all there are, if fewer are there than asked for."""
    rng = random.Random(seed)
    killed: list[Place] = [
        (name, at, None, False) for name, bench in benches.items() for at in range(1, bench.calls + 1)
    ]
    failing: list[Place] = [
        (name, at, fail, lasting)
        for name, bench in benches.items()
        for at in range(1, bench.writes + 1)
        for fail in kill_calls.FAILURES
        for lasting in (False, True)
    ]
    rng.shuffle(killed)
    rng.shuffle(failing)
    return killed[:kills] + failing[:failures]


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1500, help="kills, at most")
    parser.add_argument("--failures", type=int, default=0, help="calls that fail, at most")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--only", help="part of a scenario's name")
    parser.add_argument("--out", type=Path, help="file for the summary; default: standard output only")
    options = parser.parse_args(argv)
    logging.getLogger("requanto").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="requanto-kills-") as folder:
        found = scenarios(Path(folder) / "shared")
        benches = {
            name: Bench(name, scenario, Path(folder) / str(number) / "place")
            for number, (name, scenario) in enumerate(found.items())
            if options.only is None or options.only in name
        }
        result = run(choose(benches, options.count, options.failures, options.seed), benches, options.minutes * 60)
    text = json.dumps({"seed": options.seed, **result}, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
