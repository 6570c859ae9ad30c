"""Child processes: started ahead of time, given one case at a time, ended when it takes too long, replaced when they die."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]
CHILD = (sys.executable, "-u", "-m", "gpu_check.child")
#: Longest start of a child: the imports and the device's context.
START_S = 90.0


class Child:
    """One process of `child.py` (or a stand-in). It starts at once, and is asked for its first case when it is ready.

    Args:
        setup: its first line: ``{"dry": ..., "compiling": ...}``.
        environment: variables of the process.
        log: where the end of its errors goes if a case fails.
    """

    def __init__(self, setup: Row, environment: dict[str, str], log: TextIO, command: tuple[str, ...] = CHILD) -> None:
        self.log = log
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.ready = False
        self._send(setup)

    def run(self, case: Row, limit: float) -> Row:
        """The case's row. A crash or the limit gives a row with ``fault``, and ends the process (`alive`)."""
        start = time.monotonic()
        if not self.ready:
            first = self._receive(START_S)
            if "fault" in first:
                return first | {"fault": f"no child: {first['fault']}"}
            self.ready = True
        self._send(case)
        row = self._receive(limit)
        if row.get("fault"):
            print(f"--- {case.get('case', case)}: {row['fault']}\n{self._tail()}", file=self.log, flush=True)
        if row.get("broken"):
            self.stop()
        return row if "s" in row else row | {"s": round(time.monotonic() - start, 3)}

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Ends the process and all it started."""
        for wait, word in ((0.0, signal.SIGTERM), (1.0, signal.SIGKILL)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, word)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a kernel that never ends may hold the process
            self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _read(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stdout:  # type: ignore[union-attr]
                self.lines.put(line)
        self.lines.put(None)

    def _send(self, value: Row) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died: the next line that is waited for does not come
            self.process.stdin.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def _receive(self, limit: float) -> Row:
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            last = self._last_line()
            self.stop()
            return {"fault": f"took longer than {limit:.0f} s, ended; last line of stderr: {last}"}
        if line is None:
            code = self.process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return {"fault": f"the process died ({how}); last line of stderr: {self._last_line()}"}
        return json.loads(line)

    def _tail(self, lines: int = 40) -> str:
        try:
            self.errors.seek(0)
            return "".join(self.errors.readlines()[-lines:])
        except (OSError, ValueError):
            return ""

    def _last_line(self) -> str:
        found = [line for line in self._tail().splitlines() if line.strip()]
        return found[-1].strip()[:300] if found else "none"


def environment(root: Path, *, dry: bool, cache: Path, late: Path | None = None) -> dict[str, str]:
    """Variables of a child: this checkout first on the path, ``late`` (other libraries) after all that is installed.

    Args:
        cache: folder of the user's tuned tiles.
    """
    paths = [str(root / part) for part in ("src", "kernels", "benchmarks")]
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *before]),
        "PYTHONUNBUFFERED": "1",
        "REQUANTO_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # the same in all, since it is a part of the cache's key
    }
    if late is not None:
        found["GPU_CHECK_WHEELS"] = str(late)
    if dry:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    else:
        found.pop("TRITON_INTERPRET", None)
    return found
