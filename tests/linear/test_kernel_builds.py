"""Processes, threads and forks that build the CPU kernels at the same time, and ends in the middle."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from kernel_cache import (
    STAND_IN,
    alive,
    fresh,
    in_child,
    kept,
    needs_compiler,
    never,
    original,
    script,
    torch_and_one_line,
    unix,
    usual_path,
)

from requanto.linear.cpu import library
from requanto_cpu import build, cache, load

pytestmark = [needs_compiler(), pytest.mark.usefixtures("fresh")]
__all__ = ["fresh"]


@unix
def test_processes_that_build_at_once(fresh, monkeypatch, tmp_path):
    """One builds, the others wait for it."""
    compiler = script(tmp_path / "g++", STAND_IN + "sleep 0.1")
    monkeypatch.setenv("LIST", str(tmp_path / "list"))
    monkeypatch.setenv("CXX", str(compiler))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(0 if cache.find().exists() else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "list").read_text().splitlines().count("linked") == 1


ENDS = """
    import os, signal, threading, time
    from pathlib import Path
    from requanto_cpu import cache
    cache.PACKAGED = Path(os.devnull) / "none"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    if {thread}:
        threading.Thread(target=cache.find).start()
        while not os.path.exists({started!r}):
            time.sleep(0.01)
    else:
        cache.find()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_build(fresh, tmp_path):
    """KeyboardInterrupt ends the compilers, and removes what they wrote."""
    started = tmp_path / "started"
    compiler = script(tmp_path / "g++", f"echo $$ > {started}.new; mv {started}.new {started}; sleep 300 & wait")
    code = textwrap.dedent(ENDS).format(thread=False, started=str(started))
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "CXX": str(compiler)}, stderr=subprocess.PIPE, text=True
    )
    try:
        for _ in range(1200):
            if started.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        assert started.exists(), process.communicate()[1][-2000:]
        hanging = int(started.read_text())
        assert alive(hanging)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGINT
        assert not alive(hanging)
        assert not list(fresh.glob(".build-*"))
    finally:
        process.kill()
        process.wait()


@unix
def test_a_process_that_was_killed_leaves_no_lock(fresh, monkeypatch, tmp_path):
    """Nor does a fork of it hold the lock."""
    path = cache.path_of(build.compilers()[0])
    fresh.mkdir(mode=0o755)
    read, write = os.pipe()

    def killed():
        with cache._locked(path):
            if os.fork() == 0:  # it lives on
                os.write(write, b"%d" % os.getpid())
                time.sleep(30)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL
    fork = int(os.read(read, 20))
    try:
        monkeypatch.setattr(build, "TIMEOUT", 5.0)
        with cache._locked(path):
            pass
    finally:
        os.kill(fork, signal.SIGKILL)


@unix
def test_a_lock_that_is_held_for_too_long(fresh, monkeypatch, caplog):
    monkeypatch.setattr(build, "TIMEOUT", 0.2)
    fresh.mkdir(mode=0o755)
    with cache._locked(usual_path()):
        torch_and_one_line(caplog, "has not built the kernels in 0 s")


@unix
def test_a_long_wait_is_explained(fresh, monkeypatch, caplog, tmp_path):
    """A model's first forward may wait for a build, or for another process that builds: one line says so."""
    monkeypatch.setattr(build, "PATIENCE", 0.05)
    assert build._run([["true"], ["sleep", "0.2"]], tmp_path) == [(0, "")] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "building the CPU kernels" in caplog.text
    caplog.clear()
    monkeypatch.setattr(build, "TIMEOUT", 0.2)
    fresh.mkdir(mode=0o755)
    with cache._locked(usual_path()), pytest.raises(cache.LibraryUnavailable), cache._locked(usual_path()):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "another process" in caplog.text


# Threads and forks.


class Slow:
    """In place of `build.build`: waits until it is told, then writes the library."""

    def __init__(self):
        self.begun, self.go, self.count = threading.Event(), threading.Event(), 0

    def __call__(self, target, compiler, only=None):
        self.count += 1
        self.begun.set()
        assert self.go.wait(30)
        target.write_bytes(original())
        return ["avx2"]


@pytest.fixture
def building(monkeypatch):
    """Another thread is building."""
    slow = Slow()
    monkeypatch.setattr(build, "build", slow)
    thread = threading.Thread(target=library.find)
    thread.start()
    assert slow.begun.wait(30)
    yield slow
    slow.go.set()
    thread.join(30)


def test_threads_wait_for_the_one_that_builds(building):
    found = []
    threads = [threading.Thread(target=lambda: found.append(library.find())) for _ in range(7)]
    for thread in threads:
        thread.start()
    assert not found
    building.go.set()
    for thread in threads:
        thread.join(30)
    assert len(found) == 7
    assert found[0] is not None
    assert len(set(map(id, found))) == 1
    assert building.count == 1


def test_threads_that_wait_for_nothing(monkeypatch, caplog):
    """Eight threads, one failure, one line."""
    tries = []

    def fails(*args, **how):
        tries.append(args)
        time.sleep(0.2)
        raise build.BuildError("it does not work")

    monkeypatch.setattr(build, "build", fails)
    monkeypatch.setenv("CXX", build.compilers()[0].command[0])
    threads = [threading.Thread(target=library.find) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    torch_and_one_line(caplog, "it does not work")
    assert len(tries) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_thread_is_forgotten(error, monkeypatch):
    with monkeypatch.context() as context:

        def fails(*args, **how):
            raise error

        context.setattr(build, "build", fails)
        with pytest.raises(error):
            library.find()
    kept()
    assert library.find() is not None


@unix
def test_a_fork_while_another_thread_builds(building, monkeypatch):
    """The child waits for no thread, and for no lock of its own file."""

    def child():
        monkeypatch.setenv("REQUANTO_CACHE", os.environ["REQUANTO_CACHE"] + "-child")
        kept()
        return library.find() is not None

    assert in_child(child) == 0

    def child_in_the_same_cache():
        threading.Timer(1.0, building.go.set).start()  # of the child alone
        return library.find() is not None

    building_in_parent = threading.Timer(0.5, building.go.set)
    building_in_parent.start()
    assert in_child(child_in_the_same_cache) == 0


@unix
def test_a_fork_after_use(monkeypatch):
    """The child has the loaded library."""
    kept()
    found = library.find()
    monkeypatch.setattr(cache, "find", never)
    assert in_child(lambda: library.find() is found and load.levels()) == 0
