"""The CPU kernel cache on hosts that lack something: a home, a user's name, room, the right to run code, a compiler.

Each test is a fork that becomes such a host. The forward pass works, and says at most one line.
"""

import ctypes
import importlib.util
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from requanto.linear.cpu.aot import cache, calls, processes, trust
from requanto.runtime.settings import settings

_spec = importlib.util.spec_from_file_location("fuzz_cache", Path(__file__).parents[1] / "fuzz" / "fuzz_cache.py")
harness = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(harness)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="mounts and users as on Linux"),
    pytest.mark.skipif(cache.compiler() is None, reason="no C++ compiler: neither CXX nor torch's usual one is here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
needs_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root changes user and mounts")
NOBODY = 54321  # has no entry in passwd
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def kernels():
    return harness.intact_kernels()


@pytest.fixture
def wanted(monkeypatch):
    monkeypatch.setattr(settings, "compiled", False)
    return harness.product(*harness.example())


def mounted(place: Path, options: str) -> None:
    """Mounts an empty file system at ``place``, for this process alone."""
    new_namespace, private, noexec = 0x00020000, 1 << 18 | 1 << 14, 8
    flags, options = (noexec if "noexec" in options else 0), options.replace("noexec,", "")
    for failed in (
        LIBC.unshare(new_namespace),
        LIBC.mount(b"none", b"/", None, private, None),
        LIBC.mount(b"none", str(place).encode(), b"tmpfs", flags, options.encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "no mounts here")


def on(host, wanted, *, without_compiler=False):
    """What the forward pass makes of a host: the outcome and the line in the log."""

    def child():
        place = host()
        if without_compiler:
            for module in (cache, processes):
                module.compiler = lambda: None
        return meets(place, wanted)

    return harness.in_child(child)


def meets(place, wanted):
    handler = harness.Lines()
    logger = logging.getLogger("requanto")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    if place is not None:
        os.environ["REQUANTO_CACHE"] = str(place)
    harness.forget()
    processes.subprocess.Popen = None  # nothing is compiled
    found = harness.product(*harness.example())
    used = bool(cache._loaded)
    if not torch.equal(found, wanted) and not (used and torch.allclose(found, wanted, rtol=0.02, atol=0.5)):
        return "wrong", str((found - wanted).abs().max())
    return ("used" if used else "eager"), " | ".join(handler.lines)


def without_home():
    for name in ("HOME", "REQUANTO_CACHE", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


@needs_root
def test_a_user_without_a_name_or_a_home(wanted):
    def host():
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        without_home()

    outcome, line = on(host, wanted)
    assert outcome == "eager"
    assert line.count("requanto: ") == 1
    assert "no place for the kernel cache" in line


@needs_root
def test_kernels_that_root_compiled_for_an_image(kernels, wanted, tmp_path):
    """By a user without a name, a home or a compiler."""
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o001 == 0 and parent.owner() == "root":
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    place = tmp_path / "image" / "kernels"
    os.environ["REQUANTO_CACHE"], before = str(place), os.environ["REQUANTO_CACHE"]
    try:
        path = cache.path_of(harness.NAME, calls.SOURCES[harness.NAME])
        job = processes._Job(harness.NAME, path)
        job._start = lambda: None
        assert job.begin()  # makes the folder
        trust.write(path, kernels[harness.NAME])
        job.end()
    finally:
        os.environ["REQUANTO_CACHE"] = before

    def host():
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        without_home()
        return place

    assert on(host, wanted, without_compiler=True) == ("used", "")


@needs_root
@pytest.mark.parametrize("options", ["noexec,size=100m,mode=755", "size=1m,mode=755"])
def test_a_file_system_that_is_full_or_runs_no_code(options, wanted, tmp_path):
    def host():
        mounted(tmp_path, options)
        return tmp_path

    outcome, line = on(host, wanted)
    if "no mounts here" in line:
        pytest.skip("this container allows no mounts")
    assert outcome == "eager"
    assert ("mounted noexec" if "noexec" in options else "No space left on device") in line
    assert line.count("requanto: ") == 1


@needs_root
def test_a_whole_kernel_on_a_file_system_that_runs_no_code(kernels, wanted, tmp_path):
    def host():
        mounted(tmp_path, "noexec,size=100m,mode=755")
        os.environ["REQUANTO_CACHE"] = str(tmp_path)
        trust.write(cache.path_of(harness.NAME, calls.SOURCES[harness.NAME]), kernels[harness.NAME])
        return tmp_path

    outcome, line = on(host, wanted)
    if "no mounts here" in line:
        pytest.skip("this container allows no mounts")
    assert outcome == "eager"
    assert "could not be loaded" in line
    assert line.count("requanto: ") == 1


@needs_root
def test_temporary_files_cannot_run_code(kernels, wanted, tmp_path):
    """TMPDIR is not used when a kernel is loaded."""
    place = tmp_path / "kernels"
    place.mkdir(mode=0o755)

    def host():
        (tmp_path / "tmp").mkdir()
        mounted(tmp_path / "tmp", "noexec,size=4k")
        os.environ.update(TMPDIR=str(tmp_path / "tmp"), REQUANTO_CACHE=str(place))
        trust.write(cache.path_of(harness.NAME, calls.SOURCES[harness.NAME]), kernels[harness.NAME])
        return place

    outcome, line = on(host, wanted)
    if "no mounts here" in line:
        pytest.skip("this container allows no mounts")
    assert (outcome, line) == ("used", "")


COMPILERS = {
    "crashes": "kill -SEGV $$",
    "prints garbage": "head -c 1000 /dev/urandom; exit 1",
    "writes nothing": "exit 0",
    "never ends": "sleep 300 & wait",
}


@pytest.mark.parametrize("how", COMPILERS)
def test_whether_a_compiler_works(how, tmp_path, monkeypatch):
    """A compiler that never ends is stopped with its children, also where it is a script that waits for one."""
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\n: > {tmp_path}/ran\n{COMPILERS[how]}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"ccache {compiler}")
    monkeypatch.setattr(processes, "CHECK_SECONDS", 1.0)
    signal.alarm(60)
    try:
        assert processes._compiler_works(tmp_path) is (how == "writes nothing")
    finally:
        signal.alarm(0)
    assert (tmp_path / "ran").exists()
    assert shutil.which("g++")


def test_damaged_caches_and_forks(monkeypatch, capsys):
    """A few seeds of the harness; `tests/fuzz/fuzz_cache.py` runs many more."""
    monkeypatch.setattr(cache, "_make", cache._make)
    for name in ("_loaded", "_failed", "_building"):
        monkeypatch.setattr(cache, name, {})
    assert harness.main(["--count", "40", "--forks", "15", "--seed", "7"]) == 0, capsys.readouterr().out
