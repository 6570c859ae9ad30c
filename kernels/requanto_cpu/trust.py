"""Decides which files may be loaded. They are native code that runs with this process's rights.

A library ``NAME.so`` is loaded only if

* it and its folder belong to this user or to root, and no other user can write to either (not checked on Windows, nor in
  the folder of this package: its Python files are as good);
* both are regular files, not pipes or devices, which could be read for ever;
* ``NAME.so.sha256`` in the same folder has the digest of its name and its bytes, and the bytes end with its name (`mark`).
  The name identifies the sources and the platform. So truncated, changed or renamed files are rejected.

Digest and mark protect against damage and mistakes, not against this user: who writes a changed library with a new digest
can end the process. Owner and mode protect against other users.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
from pathlib import Path

#: Larger files are damaged: a digest has 65 bytes, a library takes 1 MB.
MAX_DIGEST_BYTES, MAX_LIBRARY_BYTES = 1024, 2**28


class LibraryUnavailable(RuntimeError):
    """The CPU kernels cannot be used here; the message says why, and what to do."""


def first_line(error: BaseException) -> str:
    """First line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def directory() -> Path:
    """The folder of the kernel cache: $REQUANTO_CACHE, else $XDG_CACHE_HOME/requanto, else ~/.cache/requanto.

    Raises:
        LibraryUnavailable: neither the environment nor the user's home directory provides one.
    """
    chosen = os.environ.get("REQUANTO_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "requanto"
    try:
        return (Path(chosen) if chosen else usual).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # no home directory, or no working directory
        raise LibraryUnavailable(
            f"there is no place for the kernel cache: {first_line(error).rstrip('.')}. Set REQUANTO_CACHE to a directory"
        ) from error


def intact(path: Path, owners: bool = True) -> bool:
    """True if a library exists, is complete and may be loaded; False if it is missing or damaged.

    Args:
        owners: check owners and modes.

    Raises:
        LibraryUnavailable: it belongs to another user, others can write to it, or it cannot be read.
    """
    try:
        # Whoever can write to the folder of a symbolic link, or of its target, controls what is loaded: check both.
        real = path.resolve(strict=True)
        for place in (path.parent, real.parent, real) if owners else ():
            check_owner_and_mode(place)
        found, content = _read(digest_path(path), MAX_DIGEST_BYTES), _read(real, MAX_LIBRARY_BYTES)
        if content is None or found is None or not content.endswith(mark(path.name)):
            return False
        return found.strip() == digest(path.name, content).encode()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, RuntimeError) as error:
        if isinstance(error, LibraryUnavailable):
            raise
        raise LibraryUnavailable(
            f"{path} cannot be read: {error}. Let this user read it, or set REQUANTO_CACHE to a directory of your own"
        ) from error


def _read(path: Path, limit: int) -> bytes | None:
    """The bytes of a regular file of at most ``limit`` bytes; None for anything else, such as a pipe or a device.

    Raises:
        OSError: it does not exist or cannot be read.
    """
    # O_NONBLOCK: opening a named pipe would wait for somebody who writes to it.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        info = os.fstat(file.fileno())
        return file.read(limit) if stat.S_ISREG(info.st_mode) and info.st_size <= limit else None


def check_owner_and_mode(place: Path) -> None:
    """Checks that a file or folder belongs to this user or root and that others cannot write to it (not on Windows).

    Raises:
        LibraryUnavailable: it does not, with instructions.
        OSError: it does not exist.
    """
    if not hasattr(os, "geteuid"):
        return
    info, me = place.stat(), os.geteuid()
    if info.st_uid not in (me, 0):
        wrong, remedy = f"belongs to user {info.st_uid}, not to this one ({me}) or root", "Change its owner (chown)"
    elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = f"is writable by other users (mode {stat.S_IMODE(info.st_mode):o})"
        remedy = f"Run `chmod go-w {place}`"
    else:
        return
    raise LibraryUnavailable(
        f"{place} {wrong}, but native code is loaded from it. {remedy}, or set REQUANTO_CACHE to a directory of your own"
    )


def check_not_noexec(folder: Path) -> None:
    """Checks that a folder is not on a file system mounted noexec (only on Linux).

    Raises:
        LibraryUnavailable: it is, with instructions.
        OSError: it does not exist.
    """
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise LibraryUnavailable(
            f"{folder} is on a file system mounted noexec: no code can be loaded from it. Set REQUANTO_CACHE to another "
            "directory"
        )


def digest(name: str, content: bytes) -> str:
    """SHA-256 of a library's file name and its bytes, 64 hexadecimal digits."""
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()


def mark(name: str) -> bytes:
    """What is appended to a library: its file name. Empty where files may not be extended.

    A library of other sources is then recognized even if somebody has written a digest for it under this name.
    """
    return b"\0requanto:" + name.encode() if sys.platform == "linux" else b""


def digest_path(path: Path) -> Path:
    """The file with a library's digest."""
    return path.with_name(f"{path.name}.sha256")


def write(path: Path, content: bytes) -> None:
    """Writes a library, which ends with its `mark`, and its digest, each atomically.

    A process that reads between the two writes sees a damaged library; it then waits for the lock and reads again.

    Raises:
        OSError: disk full, or no permission to write. Existing files are not changed.
    """
    texts = {digest_path(path): f"{digest(path.name, content)}\n".encode(), path: content}
    parts = {place: place.with_name(f"{place.name}.{os.getpid()}") for place in texts}
    try:
        for place, text in texts.items():
            parts[place].unlink(missing_ok=True)
            # Not writable by others whatever the umask is: such a file would not be loaded.
            with open(os.open(parts[place], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(text)
        for place, part in parts.items():
            part.replace(place)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
