"""What the tests of the kernel cache share: a process that has loaded nothing, with a cache of its own."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import requanto_cpu
from requanto.linear.cpu import library
from requanto.runtime.settings import settings
from requanto_cpu import build, cache, load, trust

unix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes on Windows")
needs_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")

#: Compiles nothing: writes empty files, and the names of what it was to write into a list.
STAND_IN = """
for word; do
    if [ "$before" = -o ]; then : > "$word"; echo "${word##*/}" >> "$LIST"; fi
    before=$word
done
"""


def needs_compiler() -> pytest.MarkDecorator:
    """Skips, with a reason, where the library cannot be built."""
    try:
        build.compilers()
    except build.BuildError as error:
        return pytest.mark.skip(reason=f"no kernels can be built: {error}")
    return pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@functools.cache
def original() -> bytes:
    """The bytes of the library that all tests share."""
    return requanto_cpu.build_all().read_bytes()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has loaded nothing, and an empty cache of its own; returns its folder."""
    original()
    monkeypatch.setattr(settings, "compiled", None)
    for module, names in ((load, ("_loaded", "_path", "_failed")), (library, ("_library", "why_not"))):
        for name in names:
            monkeypatch.setattr(module, name, None)
    monkeypatch.setattr(library, "_is_whole", lambda *_: True, raising=False)
    monkeypatch.setattr(cache, "PACKAGED", Path(os.devnull) / "none")
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "kept"))
    monkeypatch.delenv("REQUANTO_CPU", raising=False)
    return tmp_path / "kept"


def usual_path() -> Path:
    """Where this process looks for the library, and builds it: with the level of this processor alone."""
    return cache.path_of(build.compilers()[0], load._needed(""))


def kept(path: Path | None = None) -> Path:
    """A good library in this test's cache: a copy of the shared one, with the mark of its name."""
    path = usual_path() if path is None else path
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    trust.write(path, original() + trust.mark(path.name))
    return path


def never(*args: object, **how: object) -> None:
    """In place of what must not be called."""
    raise AssertionError("this was not to be called")


def torch_and_one_line(caplog: pytest.LogCaptureFixture, why: str) -> None:
    """There are no kernels, and the log says so once."""
    with caplog.at_level(logging.INFO):
        assert library.find() is None
        assert library.find() is None
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert len(lines) == 1, lines
    assert why in lines[0]
    assert "\n" not in lines[0]
    assert load._loaded is None


def in_child(function: Callable[[], object], seconds: int = 20) -> int:
    """The exit status of a fork that runs it: 0 if it returns something true; it is ended where it stands still."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            status = 0 if function() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def alive(process: int) -> bool:
    """Whether a process runs, by /proc: also one that is not this process's child."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def script(path: Path, text: str) -> Path:
    """Writes a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
