"""The cache of the CPU kernels breaks nothing.

Files that are damaged, somebody else's or of other sources are never opened, and whatever fails leaves torch's operators
and one line in the log.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from kernel_cache import fresh, kept, needs_compiler, never, original, torch_and_one_line

from requanto import explain, freeze, quantize
from requanto.linear.cpu import library
from requanto.runtime.settings import registry_state, settings
from requanto_cpu import LibraryUnavailable, build, cache, load, trust

pytestmark = [needs_compiler(), pytest.mark.usefixtures("fresh")]
__all__ = ["fresh"]


def cannot_be_built(monkeypatch):
    def fails(compiler, level=None):
        raise LibraryUnavailable("no place to write")

    monkeypatch.setattr(cache, "make", fails)


def test_what_is_kept_is_used(monkeypatch):
    path = kept()
    monkeypatch.setattr(cache, "make", never)
    assert library.find() is not None
    assert load.path() == path


def test_a_file_that_is_removed_before_it_is_opened_is_built_again(monkeypatch):
    path = kept()
    monkeypatch.setattr(cache, "make", lambda compiler, level=None: kept(path))
    opened, theirs = [], load.open_library

    def removed_first(file):
        if not opened:
            file.unlink()
        opened.append(file)
        return theirs(file)

    monkeypatch.setattr(load, "open_library", removed_first)
    assert library.find() is not None
    assert opened == [path, path]


def test_that_of_the_package_comes_first(monkeypatch, tmp_path):
    """Its folder is as good as that of the package's Python files, whoever owns it."""
    monkeypatch.setattr(cache, "PACKAGED", tmp_path / "built")
    monkeypatch.setenv("REQUANTO_CACHE", "/dev/null/none")
    monkeypatch.setattr(build, "compilers", never)
    path = kept(cache.packaged())
    path.parent.chmod(0o777)
    assert library.find() is not None
    assert load.path() == path


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
    trust.digest_path(path).unlink()


def digest_of_garbage(path: Path) -> None:
    trust.digest_path(path).write_bytes(bytes(range(256)))


def other(path: Path) -> Path:
    """A library of older sources, under its own name."""
    return kept(path.with_name(f"requanto-cpu-{'0' * 12}-{'1' * 8}{cache.SUFFIX}"))


def of_other_sources(path: Path) -> None:
    """Put under the newer one's name, with its own digest."""
    old = other(path)
    shutil.copy(old, path)
    shutil.copy(trust.digest_path(old), trust.digest_path(path))


def with_a_new_digest(path: Path) -> None:
    """A library of older sources, for which somebody wrote a digest under this name."""
    trust.write(path, other(path).read_bytes())


def digest_without_end(path: Path) -> None:
    trust.digest_path(path).unlink()
    trust.digest_path(path).symlink_to("/dev/zero")


def a_pipe(path: Path) -> None:
    """Opening it would wait for somebody who writes to it."""
    path.unlink()
    os.mkfifo(path)


def digest_in_a_pipe(path: Path) -> None:
    trust.digest_path(path).unlink()
    os.mkfifo(trust.digest_path(path))


