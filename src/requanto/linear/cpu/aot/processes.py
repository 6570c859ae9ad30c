"""Compiles kernels, each in a subprocess: torch.export, AOTInductor, comparison with the source.

The subprocesses end with this process, however it ends: each reads from a pipe, and when this process's end is closed, it
removes its folder and kills its own process group, including compilers. This process polls at short intervals, so that
KeyboardInterrupt works, and holds no thread lock meanwhile.
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
    OR_DISABLE,
    CannotBeMade,
    KernelUnavailable,
    check_not_noexec,
    check_owner_and_mode,
    intact,
    mark,
    write,
)

logger = logging.getLogger(__name__)

#: Most seconds for compiling a kernel: ten times what it takes on two busy cores.
TIMEOUT = 600.0
#: Most seconds for compiling an empty program.
CHECK_SECONDS = 60.0
#: Seconds between two polls of the subprocesses.
POLL_SECONDS = 0.05
#: Compiler launchers in $CXX, which torch does not support.
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}
_FOLDER = ".build-"
#: Free disk space in bytes that compiling a kernel needs; the library takes 3 MB.
MIN_FREE_BYTES = 64 * 2**20


def compiler() -> str | None:
    """Path of the C++ compiler: $CXX without launchers and options, else torch's default; None if it does not exist."""
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    chosen = os.environ.get("CXX") or usual
    if found := shutil.which(chosen):
        return found
    try:
        words = [word for word in shlex.split(chosen) if Path(word).stem not in _LAUNCHERS]
    except ValueError:  # unbalanced quotation marks
        return None
    return shutil.which(words[0]) if words else None


