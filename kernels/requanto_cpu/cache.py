"""Where the library is: in this package (wheels, `pip install .`), else in the cache, into which it is built once.

The cache holds one library for each state of the sources and each compiler, so versions and machines may share it. If it is
damaged, read-only, full or owned by another user, `find` raises `LibraryUnavailable`; `requanto_cpu.trust` decides which
files may be loaded.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from requanto_cpu import build, trust
from requanto_cpu.trust import LibraryUnavailable, first_line

try:
    import fcntl
except ImportError:  # Windows: two processes may both build it
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: Where setup.py writes the library.
PACKAGED = Path(__file__).parent / "built"
SUFFIX = ".dll" if os.name == "nt" else ".so"
#: Free disk space in bytes that a build needs; the library takes 1 MB.
MIN_FREE_BYTES = 32 * 2**20

#: File descriptors of locks that this process holds.
_held: set[int] = set()


def packaged() -> Path:
    """Path of this package's own library, whether it exists or not."""
    return PACKAGED / f"{build.library_name()}{SUFFIX}"


def path_of(compiler: build.Compiler, level: str | None = None) -> Path:
    """Path of a library in the cache, whether it exists or not.

    Args:
        level: the only one that it has; None: it has all.

    Raises:
        LibraryUnavailable: there is no folder for the cache.
    """
    end = f"-{level}" if level else ""
    return trust.directory() / f"{build.library_name()}-{compiler.identity}{end}{SUFFIX}"


def find(level: str | None = None) -> Path:
    """The library: that of this package, or in the cache that of the compiler; built if there is none.

    Where no compiler works, one of another compiler.

    Args:
        level: one with this level is enough, which takes a quarter of the time to build; None: all levels.

    Raises:
        LibraryUnavailable: there is none that may be loaded, and none can be built.
    """
    return found(level) or _built(level)


def found(level: str | None = None) -> Path | None:
    """As `find`, but None where one would be built.

    Raises:
        LibraryUnavailable: there is one that may not be loaded.
    """
    try:
        if trust.intact(packaged(), owners=False):
            return packaged()
    except LibraryUnavailable as error:
        logger.info("%s", error)  # the cache's may do
    try:
        compilers = build.compilers()
    except build.BuildError:
        return _of_another_compiler(level)
    paths = [path_of(compiler, one) for one in _wanted(level) for compiler in compilers]
    return next((path for path in paths if trust.intact(path)), None)


def _wanted(level: str | None) -> list[str | None]:
    return [None] if level is None else [None, level]


def _built(level: str | None) -> Path:
    try:
        compilers = build.compilers()
        try:
            return _build_with_any(compilers, level)
        except build.UnknownLevels as error:
            if level is None:
                raise
            logger.info("%s; building the others", first_line(error))
            return _build_with_any(compilers, None)
    except build.BuildError as error:
        if (other := _of_another_compiler(level)) is not None:
            logger.info("%s; using %s, which another compiler has built", first_line(error), other)
            return other
        logger.debug("%s", error)  # with the compiler's output
        raise LibraryUnavailable(f"they could not be built: {first_line(error)}") from error


def _build_with_any(compilers: list[build.Compiler], level: str | None) -> Path:
    for number, compiler in enumerate(compilers, 1):
        try:
            return make(compiler, level)
        except build.BuildError as error:
            if number == len(compilers):
                raise
            logger.info("%s; trying %s", first_line(error), compilers[number].command[0])
    raise AssertionError("there is no compiler")


def _of_another_compiler(level: str | None) -> Path | None:
    for one in _wanted(level):
        pattern = f"{build.library_name()}-{'?' * 8}{f'-{one}' if one else ''}{SUFFIX}"
        for path in sorted(trust.directory().glob(pattern)):
            if trust.intact(path):
                return path
    return None


def make(compiler: build.Compiler, level: str | None = None) -> Path:
    """Builds a library and writes it to `path_of` it, unless another process does so meanwhile; returns its path.

    Raises:
        BuildError: the compiler failed.
        LibraryUnavailable: it cannot be written there, or not be loaded from there.
    """
    path = path_of(compiler, level)
    folder = path.parent
    try:
        # Only this user may write native code here; others may read it, as those of an image in which root built it.
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        trust.check_owner_and_mode(folder)
        with _locked(path):
            if trust.intact(path):
                return path
            _remove_stale_folders(folder)
            if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            trust.check_not_noexec(folder)
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=build.FOLDER, dir=folder, ignore_cleanup_errors=True) as work:
                fresh = Path(work) / "library"
                levels = build.build(fresh, compiler, only=None if level is None else (level,))
                trust.write(path, fresh.read_bytes() + trust.mark(path.name))
            seconds, names = time.monotonic() - start, ", ".join(levels)
            logger.info("built the CPU kernels (%s) with %s in %.1f s: %s", names, compiler.command[0], seconds, path)
    except OSError as error:
        raise LibraryUnavailable(
            f"they cannot be written to {folder}: {error}. Set REQUANTO_CACHE to a writable directory"
        ) from error
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of a library among processes.

    Raises:
        OSError: the lock cannot be written.
        LibraryUnavailable: another process has held it for too long.
    """
    if fcntl is None:
        yield
        return
    file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    _held.add(file)
    try:
        patience = build.Waiting(
            "requanto: waiting for another process that builds the CPU kernels (it holds %s.lock)", path
        )
        while not _lock(file):
            if patience.is_too_long():
                raise LibraryUnavailable(
                    f"another process holds {path}.lock and has not built the kernels in {build.TIMEOUT:.0f} s"
                )
            time.sleep(0.02)
        yield
    finally:
        if file in _held:  # not so in a fork
            _held.remove(file)
            os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # No locks on this file system: the library may be built twice, and is written atomically.
    return True


def _remove_stale_folders(folder: Path) -> None:
    """Removes folders left by processes that were killed: those older than any build can be."""
    for left in folder.glob(f"{build.FOLDER}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 4 * build.TIMEOUT:
                shutil.rmtree(left, ignore_errors=True)


def _after_fork() -> None:
    """In the child of a fork, which would hold the lock as long as it lives."""
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
