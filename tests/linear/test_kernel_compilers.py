"""What building the CPU kernels meets: places without room, compilers that fail or are old."""

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
from kernel_cache import STAND_IN, alive, fresh, needs_compiler, never, original, script, torch_and_one_line, unix

from requanto.linear.cpu import library
from requanto_cpu import LibraryUnavailable, build, cache, trust

pytestmark = [needs_compiler(), pytest.mark.usefixtures("fresh")]
__all__ = ["fresh"]

# Surroundings.


def test_no_home(monkeypatch, caplog):
    monkeypatch.delenv("REQUANTO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    torch_and_one_line(caplog, "no place for the kernel cache: Could not determine home directory. Set REQUANTO_CACHE")


def test_the_usual_places(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust.directory() == fresh
    monkeypatch.delenv("REQUANTO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert trust.directory() == tmp_path / "other" / "requanto"
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert trust.directory() == Path("~/.cache/requanto").expanduser()


@unix
def test_no_working_directory(monkeypatch, caplog, tmp_path):
    """A relative place, and the folder that it is relative to is gone."""
    here = Path.cwd()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    try:
        gone.rmdir()
        monkeypatch.setenv("REQUANTO_CACHE", "relative")
        torch_and_one_line(caplog, "no place for the kernel cache")
    finally:
        os.chdir(here)


@pytest.mark.parametrize("where", ["mkdir", "mkdtemp", "write"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_no_room_or_no_right(where, number, fresh, monkeypatch, caplog):
    def fails(*args, **how):
        raise OSError(number, os.strerror(number))

    if where == "write":
        monkeypatch.setattr(build, "build", lambda target, compiler, only=None: [str(target.write_bytes(b"code"))])
    place = {"mkdir": Path, "mkdtemp": build.tempfile, "write": trust}[where]
    monkeypatch.setattr(place, where, fails)
    torch_and_one_line(caplog, os.strerror(number))
    assert not list(fresh.glob(".build-*"))


def test_little_room(monkeypatch, caplog, tmp_path):
    """Before a compiler has run for nothing."""
    usual = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usual._replace(free=2**20))
    monkeypatch.setattr(build.subprocess, "Popen", never)
    torch_and_one_line(caplog, f"{os.strerror(errno.ENOSPC)}. Set REQUANTO_CACHE")


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="only Linux tells")
def test_a_file_system_that_runs_no_code(monkeypatch, caplog):
    real = os.statvfs

    class Flags:
        def __init__(self, folder):
            self.found, self.f_flag = real(folder), os.ST_NOEXEC

        def __getattr__(self, name):
            return getattr(self.found, name)

    monkeypatch.setattr(trust.os, "statvfs", Flags)
    monkeypatch.setattr(build.subprocess, "Popen", never)
    torch_and_one_line(caplog, "mounted noexec: no code can be loaded from it. Set REQUANTO_CACHE")


def test_a_file_system_without_locks(monkeypatch):
    def fails(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", fails)
    monkeypatch.setattr(build, "build", lambda target, compiler, only=None: [str(target.write_bytes(original()))])
    assert library.find() is not None


def test_folders_of_killed_processes_are_removed(tmp_path):
    old, new = tmp_path / ".build-old", tmp_path / ".build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "pack.o").write_text("")
    os.utime(old, (0, 0))
    cache._remove_stale_folders(tmp_path)
    assert not old.exists()
    assert new.exists()


# Compilers.


@unix
def test_what_cxx_may_say(monkeypatch, tmp_path):
    for name in ("g++", "ccache", "clang++"):
        script(tmp_path / name, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, expected in {
        "": [["g++"], ["clang++"]],
        "ccache g++": [["ccache", "g++"]],
        f"{tmp_path}/ccache {tmp_path}/clang++": [["ccache", f"{tmp_path}/clang++"]],
        "g++ -m64": [["g++", "-m64"]],
        "'g++": None,
        "no-such-compiler": None,
    }.items():
        monkeypatch.setenv("CXX", text)
        if expected is None:
            with pytest.raises(build.BuildError, match="no C\\+\\+ compiler was found"):
                build.compilers()
        else:
            wanted = [(str(tmp_path / words[0]), *words[1:]) for words in expected]
            assert [one.command for one in build.compilers()] == wanted, text


FAILING = {
    "crashes": ("kill -SEGV $$", "failed (-11)"),
    "prints": (
        "echo noise; echo 'x.cpp:1: fatal error: no such header' >&2; echo bye; exit 1",
        "error: no such header",
    ),
    "prints garbage": ("head -c 1000 /dev/urandom; exit 1", "failed (1)"),
    "writes nothing": ("exit 0", "wrote no library"),
    "never ends": ("sleep 300 & echo $! > {pid}; wait", "did not finish in 1 s"),
    "is no program": (None, "did not start"),
}


@unix
@pytest.mark.parametrize("how", FAILING)
def test_a_compiler_that_fails(how, fresh, monkeypatch, caplog, tmp_path):
    """One line in the log; one that never ends is stopped with its children, also where it is a script that waits."""
    text, why = FAILING[how]
    pid = tmp_path / "pid"
    compiler = script(tmp_path / "g++", (text or "").replace("{pid}", str(pid)))
    if text is None:
        compiler.write_bytes(b"\x7fELF and nothing more")
    monkeypatch.setenv("CXX", str(compiler))
    if how == "never ends":
        monkeypatch.setattr(build, "TIMEOUT", 1.0)
    torch_and_one_line(caplog, why)
    assert not pid.exists() or not alive(int(pid.read_text()))
    assert not list(fresh.glob(".build-*"))
    assert [file.suffix for file in fresh.iterdir()] == [".lock"]


@unix
def test_the_next_compiler_and_what_another_one_built(fresh, monkeypatch, tmp_path, caplog):
    """c++ does not work, clang++ does. Later none works, and what it built is used."""
    for name in ("c++", "g++"):
        script(tmp_path / name, "exit 1")
    script(tmp_path / "clang++", STAND_IN)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("LIST", str(tmp_path / "list"))
    monkeypatch.delenv("CXX", raising=False)
    path = cache.find()
    assert path == cache.path_of(build.compilers()[2])
    assert (tmp_path / "list").read_text().splitlines()[-1] == "linked"
    script(tmp_path / "clang++", "exit 1; # of another version")
    with caplog.at_level(logging.INFO):
        assert cache.find() == path
    assert "which another compiler has built" in caplog.text
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cache.find() == path
    path.write_bytes(b"")
    with pytest.raises(LibraryUnavailable, match="no C\\+\\+ compiler was found"):
        cache.find()


@unix
def test_an_old_compiler(monkeypatch, tmp_path, caplog):
    """Levels that it does not know are left out, and the log says so."""
    old = 'case " $* " in *avx512bf16*|*avxvnni*|*dotprod*) exit 1;; esac'
    compiler = build.Compiler((str(script(tmp_path / "g++", old + STAND_IN)),))
    monkeypatch.setenv("LIST", str(tmp_path / "list"))
    with caplog.at_level(logging.INFO):
        assert build.build(tmp_path / "new", compiler, "x86_64") == ["avx2", "avx512", "vnni"]
    assert "does not know the instructions of: avxvnni, bf16" in caplog.text
    assert build.build(tmp_path / "new", compiler, "arm64") == ["neon"]
    with pytest.raises(build.BuildError, match="there are no kernels for sparc processors, only for"):
        build.build(tmp_path / "new", compiler, "sparc")
