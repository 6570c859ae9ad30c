"""The CPU kernel cache breaks nothing.

Files that are damaged, somebody else's or for another kernel are never opened, and whatever fails leaves eager operators
and one line in the log. The tests need a C++ compiler (tests/conftest.py).
"""

import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from requanto import QTensor
from requanto.linear import linear
from requanto.linear.cpu.aot import cache, calls, kernels, package, processes, source, trust
from requanto.runtime.settings import registry_state, settings

pytestmark = pytest.mark.skipif(
    cache.compiler() is None, reason="no C++ compiler: neither CXX nor torch's usual one is here"
)
KEPT = Path(os.environ["REQUANTO_CACHE"]).absolute()
NAME, FAMILY = "stored-int8", calls.STORED_INT8
SOURCE = calls.SOURCES[NAME]
unix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes on Windows")
needs_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root gives files away")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing, and a cache of its own; nobody has asked for compiled kernels."""
    monkeypatch.setattr(settings, "compiled", None)
    for name in ("_loaded", "_failed", "_building"):
        monkeypatch.setattr(cache, name, {})
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "kept"))
    for found in (cache._can_be_made, cache._all_cached, cache._log_missing_compiler):
        found.cache_clear()
    yield
    for found in (cache._can_be_made, cache._all_cached, cache._log_missing_compiler):
        found.cache_clear()


def kept(name: str = NAME) -> Path:
    """A package in this test's cache, copied from those that all tests share."""
    path = cache.path_of(name, calls.SOURCES[name])
    usual = KEPT / path.name
    if not trust.intact(usual):
        processes.make({name: usual})
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    trust.write(path, usual.read_bytes())
    return path


def never(*args, **how):
    raise AssertionError("this was not to be called")


def cannot_be_made(monkeypatch):
    """Whoever makes a kernel is told that it cannot be kept."""

    def fails(paths):
        raise cache.CannotBeMade("no place to write")

    monkeypatch.setattr(cache, "_make", fails)


def product() -> tuple[torch.Tensor, torch.Tensor]:
    """A product whose weight is made by the kernel, where it can be had, and the same with eager operators."""
    torch.manual_seed(0)
    weight = QTensor.quantize(torch.randn(272, 272).bfloat16(), "int8", group_size=16)
    x = torch.randn(40, 272).bfloat16()
    with torch.no_grad():
        got = [linear(x, weight) for _ in range(2)][1]
        settings.compiled, before = False, settings.compiled
        want = linear(x, weight)
        settings.compiled = before
    return got, want


def eager_and_one_line(caplog, why: str, *, compiles: bool = False) -> None:
    """Forward works without kernels, and says so once; after it has said that it compiles, if it does."""
    with caplog.at_level(logging.INFO, logger="requanto"):
        got, want = product()
        got, want = product()
        assert not calls.ready(calls.STORED_INT4)
    assert torch.equal(got, want)
    assert not cache._loaded
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    if compiles:
        assert lines.pop(0).startswith("requanto: compiling")
    assert len(lines) == 1, lines
    assert why in lines[0]


def test_what_is_kept_is_used(monkeypatch):
    kept()
    monkeypatch.setattr(cache, "_make", never)
    got, want = product()
    assert list(cache._loaded) == [NAME]
    assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()


# Files of which the digest is wrong.


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 3, len(content) // 3 + 4096):
        content[place] ^= 255
    path.write_bytes(content)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def without_digest(path: Path) -> None:
    trust._digest_path(path).unlink()


def digest_of_garbage(path: Path) -> None:
    trust._digest_path(path).write_bytes(bytes(range(256)))


def of_another_kernel(path: Path) -> None:
    other = kept("stored-e4m3")
    shutil.copy(other, path)
    shutil.copy(trust._digest_path(other), trust._digest_path(path))


def of_another_source(path: Path) -> None:
    """Made from an older text, put under the newer one's name."""
    old = path.with_name(path.name.replace(source.digest_of(SOURCE), "0" * 12))
    trust.write(old, path.read_bytes())
    shutil.copy(old, path)
    shutil.copy(trust._digest_path(old), trust._digest_path(path))


def with_a_new_digest(path: Path) -> None:
    """Another kernel's library, for which somebody wrote a digest under this name."""
    trust.write(path, kept("stored-e4m3").read_bytes())