class _Job:
    """One kernel that is being compiled."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path, self.work = name, path, Path()
        self.process: subprocess.Popen[bytes] | None = None
        self.until = time.monotonic() + TIMEOUT
        self._lock: Any = None
        self._made_by = os.getpid()

    def begin(self) -> bool | None:
        """Starts the subprocess. True: started; None: the kernel is in the cache; False: another process compiles it.

        Raises:
            CannotBeMade: the cache cannot be written, or Python does not start.
            KernelUnavailable: another process has been compiling it for too long.
        """
        from filelock import FileLock, Timeout  # a dependency of torch

        try:
            # Only this user may write native code here; others may read it, as those of an image in which root compiled it.
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            check_owner_and_mode(self.path.parent)
            lock = FileLock(f"{self.path}.lock")
            with contextlib.suppress(NotImplementedError):  # no locks on this file system: may be compiled twice
                lock.acquire(timeout=0)
            self._lock = lock
            if intact(self.path):
                return None
            self._start()
        except Timeout:
            if time.monotonic() > self.until:
                raise self._timed_out("another process holds its lock and has not compiled it in") from None
            return False
        except OSError as error:
            raise self._cannot_write(error) from error
        return True

    def _start(self) -> None:
        _remove_stale_folders(self.path.parent)
        # Checked now, because compilation would fail only after a minute.
        if shutil.disk_usage(self.path.parent).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        check_not_noexec(self.path.parent)
        # In the cache folder, not in TMPDIR: code can be loaded from it (checked above).
        self.work = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=self.path.parent))
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("TORCHINDUCTOR_", "TORCH_COMPILE"))
        }
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TMPDIR": str(self.work),
            "CUDA_VISIBLE_DEVICES": "",
            "REQUANTO_COMPILE": "0",
        }
        if "CXX" in inherited:
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
                    start_new_session=True,  # its own process group, so that its compilers can be killed with it
                )
            except OSError as error:
                why = f"compiling the kernel {self.name!r} failed: {sys.executable} did not start: {error}"
                raise CannotBeMade(why) from error
        self.until = time.monotonic() + TIMEOUT

    @property
    def _fresh(self) -> Path:
        return self.work / "kernel.so"

    def finished(self) -> bool:
        """True if the subprocess has ended and the library is in the cache; False if it is still running.

        Raises:
            CannotBeMade: the compiler does not work, or the cache cannot be written.
            KernelUnavailable: compiling this kernel failed or took too long.
        """
        status = self.process.poll() if self.process is not None else 0
        if status is None:
            if time.monotonic() > self.until:
                raise self._timed_out("compiling it takes longer than")
            return False
        try:
            if status or not self._fresh.exists():
                log = (self.work / "log").read_text(errors="replace")
                why = f"compiling the kernel {self.name!r} failed (exit status {status}): {_error_text(log)}"
                here = _compiler_works(self.work) and shutil.disk_usage(self.work).free >= MIN_FREE_BYTES // 2
                raise KernelUnavailable(why) if here else CannotBeMade(why)
            write(self.path, self._fresh.read_bytes() + mark(self.path.name))
        except OSError as error:
            raise self._cannot_write(error) from error
        return True

    def end(self) -> None:
        """Ends the subprocess, removes its folder and releases the lock."""
        if os.getpid() != self._made_by:  # in a fork: they belong to the parent
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

    def _timed_out(self, why: str) -> KernelUnavailable:
        return KernelUnavailable(f"the kernel {self.name!r} could not be compiled: {why} {TIMEOUT:.0f} s")

    def _cannot_write(self, error: OSError) -> CannotBeMade:
        return CannotBeMade(
            f"the kernel {self.name!r} cannot be written to {self.path.parent}: {error}. Set REQUANTO_CACHE to a writable "
            f"directory, {OR_DISABLE}."
        )


def make(paths: dict[str, Path]) -> None:
    """Compiles kernels in subprocesses, as many at a time as there are CPUs, and writes them to ``paths``.

    Raises:
        CannotBeMade: no working compiler, or the cache cannot be written.
        KernelUnavailable: one kernel failed or took too long; the others are written.
    """
    waiting = [_Job(name, path) for name, path in paths.items()]
    jobs, running, errors = list(waiting), [], []
    most, process, logged = os.cpu_count() or 1, os.getpid(), False

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
                if begun and not logged:
                    logged = True
                    logger.warning(
                        "requanto: compiling CPU kernels %s, once on this machine, for 20 s or more. They are cached in %s. "
                        "REQUANTO_COMPILE=0 disables them.",
                        ", ".join(repr(name) for name in paths),
                        job.path.parent,
                    )
                if begun is not False:
                    waiting.remove(job)
                    running.append(job) if begun else job.end()
            if any(isinstance(error, CannotBeMade) for error in errors):
                waiting.clear()  # the others would fail for the same reason
            if waiting or running:
                time.sleep(POLL_SECONDS)
            if os.getpid() != process or not threading.main_thread().is_alive():
                raise KernelUnavailable("compilation of kernels was stopped because the process ends")
    finally:
        for job in jobs:
            job.end()
    if errors:
        raise next((error for error in errors if isinstance(error, CannotBeMade)), errors[0])


def _error_text(log: str) -> str:
    """The last line with an error in a log, followed by the end of the log."""
    lines = log.strip().splitlines() or ["no output"]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return "\n".join([errors[-1].strip(), *lines[-15:]])


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _remove_stale_folders(folder: Path) -> None:
    """Removes folders left by a crash of the machine: those older than any compilation can be."""
    for left in folder.glob(f"{_FOLDER}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 4 * TIMEOUT:
                shutil.rmtree(left, ignore_errors=True)


def _compiler_works(work: Path) -> bool:
    """True if the compiler builds an empty program, so that a failure concerns this kernel only."""
    source = work / "nothing.cpp"
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        source.write_text("int main() { return 0; }\n")
        process = subprocess.Popen([compiler() or "", str(source)], cwd=work, start_new_session=True, **quiet)
        try:
            return process.wait(CHECK_SECONDS) == 0
        finally:
            _kill(process)  # with its children: a compiler may be a script that waits for another program
    return False
