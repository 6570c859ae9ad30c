"""Which files of the kernel cache may be opened: they are native code, and run with all that this process may do.

A package ``NAME.so`` is opened where

* it and the folder belong to this user or to root, and nobody else may write to either (not checked on Windows);
* ``NAME.so.sha256`` beside it holds the digest of its name and its bytes. The name says which kernel it is, what it was
  made from and for which machine: a file cut off, changed, or put under another name is none.

The digest guards against damage, not against somebody who may write there; the owner and the mode do that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path


class KernelUnavailable(RuntimeError):
    """A kernel could not be made or loaded on this machine; the message says why, and what to do."""


class CannotBeMade(KernelUnavailable):
    """No kernel can, as far as is known: there is no compiler that works, or no place to write."""


class CannotBeLoaded(KernelUnavailable):
    """No kernel can, as far as is known: the cache is not this user's own, or the system loads no code from there."""


WITHOUT = "or do without (requanto.settings.compiled = False, REQUANTO_COMPILE=0)"


def first_line(error: BaseException) -> str:
    """What an error says, without torch's trace of C++."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def directory() -> Path:
    """Where packages are kept.

    Raises:
        CannotBeLoaded: neither the environment nor the user's home names a place.
    """
    chosen = os.environ.get("REQUANTO_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "requanto"
    try:
        return (Path(chosen) if chosen else usual).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # no home, or no working directory
        raise CannotBeLoaded(
            f"there is no place for the kernel cache: {first_line(error).rstrip('.')}. Set REQUANTO_CACHE to a "
            f"directory, {WITHOUT}."
        ) from error


def intact(path: Path) -> bool:
    """True where a package may be opened; False where there is none, or a damaged one.

    Raises:
        CannotBeLoaded: it is somebody else's, or others may write to it.
        KernelUnavailable: it cannot be read.
    """
    try:
        # Links are followed: who may write to the link's folder, or to the file's, decides what is loaded.
        real = path.resolve(strict=True)
        for place in (path.parent, real.parent, real):
            refuse_others(place)
        return _digest_path(path).read_text().strip() == digest(path.name, real.read_bytes())
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False
    except (OSError, RuntimeError) as error:
        if isinstance(error, KernelUnavailable):
            raise
        raise CannotBeLoaded(
            f"the kernel {path} cannot be read: {error}. Let this user read it, set REQUANTO_CACHE to a directory of "
            f"your own, {WITHOUT}."
        ) from error


def refuse_others(place: Path) -> None:
    """Refuses a file or folder that others own or may write to; on Windows, where modes say nothing, none.

    Raises:
        CannotBeLoaded: with what to do.
        OSError: it is not there.
    """
    if not hasattr(os, "geteuid"):
        return
    info, me = place.stat(), os.geteuid()
    if info.st_uid not in (me, 0):
        wrong, remedy = f"belongs to user {info.st_uid}, not to this one ({me}) or root", "Have it given to you (chown)"
    elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = f"may be written by others (mode {stat.S_IMODE(info.st_mode):o})"
        remedy = f"Run `chmod go-w {place}`"
    else:
        return
    raise CannotBeLoaded(
        f"{place} {wrong}, and code is loaded from there. {remedy}, set REQUANTO_CACHE to a directory of your "
        f"own, {WITHOUT}."
    )


def refuse_noexec(folder: Path) -> None:
    """Refuses a folder whose file system runs no code, where that can be told (Linux).

    Raises:
        CannotBeLoaded: with what to do.
        OSError: it is not there.
    """
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise CannotBeLoaded(
            f"{folder} lies on a file system mounted noexec: no code is loaded from there. Set REQUANTO_CACHE to another "
            f"directory, {WITHOUT}."
        )


def digest(name: str, content: bytes) -> str:
    """Of a package's name and its bytes: 64 hexadecimal digits."""
    return hashlib.sha256(name.encode() + b"\0" + content).hexdigest()


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def write(path: Path, content: bytes) -> None:
    """Writes a package and its digest, each as a whole.

    A process that looks in between sees a damaged one at worst, waits for the lock and looks again.

    Raises:
        OSError: no room, or no right to write. What was there before is still there.
    """
    texts = {_digest_path(path): f"{digest(path.name, content)}\n".encode(), path: content}
    parts = {place: place.with_name(f"{place.name}.{os.getpid()}") for place in texts}
    try:
        for place, text in texts.items():
            parts[place].unlink(missing_ok=True)
            # Never writable by others, whatever the umask: it would be refused.
            with open(os.open(parts[place], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(text)
        for place, part in parts.items():
            part.replace(place)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
