"""Owners and modes of the files of the kernel cache: native code of other users is never loaded."""

import errno
import os
import shutil

import pytest
from kernel_cache import fresh, kept, needs_compiler, needs_root, never, torch_and_one_line, unix

from requanto.linear.cpu import library
from requanto.runtime.settings import settings
from requanto_cpu import LibraryUnavailable, build, cache, load, trust

pytestmark = [needs_compiler(), pytest.mark.usefixtures("fresh")]
__all__ = ["fresh"]


def refused(monkeypatch, caplog, why: str) -> None:
    monkeypatch.setattr(load, "open_library", never)
    monkeypatch.setattr(build, "build", never)
    torch_and_one_line(caplog, why)
    assert "REQUANTO_CACHE" in caplog.text


@unix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o702])
def test_a_folder_that_others_may_write(mode, monkeypatch, caplog):
    path = kept()
    path.parent.chmod(mode)
    refused(monkeypatch, caplog, f"chmod go-w {path.parent}")
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(RuntimeError, match="is writable by other users"):
        library.find()


@unix
def test_nothing_is_built_where_others_may_write(fresh, monkeypatch, caplog):
    fresh.mkdir()
    fresh.chmod(0o777)
    refused(monkeypatch, caplog, "is writable by other users (mode 777)")


@unix
@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_a_file_that_others_may_write(mode, monkeypatch, caplog):
    path = kept()
    path.chmod(mode)
    refused(monkeypatch, caplog, f"chmod go-w {path}")


@needs_root
@pytest.mark.parametrize("which", ["file", "folder"])
def test_somebody_else_s(which, monkeypatch, caplog):
    path = kept()
    os.chown(path.parent if which == "folder" else path, 12345, -1)
    refused(monkeypatch, caplog, "belongs to user 12345, not to this one (0) or root")


@needs_root
def test_root_s_files_are_everybody_s(monkeypatch):
    """Built as an image was built, used by its user."""
    path = kept()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert trust.intact(path)
    os.chown(path, 1000, -1)
    assert trust.intact(path)
    os.chown(path, 1001, -1)
    with pytest.raises(LibraryUnavailable, match="belongs to user 1001"):
        trust.intact(path)


@unix
def test_links_are_followed(fresh, tmp_path):
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
    with pytest.raises(LibraryUnavailable, match="store is writable by other users"):
        trust.intact(path)
    real.chmod(0o755)
    path.parent.chmod(0o777)
    for one in (path, tmp_path / "link" / path.name):
        with pytest.raises(LibraryUnavailable, match="is writable by other users"):
            trust.intact(one)
    path.parent.chmod(0o700)
    (fresh / "loop").symlink_to(fresh / "loop")
    with pytest.raises(LibraryUnavailable, match="cannot be read"):
        trust.intact(fresh / "loop")


@unix
def test_what_is_built_is_writable_by_nobody_else(monkeypatch):
    """Whatever the umask."""
    monkeypatch.setattr(build, "build", lambda target, compiler, only=None: [str(target.write_bytes(b"code"))])
    compiler = build.compilers()[0]
    before = os.umask(0)
    try:
        path = cache.make(compiler)
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o755  # others may use what root built for an image
    assert path.stat().st_mode & 0o022 == 0
    assert trust.intact(path)


def test_a_full_disk_leaves_what_was_there(fresh, monkeypatch):
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
    assert {file.name for file in fresh.iterdir()} == {path.name, f"{path.name}.sha256"}
