"""A fork beside other threads: the child waits for nothing that only they could end."""

import ast
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import requanto
from requanto.runtime import fork

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def in_child(function) -> int:
    """The exit status of a fork that runs it; it is ended after 20 seconds."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("kind", [threading.Lock, threading.RLock])
def test_a_lock_that_another_thread_holds(kind):
    lock, held, go = fork.new_in_child(kind()), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    try:
        assert in_child(lambda: lock.acquire(timeout=15) or 1 / 0) == 0
        assert not lock.acquire(timeout=0.01)  # still held in the parent
    finally:
        go.set()
        thread.join()


def test_a_module_that_another_thread_imports(tmp_path, monkeypatch):
    (tmp_path / "imported_slowly.py").write_text("import time\ntime.sleep(0.7)\nready = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fork, "PACKAGES", {*fork.PACKAGES, "imported_slowly"})
    thread = threading.Thread(target=lambda: __import__("imported_slowly"))
    thread.start()
    while "imported_slowly" not in sys.modules:
        assert thread.is_alive()
    try:
        assert in_child(lambda: __import__("imported_slowly").ready) == 0
    finally:
        thread.join()
        del sys.modules["imported_slowly"]


def test_a_fork_does_not_wait_long_for_other_imports(tmp_path, monkeypatch):
    """Of a module that is none of ours, and of one that never ends."""
    (tmp_path / "a_module_of_an_application.py").write_text("import threading\nthreading.go.wait(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(threading, "go", threading.Event(), raising=False)
    thread = threading.Thread(target=lambda: __import__("a_module_of_an_application"))
    thread.start()
    while "a_module_of_an_application" not in sys.modules:
        assert thread.is_alive()
    try:
        waits = []
        monkeypatch.setattr(fork.time, "sleep", waits.append)
        assert in_child(lambda: None) == 0
        assert not waits
        monkeypatch.setattr(fork, "PACKAGES", {"a_module_of_an_application"})
        monkeypatch.setattr(fork, "LIMIT", 0.05)
        assert in_child(lambda: None) == 0
        assert waits
    finally:
        threading.go.set()
        thread.join()
        del sys.modules["a_module_of_an_application"]


def test_every_lock_of_a_module_is_new_in_a_child():
    """A lock that lives as long as the process is made by `new_in_child`, or replaced by a handler in its module."""
    root = Path(requanto.__file__).parent
    found = []
    for path in (*root.rglob("*.py"), *(root.parents[1] / "kernels").rglob("*.py")):
        text = path.read_text()
        for node in ast.parse(text).body:
            value = getattr(node, "value", None)
            made = isinstance(value, ast.Call) and ast.unparse(value.func) in ("threading.Lock", "threading.RLock")
            if made and "os.register_at_fork" not in text:
                found.append(f"{path}:{node.lineno}")
    assert not found