def digest_without_end(path: Path) -> None:
    trust._digest_path(path).unlink()
    trust._digest_path(path).symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    """Opening it would wait for somebody who writes to it."""
    path.unlink()
    os.mkfifo(path)


def digest_in_a_pipe(path: Path) -> None:
    trust._digest_path(path).unlink()
    os.mkfifo(trust._digest_path(path))


DAMAGE = [flipped, one_bit, cut_off, empty, without_digest, digest_of_garbage, of_another_kernel, of_another_source]
if sys.platform == "linux":
    DAMAGE += [with_a_new_digest, digest_without_end, a_pipe, digest_in_a_pipe]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew_and_never_opened(damage, monkeypatch):
    path = kept()
    right = path.read_bytes()
    damage(path)
    made = []

    def make(paths):
        assert not cache._loaded
        made.extend(paths)
        monkeypatch.setattr(cache, "Kernel", package.Kernel)
        trust.write(path, right)

    monkeypatch.setattr(cache, "_make", make)
    monkeypatch.setattr(cache, "Kernel", never)
    assert calls.ready(FAMILY)
    assert made == [NAME]
    assert trust.intact(path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_that_cannot_be_made_anew(damage, monkeypatch, caplog):
    path = kept()
    damage(path)
    before = None if path.is_fifo() else path.read_bytes()
    cannot_be_made(monkeypatch)
    monkeypatch.setattr(cache, "Kernel", never)
    eager_and_one_line(caplog, "no place to write")
    assert path.is_fifo() if before is None else path.read_bytes() == before


@pytest.mark.parametrize("damage", [flipped, of_another_kernel])
def test_a_damaged_file_in_a_read_only_cache(damage, monkeypatch, caplog):
    """As the user who may read it only."""
    from filelock import FileLock

    FileLock(str(kept()) + ".first").acquire().lock.release()  # all it imports, read as this user
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        monkeypatch.setenv("REQUANTO_CACHE", folder)
        damage(kept())
        place.chmod(0o555)
        me = os.geteuid() if hasattr(os, "geteuid") else None
        try:
            if me == 0:
                os.seteuid(65534)
            eager_and_one_line(caplog, "cannot be written to")
        finally:
            if me == 0:
                os.seteuid(0)
            place.chmod(0o700)


# Files that are whole, and cannot be loaded here.


def test_a_file_that_this_machine_does_not_load_stays(monkeypatch, caplog):
    """Such as from a file system mounted without exec: it is good for the other machines that share it."""
    path = kept()
    before = path.read_bytes(), path.stat().st_mtime_ns

    def not_mapped(name, path):
        raise RuntimeError(
            "failed to map segment from shared object: Operation not permitted\nException raised from DynamicLibrary"
        )

    kept("stored-int4")
    monkeypatch.setattr(cache, "Kernel", not_mapped)
    monkeypatch.setattr(cache, "_make", never)
    eager_and_one_line(
        caplog, "could not be loaded: failed to map segment from shared object: Operation not permitted. Set"
    )
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(cache.CannotBeLoaded, match="failed to map segment"):
        calls.ready(FAMILY)
    assert path.exists()


def test_a_file_that_computes_something_else_stays(monkeypatch, caplog):
    path = kept()

    class Wrong(package.Kernel):
        def __call__(self, codes, scale, out):
            out.zero_()

    monkeypatch.setattr(cache, "Kernel", Wrong)
    monkeypatch.setattr(cache, "_make", never)
    assert not calls.ready(FAMILY)
    assert "computes other values than its source" in caplog.text
    assert trust.intact(path)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, OSError, KeyError, NotImplementedError])
def test_whatever_fails_forward_does_not(error, monkeypatch, caplog):
    kept()

    def fails(*args):
        raise error("out of the blue")

    monkeypatch.setattr(cache, "intact", fails)
    got, want = product()
    assert torch.equal(got, want)
    assert caplog.text.count("out of the blue") == 1
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(cache.KernelUnavailable, match="out of the blue"):
        calls.ready(FAMILY)


# What a kernel is made from.


def digests() -> dict[str, str]:
    return {name: source.digest_of(made_from) for name, made_from in calls.SOURCES.items()}


