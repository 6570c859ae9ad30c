"""Runs cases in children, in stages within a budget of time, and appends a row to the file as soon as it is known."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from gpu_check.cases import STAGES, Case
from gpu_check.serve import Child

Row = dict[str, Any]
#: Makes a child: `Child` with everything but the setup.
Start = Callable[[Row], Child]
#: Processes that are started before it is their turn: importing takes longer than many families.
AHEAD = 2
#: Children that a family may lose.
MOST_DEATHS = 3
#: Share of the budget for compiling.
COMPILE_SHARE = 0.25


@dataclass
class Run:
    """One call: where rows go, when time is up, what is left out.

    after: called with each row that was added. ends: seconds at which a stage ends; late: at which its present family does.
    """

    file: Path
    budget: float
    start: Start
    dry: bool = False
    after: Callable[[Row], object] = lambda row: None
    show: Callable[[str], object] = print
    began: float = field(default_factory=time.monotonic)
    left_out: dict[str, int] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    late: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def append(self, row: Row) -> None:
        """Adds a row to the file at once: what comes after may never end."""
        row = row | {"t": round(self.seconds, 2)} | ({"dry": True} if self.dry else {})
        with self.lock, self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.after(row)
        if row.get("stage") != "compile":
            self.show(line_of(row))

    def compile(self, cases: Sequence[Case], processes: int) -> None:
        """Compiles what the cases need, in many processes at once: they share the caches of Triton and Inductor."""
        waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in to_compile(cases):
            waiting.put(case)
        count, deadline = waiting.qsize(), self.began + COMPILE_SHARE * self.budget
        workers = [
            threading.Thread(target=self._compile_some, args=(waiting, deadline)) for _ in range(min(processes, count))
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.append(
            {
                "case": "compile", "stage": "compiled", "family": "compile", "op": f"{count - waiting.qsize()} cases",
                "left": waiting.qsize(), "processes": len(workers), "s": round(self.seconds, 1),
            }
        )  # fmt: skip

    def _compile_some(self, waiting: queue.SimpleQueue[Case], deadline: float) -> None:
        child = None
        while time.monotonic() < deadline:
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                break
            child = child if child is not None and child.alive else self.start({"compiling": True})
            row = child.run(case.row(), min(90.0, max(5.0, deadline - time.monotonic())))
            self.append({**case.row(), "case": f"compile/{case.key}", "stage": "compile"} | row)
        if child is not None:
            child.stop()

    def measure(self, cases: Sequence[Case]) -> None:
        """Runs the cases one after the other, each family in a process of its own, which was started beforehand."""
        groups = [list(group) for _, group in groupby(cases, lambda case: (case.stage, case.family))]
        if self.dry:
            groups = [list(cases)]
        self.ends = self.shares({case.stage for case in cases})
        self.late = dict(self.ends)
        ahead: deque[Child] = deque()
        try:
            for index, group in enumerate(groups):
                while len(ahead) < min(1 + AHEAD, len(groups) - index) and not self._is_late(group[0]):
                    ahead.append(self.start({"compiling": False}))
                if (
                    group[0].stage == "peers"
                ):  # each has the same share: one that tunes for long costs none of the others'
                    left = sum(1 for one in groups[index:] if one[0].stage == "peers")
                    self.late["peers"] = self.seconds + (self.ends["peers"] - self.seconds) / left
                self._family(group, ahead)
        finally:
            for child in ahead:
                child.stop()

    def _family(self, group: Sequence[Case], ahead: deque[Child]) -> None:
        """Runs one family's cases in the first process that was started ahead."""
        child, deaths = None, 0
        try:
            for case in group:
                if self._is_late(case):
                    self.left_out[case.stage] = self.left_out.get(case.stage, 0) + 1
                    continue
                if deaths >= MOST_DEATHS:
                    self.append(case.row() | {"fault": f"not run: {deaths} processes of this family died before"})
                    continue
                if child is None or not child.alive:
                    child = ahead.popleft() if ahead else self.start({"compiling": False})
                left = self.budget - self.seconds
                self.append(case.row() | child.run(case.row(), min(case.limit, max(5.0, left + 5.0))))
                deaths += not child.alive
        finally:
            if child is not None:
                child.stop()

    def _is_late(self, case: Case) -> bool:
        return self.seconds > self.late[case.stage]

    def shares(self, stages: set[str]) -> dict[str, float]:
        """Seconds at which each of the stages ends: from now on they share what is left of the budget."""
        start, chosen, ends = self.seconds, [stage for stage in STAGES if stage in stages], {}
        total, passed = sum(STAGES[stage] for stage in chosen), 0.0
        for stage in chosen:
            passed += STAGES[stage]
            ends[stage] = start + (self.budget - start) * passed / total
        if "ceilings" in ends:  # nothing is judged without them
            ends["ceilings"] = self.budget
        return ends


#: Peers whose compiled kernels are kept on disk. The others tune when they are first called, which needs the GPU alone.
KEPT = ("humming", "torchao")


def to_compile(cases: Sequence[Case]) -> list[Case]:
    """The cases with kernels or a model to compile ahead of time; whole models first, each takes as long as many kernels.

    Peers compile only in a run without questions, where there is time for it.
    """
    own = [case for case in cases if case.do in ("product", "host")]
    whole = [case for case in cases if case.do == "model" and case.op.endswith("compiled")]
    others = [case for case in cases if case.do == "peer" and case.family in KEPT]
    return [*whole, *own, *([] if any(case.stage == "questions" for case in cases) else others)]


def line_of(row: Row) -> str:
    """A row as one line for the screen."""
    shape = f"{row['n']}x{row['k']} M={row['m']}" if row.get("m") else ""
    config = ",".join(f"{name}={value}" for name, value in row.get("config", {}).items())
    found = row.get("fault") or "  ".join(
        f"{name} {row[name]:.4g}" for name in ("us", "bf16_us", "rate", "error", "spread", "seconds") if name in row
    )
    return f"{row['t']:6.1f} {row['family']:16} {row['op']:18} {row.get('kind', ''):15} {shape:22} {config:34} {found}"
