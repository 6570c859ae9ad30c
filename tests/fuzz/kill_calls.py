"""Runs a function in a forked child that is killed at, or fails at, its n-th call to the file system."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: audit events of calls that change or list files; `os.fsync` and the writer of safetensors, which have none, are wrapped
EVENTS = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown")
    + ("os.scandir", "os.listdir", "os.truncate")
)


@dataclass
class Result:
    """What became of the child.

    Attributes:
        killed: it was killed.
        calls: number of calls it made, if it was not killed.
        renames: which of them renamed a file.
        error: an exception's class and text; None: it succeeded or was killed.
    """

    killed: bool
    calls: int = 0
    renames: tuple[int, ...] = ()
    error: str | None = None


class _Calls:
    def __init__(self, at: int, fail: int | None, lasting: bool) -> None:
        self.at, self.fail, self.lasting = at, fail, lasting
        self.count = 0
        self.renames: list[int] = []

    def tick(self, half_written: str | None = None) -> None:
        self.count += 1
        if self.count < self.at or (self.count > self.at and not (self.fail and self.lasting)):
            return
        if self.fail is not None:
            raise OSError(self.fail, os.strerror(self.fail))
        if half_written is not None:
            descriptor = os.open(half_written, os.O_WRONLY)
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event not in EVENTS or (event == "open" and not isinstance(args[2], int)):
                return
            writes = event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if self.fail is None or (writes and event not in ("os.scandir", "os.listdir", "os.remove", "os.rmdir")):
                self.tick()
            if event == "os.rename":
                self.renames.append(self.count)

        sys.addaudithook(hook)
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            self.tick()
            fsync(descriptor)

        os.fsync = counted_fsync
        import safetensors.torch

        serialize = safetensors.torch.serialize_file

        def counted_serialize(tensors: Any, filename: Any, metadata: Any = None) -> None:
            self.tick()
            serialize(tensors, filename, metadata)
            if self.fail is None:
                self.tick(half_written=os.fspath(filename))

        safetensors.torch.serialize_file = counted_serialize


def run(function: Callable[[], None], at: int = 0, fail: int | None = None, lasting: bool = False) -> Result:
    """Calls a function in a child.

    Args:
        function: what to call.
        at: number of the call before which the child is killed; 0: never.
        fail: an errno with which this call fails instead, e.g. `errno.ENOSPC`.
        lasting: all later calls that write fail too.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        calls = _Calls(at or sys.maxsize, fail, lasting)
        error = None
        try:
            calls.install()
            function()
        except BaseException as found:
            error = f"{type(found).__name__}: {found}"
            if not isinstance(found, OSError):
                error += "\n" + "".join(traceback.format_exception(found)[-3:])
        os.write(writer, json.dumps([calls.count, calls.renames, error]).encode()[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    if not told:
        return Result(True)
    count, renames, error = json.loads(told)
    return Result(False, count, tuple(renames), error)


FAILURES = (errno.ENOSPC, errno.EIO, errno.EACCES)