@pytest.mark.parametrize(
    ("name", "value", "concerned"),
    [
        ("TINY", 1e-20, {"int8-int8-row", "rows-to-int8"}),  # imported
        ("_HALF", 16, {"nibbles", "e4m3", "row", "int8", "int8-row", "int8-int8-row"}),  # sizes of examples
        ("_pair", lambda even, odd: even | odd, {"nibbles", "e4m3", "int8", "stored-int4"}),
    ],
)
def test_the_digest_covers_what_a_function_reads(name, value, concerned, monkeypatch):
    before = digests()
    monkeypatch.setattr(kernels, name, value)
    after = digests()
    assert {kernel for kernel in before if before[kernel] != after[kernel]} == concerned


def test_the_digest_covers_the_options(monkeypatch):
    before, options = digests(), source.compile_options()
    for changed in ({**options, "cpp.simdlen": 128}, {**options, "cpp.enable_floating_point_contract_flag": "off"}):
        monkeypatch.setattr(source, "compile_options", lambda changed=changed: changed)
        assert not set(before.values()) & set(digests().values())


def test_the_name_covers_torch_s_version(monkeypatch):
    before = cache.path_of(NAME, SOURCE).name
    for module, name in ((torch, "__version__"), (torch.version, "git_version")):
        with monkeypatch.context() as context:
            context.setattr(module, name, "another")
            source.machine.cache_clear()
            assert cache.path_of(NAME, SOURCE).name != before
    source.machine.cache_clear()
    assert cache.path_of(NAME, SOURCE).name == before


def test_the_digest_covers_closures_modules_and_defaults(monkeypatch):
    def made_with(factor, step=1):
        def function(x, other=step):
            return sum(part * factor + kernels._HALF for part in x.split(other))

        return source.Source(function, (), tuple, {})

    one = source.digest_of(made_with(1))
    assert one == source.digest_of(made_with(1))
    assert one != source.digest_of(made_with(2))
    assert one != source.digest_of(made_with(1, 2))
    monkeypatch.setattr(kernels, "_HALF", 16)
    assert one != source.digest_of(made_with(1))


