"""Makes packages of kernels, each in a Python of its own: export, AOTInductor, comparison with the source.

The children end with this process, however it ends: each holds the reading end of a pipe, and when the other end is
closed it removes its folder and kills its own process group, compilers included. This process waits in short steps, so
an interrupt is heard at once; it holds no lock of threads.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from requanto.linear.cpu.aot.trust import (
    WITHOUT,
    CannotBeMade,
    KernelUnavailable,
    intact,
    refuse_noexec,
    refuse_others,
    write,
)

logger = logging.getLogger(__name__)

#: Seconds that making a kernel may take: ten times what it takes on two busy cores.
PATIENCE = 600.0
#: Seconds between two looks at the children.
STEP = 0.05
#: Programs that start a compiler; torch takes the compiler alone.
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}
_FOLDER = ".build-"
#: Bytes that making a kernel takes for a while; 3 MB stay.
ROOM = 64 * 2**20


def compiler() -> str | None:
    """The C++ compiler: that of $CXX, without a launcher before it or options behind it, else torch's usual one.

    None where it is not there.
    """
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    chosen = os.environ.get("CXX") or usual
    if found := shutil.which(chosen):
        return found
    try:
        words = [word for word in shlex.split(chosen) if Path(word).stem not in _LAUNCHERS]
    except ValueError:  # a quotation mark without its other one
        return None
    return shutil.which(words[0]) if words else None


class _Job:
    """One kernel that is being made."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path, self.work = name, path, Path()
        self.process: subprocess.Popen[bytes] | None = None
        self.until = time.monotonic() + PATIENCE
        self._lock: Any = None
        self._made_by = os.getpid()

    def begin(self) -> bool | None:
        """True: it runs; None: it is made already; False: another process makes it.

        Raises:
            CannotBeMade: there is no place to write, or Python does not start.
            KernelUnavailable: another process makes it, for longer than it should take.
        """
        from filelock import FileLock, Timeout  # torch needs it too

        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # native code: nobody else writes here
            refuse_others(self.path.parent)
            lock = FileLock(f"{self.path}.lock")
            with contextlib.suppress(NotImplementedError):  # a file system without locks: made twice at worst
                lock.acquire(timeout=0)
            self._lock = lock
            if intact(self.path):
                return None
            self._start()
        except Timeout:
            if time.monotonic() > self.until:
                raise self._late("another process, which holds its lock, has not made it in") from None
            return False
        except OSError as error:
            raise self._no_place(error) from error
        return True

    def _start(self) -> None:
        _sweep(self.path.parent)
        if shutil.disk_usage(self.path.parent).free < ROOM:  # said now, not in a minute by a compiler
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        refuse_noexec(self.path.parent)
        # Beside the packages, not in TMPDIR: where the one lets code be loaded, so does the other.
        self.work = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=self.path.parent))
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("TORCHINDUCTOR_", "TORCH_COMPILE"))
        }
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TMPDIR": str(self.work),
            "CUDA_VISIBLE_DEVICES": "",  # nothing here is an accelerator's business
            "REQUANTO_COMPILE": "0",
        }
        if "CXX" in kept:
            environment["CXX"] = compiler() or ""
        command = [sys.executable, "-m", "requanto.linear.cpu.aot.build", str(self._fresh), self.name, str(os.getpid())]
        with (self.work / "log").open("wb") as log:
            try:
                self.process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,  # closed when this process ends
                    stdout=log,
                    stderr=log,
                    cwd=self.work,
                    start_new_session=True,  # a group of its own: compilers end with it
                )
            except OSError as error:
                why = f"making the kernel {self.name!r} failed: {sys.executable} did not start: {error}"
                raise CannotBeMade(why) from error
        self.until = time.monotonic() + PATIENCE

    @property
    def _fresh(self) -> Path:
        return self.work / "kernel.so"

    def finished(self) -> bool:
        """True once the child has ended and its package lies in its place.

        Raises:
            CannotBeMade: the compiler does not work, or there is no place to write.
            KernelUnavailable: it failed by its own fault, or for lack of time.
        """
        status = self.process.poll() if self.process is not None else 0
        if status is None:
            if time.monotonic() > self.until:
                raise self._late("it takes longer than")
            return False
        try:
            if status or not self._fresh.exists():
                log = (self.work / "log").read_text(errors="replace")
                why = f"making the kernel {self.name!r} failed (exit status {status}): {_telling(log)}"
                here = _compiles(self.work) and shutil.disk_usage(self.work).free >= ROOM // 2
                raise KernelUnavailable(why) if here else CannotBeMade(why)
            write(self.path, self._fresh.read_bytes())
        except OSError as error:
            raise self._no_place(error) from error
        return True

    def end(self) -> None:
        """Nothing of it is left but the package."""
        if os.getpid() != self._made_by:  # forked: they are the parent's
            return
        if self.process is not None:
            if self.process.poll() is None:
                _kill(self.process)
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process = None
        if self.work.name.startswith(_FOLDER):
            shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()
            self._lock = None

    def _late(self, why: str) -> KernelUnavailable:
        return KernelUnavailable(f"the kernel {self.name!r} could not be made: {why} {PATIENCE:.0f} s")

    def _no_place(self, error: OSError) -> CannotBeMade:
        return CannotBeMade(
            f"the kernel {self.name!r} cannot be kept in {self.path.parent}: {error}. Set REQUANTO_CACHE to a directory "
            f"that can be written, {WITHOUT}."
        )