DAMAGE = [flipped, one_bit, cut_off, empty, without_digest, digest_of_garbage, of_other_sources]
if sys.platform == "linux":
    DAMAGE += [with_a_new_digest, digest_without_end, a_pipe, digest_in_a_pipe]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_built_anew_and_never_opened(damage, monkeypatch):
    path = kept()
    damage(path)
    opened, built = load.open_library, []

    def builds(target, compiler, only=None):
        built.append(target)
        target.write_bytes(original())
        monkeypatch.setattr(load, "open_library", opened)
        return ["avx2"]

    monkeypatch.setattr(build, "build", builds)
    monkeypatch.setattr(load, "open_library", never)
    assert library.find() is not None
    assert len(built) == 1
    assert trust.intact(path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_that_cannot_be_built_anew(damage, monkeypatch, caplog):
    path = kept()
    damage(path)
    before = None if path.is_fifo() else path.read_bytes()
    cannot_be_built(monkeypatch)
    monkeypatch.setattr(load, "open_library", never)
    torch_and_one_line(caplog, "no place to write")
    assert path.is_fifo() if before is None else path.read_bytes() == before


@pytest.mark.parametrize("damage", [flipped, of_other_sources])
def test_a_damaged_file_in_a_read_only_cache(damage, monkeypatch, caplog):
    """As the user who may read it only."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        monkeypatch.setenv("REQUANTO_CACHE", folder)
        damage(kept())
        place.chmod(0o555)
        me = os.geteuid() if hasattr(os, "geteuid") else None
        try:
            if me == 0:
                os.seteuid(65534)
            torch_and_one_line(caplog, "cannot be written to")
        finally:
            if me == 0:
                os.seteuid(0)
            place.chmod(0o700)


# Files that are whole, and cannot be used here.


def test_a_file_that_this_machine_does_not_load_stays(monkeypatch, caplog):
    """Such as from a file system mounted without exec: it is good for the other machines that share it."""
    path = kept()
    before = path.read_bytes(), path.stat().st_mtime_ns

    open_any = load.ctypes.CDLL

    def not_mapped(name):
        if name is None:  # this process, which is asked for AMX
            return open_any(name)
        raise OSError("failed to map segment from shared object: Operation not permitted\nand more")

    monkeypatch.setattr(load.ctypes, "CDLL", not_mapped)
    monkeypatch.setattr(cache, "make", never)
    torch_and_one_line(
        caplog, "could not be loaded: failed to map segment from shared object: Operation not permitted. Set"
    )
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(RuntimeError, match="failed to map segment"):
        library.find()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_another_version_of_the_interface(monkeypatch, caplog):
    kept()
    monkeypatch.setattr(load.interface, "ABI", 99)
    torch_and_one_line(caplog, "of the interface, expected 99")


@pytest.mark.parametrize("error", [RuntimeError, TypeError, OSError, KeyError, NotImplementedError])
def test_whatever_fails_the_model_does_not(error, monkeypatch, caplog):
    kept()

    def fails(*args, **how):
        raise error("out of the blue")

    monkeypatch.setattr(cache, "find", fails)
    torch_and_one_line(caplog, "out of the blue")
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(RuntimeError, match="out of the blue"):
        library.find()


def test_the_settings(monkeypatch, caplog):
    """False: neither built nor loaded. True: an error where there are no kernels; and another try, which may succeed."""
    kept()
    monkeypatch.setattr(settings, "compiled", False)
    with monkeypatch.context() as context:
        context.setattr(cache, "find", never)
        assert library.find() is None
    assert not caplog.records
    monkeypatch.setattr(settings, "compiled", None)
    with monkeypatch.context() as context:
        cannot_be_built(context)
        flipped(kept())
        torch_and_one_line(caplog, "no place to write")
        caplog.clear()
        library.why_not, settings.compiled = None, True
        with pytest.raises(
            RuntimeError, match=r"settings.compiled is True, but the CPU kernels are not available: no place"
        ):
            library.find()
        assert not caplog.records  # the error says it, and torch's operators do not run
    load._failed = None
    kept()
    version = registry_state.version
    assert library.find() is not None
    assert registry_state.version != version  # choices that were made without kernels are made again


def test_a_failure_is_remembered_until_the_environment_changes(monkeypatch, tmp_path):
    tries = []

    def fails(compiler, level=None):
        tries.append(level)
        raise LibraryUnavailable("no place to write")

    monkeypatch.setattr(cache, "make", fails)
    for _ in range(3):
        with pytest.raises(LibraryUnavailable, match="no place to write"):
            load.library()
    assert len(tries) == 1
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "another"))
    with pytest.raises(LibraryUnavailable):
        load.library()
    assert len(tries) == 2


def test_a_model_gets_kernels_once_the_environment_allows_them(monkeypatch, tmp_path, caplog):
    """What the line in the log advises works in the same process, also for a weight that has been multiplied before."""
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256))
    quantize(layer, weights="int4")
    freeze(layer)
    x = torch.randn(3, 256)
    with monkeypatch.context() as context:
        cannot_be_built(context)
        context.setenv("REQUANTO_CACHE", str(tmp_path / "one"))
        with torch.no_grad():
            before = [layer(x) for _ in range(2)]
        context.setenv("REQUANTO_CACHE", str(tmp_path / "two"))
        with torch.no_grad():
            before += [layer(x) for _ in range(2)]
        assert explain(layer, rows=3)[0].implementation == "cpu-dequantize"
        assert [record.getMessage().count("no place to write") for record in caplog.records] == [1, 1]
    kept()
    with torch.no_grad():
        layer(x)
        layer(x)
    assert library.why_not is None
    assert layer[0].weight.is_packed
    assert explain(layer, rows=3)[0].implementation == "cpu-integer"
    assert len(caplog.records) == 2


# What a name stands for.


def test_the_name_covers_sources_flags_and_platform(monkeypatch, tmp_path):
    names = [build.library_name()]
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.library_name() == names[0]
    (sources / "pack.cpp").write_text((sources / "pack.cpp").read_text() + "\n")
    names.append(build.library_name())
    (sources / "another.h").write_text("")
    names.append(build.library_name())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.append(build.library_name())
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    names.append(build.library_name())
    assert len(set(names)) == 5


def test_the_path_covers_the_compiler(tmp_path):
    program = tmp_path / "g++"
    found = []
    for text in ("", "# another version"):
        program.write_text(text)
        program.chmod(0o755)
        found += [cache.path_of(build.Compiler((str(program), *options))).name for options in ((), ("-m64",))]
    assert len(set(found)) == 4