def test_the_digest_without_the_text(monkeypatch):
    """An installation of compiled modules only."""

    def fails(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(source.inspect, "getsource", fails)
    assert len(set(digests().values())) == len(calls.SOURCES)


# Owners and modes.


def refused(monkeypatch, caplog, why: str) -> None:
    monkeypatch.setattr(cache, "Kernel", never)
    monkeypatch.setattr(processes._Job, "_start", never)
    eager_and_one_line(caplog, why)
    assert "REQUANTO_CACHE" in caplog.text


@unix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_may_write(mode, monkeypatch, caplog):
    path = kept()
    path.parent.chmod(mode)
    refused(monkeypatch, caplog, f"chmod go-w {path.parent}")
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(cache.CannotBeLoaded, match="is writable by other users"):
        calls.ready(FAMILY)


@unix
def test_nothing_is_made_where_others_may_write(monkeypatch, caplog, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept").chmod(0o777)
    refused(monkeypatch, caplog, "is writable by other users (mode 777)")


@unix
@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_a_file_that_others_may_write(mode, monkeypatch, caplog):
    path = kept()
    path.chmod(mode)
    kept("stored-int4").chmod(mode)
    refused(monkeypatch, caplog, f"chmod go-w {path}")


@needs_root
@pytest.mark.parametrize("which", ["file", "folder"])
def test_somebody_else_s(which, monkeypatch, caplog):
    path = kept()
    for one in (path, kept("stored-int4")):
        os.chown(one.parent if which == "folder" else one, 12345, -1)
    refused(monkeypatch, caplog, "belongs to user 12345, not to this one (0) or root")


@needs_root
def test_root_s_files_are_everybody_s(monkeypatch):
    """Made as an image was built, used by its user."""
    path = kept()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert trust.intact(path)
    os.chown(path, 1000, -1)
    assert trust.intact(path)
    os.chown(path, 1001, -1)
    with pytest.raises(cache.CannotBeLoaded, match="belongs to user 1001"):
        trust.intact(path)


@unix
def test_links_are_followed(monkeypatch, tmp_path, caplog):
    """Where the file really lies counts, and where the link does."""
    path = kept()
    real = tmp_path / "store"
    real.mkdir(mode=0o755)
    shutil.move(path, real / "library")
    path.symlink_to(real / "library")
    assert trust.intact(path)
    (tmp_path / "link").symlink_to(path.parent)
    assert trust.intact(tmp_path / "link" / path.name)
    real.chmod(0o777)
    with pytest.raises(cache.CannotBeLoaded, match="store is writable by other users"):
        trust.intact(path)
    real.chmod(0o755)
    path.parent.chmod(0o777)
    for one in (path, tmp_path / "link" / path.name):
        with pytest.raises(cache.CannotBeLoaded, match="is writable by other users"):
            trust.intact(one)
    (tmp_path / "kept" / "loop").symlink_to(tmp_path / "kept" / "loop")
    path.parent.chmod(0o700)
    with contextlib.suppress(cache.KernelUnavailable):
        assert not trust.intact(tmp_path / "kept" / "loop")


@unix
def test_what_is_made_is_writable_by_nobody_else(monkeypatch, tmp_path):
    """Whatever the umask."""
    before = os.umask(0)
    try:
        monkeypatch.setattr(processes._Job, "_start", lambda job: setattr(job, "work", tmp_path))
        monkeypatch.setattr(processes._Job, "_fresh", tmp_path / "library")
        (tmp_path / "library").write_bytes(b"code")
        path = cache.path_of(NAME, SOURCE)
        processes.make({NAME: path})
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o755  # others may use what root compiled for an image
    assert path.stat().st_mode & 0o022 == 0
    assert trust.intact(path)


# Surroundings.


def test_no_home(monkeypatch, caplog):
    monkeypatch.delenv("REQUANTO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(cache, "_make", never)
    eager_and_one_line(caplog, "no place for the kernel cache: Could not determine home directory. Set REQUANTO_CACHE")


def test_the_usual_places(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust.directory() == tmp_path / "kept"
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
        eager_and_one_line(caplog, "no place for the kernel cache")
    finally:
        os.chdir(here)


def test_a_full_disk_leaves_what_was_there(monkeypatch):
    path = kept()
    before = path.read_bytes()

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as context:
        context.setattr(trust, "open", lambda *how: Full(os.fdopen(*how)), raising=False)
        with pytest.raises(OSError, match="No space left"):
            trust.write(path, b"new")
    assert path.read_bytes() == before
    assert trust.intact(path)
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.sha256"}


@pytest.mark.parametrize("where", ["mkdir", "mkdtemp", "write"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_no_room_or_no_right(where, number, monkeypatch, caplog, tmp_path):
    def fails(*args, **how):
        raise OSError(number, os.strerror(number))

    if where == "write":
        (tmp_path / "library").write_bytes(b"code")
        monkeypatch.setattr(processes._Job, "_start", lambda job: None)
        monkeypatch.setattr(processes._Job, "_fresh", tmp_path / "library")
        monkeypatch.setattr(processes, "write", fails)
    else:
        monkeypatch.setattr(*((Path, where) if where == "mkdir" else (processes.tempfile, where)), fails)
    eager_and_one_line(caplog, os.strerror(number), compiles=where == "write")
    assert not list(tmp_path.glob("kept/.build-*"))


def test_little_room(monkeypatch, caplog, tmp_path):
    """Before a compiler has run for nothing."""
    usual = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda folder: usual._replace(free=2**20))
    monkeypatch.setattr(processes.subprocess, "Popen", never)
    eager_and_one_line(caplog, f"{os.strerror(errno.ENOSPC)}. Set REQUANTO_CACHE")


@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="only Linux tells")
def test_a_file_system_that_runs_no_code(monkeypatch, caplog):
    real = os.statvfs

    class Flags:
        def __init__(self, folder):
            self.found, self.f_flag = real(folder), os.ST_NOEXEC

        def __getattr__(self, name):
            return getattr(self.found, name)

    monkeypatch.setattr(trust.os, "statvfs", Flags)
    monkeypatch.setattr(processes.subprocess, "Popen", never)
    eager_and_one_line(caplog, "mounted noexec: no code can be loaded from it. Set REQUANTO_CACHE")


def test_a_line_of_a_compiler_s_log(monkeypatch, caplog):
    """One line says which error it was; all of it is in the error."""
    log = "warning\nx.cpp:1: fatal error: no such header\ncompilation terminated.\nbye"
    assert processes._error_text(log).splitlines()[0] == "x.cpp:1: fatal error: no such header"
    assert processes._error_text(log).endswith(log)
    assert processes._error_text("").splitlines()[0] == "no output"

    def fails(paths):
        raise cache.CannotBeMade(f"it failed: {processes._error_text(log)}")

    monkeypatch.setattr(cache, "_make", fails)
    eager_and_one_line(caplog, "it failed: x.cpp:1: fatal error: no such header")
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_file_system_without_locks(monkeypatch, tmp_path):
    import filelock

    def fails(*args, **how):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", fails)
    monkeypatch.setattr(processes._Job, "_start", lambda job: None)
    monkeypatch.setattr(processes._Job, "_fresh", tmp_path / "library")
    (tmp_path / "library").write_bytes(b"code")
    path = cache.path_of(NAME, SOURCE)
    processes.make({NAME: path})
    assert trust.intact(path)


def test_what_cxx_may_say(monkeypatch, tmp_path):
    for name in ("g++", "ccache", "clang++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, found in {
        "ccache g++": "g++",
        f"{tmp_path}/ccache {tmp_path}/clang++": "clang++",
        "g++ -m64": "g++",
        "'g++": None,
        "ccache": "ccache",
        "no-such-compiler": None,
        "ccache distcc": None,
    }.items():
        monkeypatch.setenv("CXX", text)
        assert processes.compiler() == (None if found is None else str(tmp_path / found)), text


@pytest.mark.parametrize("missing", ["compiler", "python"])
def test_kept_kernels_need_no_compiler(missing, monkeypatch, caplog):
    kept()
    if missing == "compiler":
        monkeypatch.setattr(cache, "compiler", lambda: None)
    else:
        monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr(cache, "_make", never)
    assert cache.wanted(FAMILY)
    assert not cache.wanted(calls.STORED_INT4)  # has not been made
    got, want = product()
    assert list(cache._loaded) == [NAME]
    assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()


def test_no_compiler_and_a_damaged_file(monkeypatch, caplog):
    flipped(kept())
    monkeypatch.setattr(cache, "compiler", lambda: None)
    eager_and_one_line(caplog, "no C++ compiler for 'stored-int8'")


# Processes that make kernels.


MAKES = """
import os, signal, sys, threading
from requanto.linear.cpu.aot import cache, calls
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that SIGINT is ignored
def make():
    try:
        cache.load({"stored-int8": calls.SOURCES["stored-int8"]})
    except cache.KernelUnavailable as error:
        print(error, file=sys.stderr)
if sys.argv[1] == "thread":
    threading.Thread(target=make).start()
    while not os.path.exists(sys.argv[2]):
        threading.Event().wait(0.05)
else:
    make()
"""


def alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
    return False


@unix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, "thread"])
def test_a_build_ends_with_its_parent(how, tmp_path):
    """At once when it is interrupted; compilers and folders too, even when the parent can do nothing about it."""
    bin_, temporary, started = tmp_path / "bin", tmp_path / "tmp", tmp_path / "started"
    bin_.mkdir()
    temporary.mkdir()
    compiler = bin_ / "g++"
    compiler.write_text(
        textwrap.dedent(f"""\
        #!/bin/sh
        case "$*" in *--version*) exec /usr/bin/env PATH="$OLD" g++ --version;; esac
        : > "$TMPDIR/cc.s"
        echo $$ > {started}.new; mv {started}.new {started}
        exec sleep 300
        """)
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": f"ccache {compiler}", "OLD": os.environ["PATH"], "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-c", MAKES, "thread" if how == "thread" else "main", str(started)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(1200):
            if started.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        assert started.exists(), process.communicate()[1][-2000:]
        hanging = int(started.read_text())
        assert alive(hanging) or how == "thread"
        start = time.monotonic()
        if how != "thread":
            process.send_signal(how)
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - start < 10
        assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGKILL: -signal.SIGKILL}.get(how, 0), (
            errors
        )
        while time.monotonic() - start < 15 and (alive(hanging) or list(tmp_path.glob("kept/.build-*"))):
            time.sleep(0.05)
        assert not alive(hanging)
        assert not list(tmp_path.glob("kept/.build-*"))
        assert not list(temporary.iterdir())
    finally:
        process.kill()
        process.wait()


@unix
def test_loading_leaves_nothing_in_tmpdir(tmp_path):
    kept()
    (tmp_path / "tmp").mkdir()
    code = "import os\nfrom requanto.linear.cpu.aot import calls\nassert calls.ready(calls.STORED_INT8)\nos._exit(0)"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "REQUANTO_COMPILE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list((tmp_path / "tmp").iterdir())


def test_old_folders_are_swept(tmp_path):
    old, new = tmp_path / ".build-old", tmp_path / ".build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "kernel.cpp").write_text("")
    os.utime(old, (0, 0))
    processes._remove_stale_folders(tmp_path)
    assert not old.exists()
    assert new.exists()


# Threads and forks.


class Slow:
    """In place of `cache._make`: waits until it is told, then writes the package."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.right = kept().read_bytes()
        self.path = cache.path_of(NAME, SOURCE)
        self.path.unlink()

    def __call__(self, paths: dict[str, Path]) -> None:
        assert list(paths) == [NAME]
        self.begun.set()
        assert self.go.wait(30)
        trust.write(self.path, self.right)


@pytest.fixture
def building(monkeypatch):
    """Another thread is making a kernel; and what it returned, once it is let go."""
    slow, results = Slow(), []
    monkeypatch.setattr(cache, "_make", slow)
    thread = threading.Thread(target=lambda: results.append(calls.ready(FAMILY)))
    thread.start()
    assert slow.begun.wait(30)

    def finish():
        slow.go.set()
        thread.join(30)
        return results

    yield finish
    finish()


def within(seconds: float, function):
    """What it returns, in a thread of its own; an error where it stands still."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "it waits"
    return found[0]


def test_other_threads_go_on_while_a_kernel_is_made(building, monkeypatch):
    kept("stored-int4")
    assert not within(10, lambda: cache.wanted(FAMILY))
    assert not within(10, lambda: calls.ready(FAMILY))
    assert within(10, lambda: calls.ready(calls.STORED_INT4))
    monkeypatch.setattr(settings, "compiled", None)
    torch.manual_seed(0)
    weight, x = (
        QTensor.quantize(torch.randn(272, 272).bfloat16(), "int8", group_size=16),
        torch.randn(3, 272).bfloat16(),
    )
    assert within(10, lambda: linear(x, weight)).shape == (3, 272)
    version = registry_state.version
    assert building() == [True]
    assert registry_state.version != version  # choices that were made without it are made again
    assert cache.wanted(FAMILY)
    assert calls.ready(FAMILY)


def test_nothing_changes_where_nobody_was_passed_by(building):
    version = registry_state.version
    assert building() == [True]
    assert registry_state.version == version


def test_whoever_asked_for_kernels_waits_for_them(building, monkeypatch):
    monkeypatch.setattr(settings, "compiled", True)
    found = []
    thread = threading.Thread(target=lambda: found.append(calls.ready(FAMILY)))
    thread.start()
    thread.join(0.3)
    assert not found
    assert building() == [True]
    thread.join(30)
    assert found == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_is_forgotten(error, monkeypatch):
    kept().unlink()

    def fails(paths):
        raise error

    monkeypatch.setattr(cache, "_make", fails)
    with contextlib.suppress(KeyboardInterrupt):
        assert not calls.ready(FAMILY)
    assert not cache._building


def in_child(function) -> int:
    """The exit status of a fork that runs it; it is ended where it stands still."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            torch.set_num_threads(
                1
            )  # OpenMP's threads are not there after a fork; kernels of torch itself would wait too
            status = 0 if function() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@unix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_kernel_is_made(building, monkeypatch):
    kept("stored-int4")
    path = cache.path_of(NAME, SOURCE)

    def child():
        monkeypatch.setattr(cache, "_make", lambda paths: trust.write(path, kept().read_bytes()))
        return calls.ready(calls.STORED_INT4) and cache.wanted(FAMILY) and calls.ready(FAMILY)

    assert in_child(child) == 0


@unix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_another_thread_holds_the_locks():
    kept()
    assert calls.ready(FAMILY)
    kept("stored-int4")
    held, go = threading.Event(), threading.Event()

    def hold():
        with cache._LOCK, cache._loaded[NAME]._lock:
            held.set()
            go.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    x = SOURCE.example()
    want = x[0].float() * x[1]

    def child():
        calls.stored_int8(*x)
        return calls.ready(calls.STORED_INT4) and bool((x[2].float() - want).norm() <= 1e-2 * want.norm())

    try:
        assert in_child(child) == 0
    finally:
        go.set()
        thread.join()
    assert not cache._loaded[NAME]._stale  # of the child alone


@unix
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_s_end_leaves_the_parent_s_build(tmp_path):
    job = processes._Job(NAME, tmp_path / "kernel.so")
    job.work = tmp_path / ".build-parent"
    job.work.mkdir()
    assert in_child(lambda: job.end() is None) == 0
    assert job.work.exists()
    job.end()
    assert not job.work.exists()