def make(paths: dict[str, Path]) -> None:
    """Writes the packages of kernels, each made by a process of its own, as many at a time as there are processors.

    Raises:
        CannotBeMade: no compiler that works, or no place to write.
        KernelUnavailable: one of these kernels failed, by its own fault or for lack of time. The others are made.
    """
    waiting = [_Job(name, path) for name, path in paths.items()]
    jobs, running, errors = list(waiting), [], []
    most, process, said = os.cpu_count() or 1, os.getpid(), False

    def step(of: Callable[[], bool | None]) -> bool | None:
        try:
            return of()
        except KernelUnavailable as error:
            errors.append(error)
            return None

    try:
        while waiting or running:
            for job in running[:]:
                if step(job.finished) is not False:
                    running.remove(job)
                    job.end()
            for job in waiting[: most - len(running)] if len(running) < most else []:
                begun = step(job.begin)
                if begun and not said:
                    said = True
                    logger.warning(
                        "requanto: compiling %s for the CPU, once on this machine: 20 s or more. They are kept in %s; "
                        "REQUANTO_COMPILE=0 does without.",
                        ", ".join(repr(name) for name in paths),
                        job.path.parent,
                    )
                if begun is not False:
                    waiting.remove(job)
                    running.append(job) if begun else job.end()
            if any(isinstance(error, CannotBeMade) for error in errors):
                waiting.clear()  # they would fail as well
            if waiting or running:
                time.sleep(STEP)
            if os.getpid() != process or not threading.main_thread().is_alive():
                raise KernelUnavailable("kernels are not made any more: the process that makes them ends")
    finally:
        for job in jobs:
            job.end()
    if errors:
        raise next((error for error in errors if isinstance(error, CannotBeMade)), errors[0])


def _telling(log: str) -> str:
    """The line of a log that says what went wrong, and its end."""
    lines = log.strip().splitlines() or ["it said nothing"]
    told = [line for line in lines if "error" in line.lower()] or lines
    return "\n".join([told[-1].strip(), *lines[-15:]])


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _sweep(folder: Path) -> None:
    """Removes folders that were left when a machine went down: nothing that works is that old."""
    for left in folder.glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 4 * PATIENCE:
                shutil.rmtree(left, ignore_errors=True)


def _compiles(work: Path) -> bool:
    """Whether the compiler does at all: then it was this kernel's fault."""
    source = work / "nothing.cpp"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        source.write_text("int main() { return 0; }\n")
        command = [compiler() or "", str(source)]
        return not subprocess.run(command, capture_output=True, timeout=60, check=False, cwd=work).returncode
    return False
