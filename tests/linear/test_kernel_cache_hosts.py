"""The cache of the CPU kernels on hosts that lack something: a home, a user's name, room, the right to run code, a compiler.

Each test is a fork that becomes such a host. There are kernels, or torch's operators and at most one line in the log.
"""

import ctypes
import importlib.util
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from kernel_cache import fresh, needs_compiler, needs_root, never, original

from requanto_cpu import build, cache

_spec = importlib.util.spec_from_file_location("fuzz_cache", Path(__file__).parents[1] / "fuzz" / "fuzz_cache.py")
harness = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(harness)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="mounts and users as on Linux"),
    pytest.mark.usefixtures("fresh"),
    needs_compiler(),
]
__all__ = ["fresh"]
NOBODY = 54321  # has no entry in passwd
LIBC = ctypes.CDLL(None, use_errno=True)


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


def on(host, *, without_compiler=False):
    """What becomes of the kernels on a host: the outcome and the line in the log."""

    def child():
        place = host()
        if place is not None:
            os.environ["REQUANTO_CACHE"] = str(place)
        if without_compiler:
            os.environ["CXX"] = "no-such-compiler"
        build.subprocess.Popen = never  # nothing is compiled
        handler = harness.Lines()
        for name in ("requanto", "requanto_cpu"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.INFO)
        back = harness.strips(harness.EXAMPLE)
        if back is not None and not torch.equal(back, harness.EXAMPLE):
            return "wrong", ""
        return ("torch" if back is None else "used"), " | ".join(handler.lines)

    return harness.in_child(child)


def without_home():
    for name in ("HOME", "REQUANTO_CACHE", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)


def nobody():
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    without_home()


@needs_root
def test_a_user_without_a_name_or_a_home():
    outcome, line = on(nobody)
    assert outcome == "torch"
    assert line.count("requanto: ") == 1
    assert "no place for the kernel cache" in line


@needs_root
def test_kernels_that_root_built_for_an_image(monkeypatch, tmp_path):
    """Used by a user without a name, a home or a compiler."""
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o001 == 0 and parent.owner() == "root":
            parent.chmod(parent.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    place = tmp_path / "image" / "kernels"
    monkeypatch.setenv("REQUANTO_CACHE", str(place))
    monkeypatch.setattr(build, "build", lambda target, compiler, only=None: [str(target.write_bytes(original()))])
    cache.find()  # all levels, as `requanto kernels`

    def host():
        nobody()
        return place

    assert on(host, without_compiler=True) == ("used", "")


@needs_root
@pytest.mark.parametrize("options", ["noexec,size=100m,mode=755", "size=1m,mode=755"])
def test_a_file_system_that_is_full_or_runs_no_code(options, tmp_path):
    def host():
        mounted(tmp_path, options)
        return tmp_path

    outcome, line = on(host)
    if "no mounts here" in line:
        pytest.skip("this container allows no mounts")
    assert outcome == "torch"
    assert ("mounted noexec" if "noexec" in options else "No space left on device") in line
    assert line.count("requanto: ") == 1


@needs_root
def test_a_whole_library_on_a_file_system_that_runs_no_code(tmp_path):
    def host():
        mounted(tmp_path, "noexec,size=100m,mode=755")
        os.environ["REQUANTO_CACHE"] = str(tmp_path)
        harness.write(original())
        return tmp_path

    outcome, line = on(host)
    if "no mounts here" in line:
        pytest.skip("this container allows no mounts")
    assert outcome == "torch"
    assert "could not be loaded: failed" in line  # the path is not told twice
    assert line.count("requanto: ") == 1


@needs_root
def test_temporary_files_cannot_run_code(tmp_path):
    """TMPDIR is not used when the library is loaded."""
    place = tmp_path / "kernels"
    place.mkdir(mode=0o755)

    def host():
        (tmp_path / "tmp").mkdir()
        mounted(tmp_path / "tmp", "noexec,size=4k")
        os.environ.update(TMPDIR=str(tmp_path / "tmp"), REQUANTO_CACHE=str(place))
        harness.write(original())
        return place

    outcome, line = on(host)
    if "no mounts here" in line:
        pytest.skip("this container allows no mounts")
    assert (outcome, line) == ("used", "")


def test_damaged_caches_and_forks(capsys):
    """A few seeds of the harness; `tests/fuzz/fuzz_cache.py` runs many more."""
    assert harness.main(["--count", "40", "--forks", "15", "--seed", "7"]) == 0, capsys.readouterr().out
