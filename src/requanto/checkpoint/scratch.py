"""The folder that a save writes into before anything of the target changes, and who is at work on it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: start of the name of every such folder
PREFIX = ".requanto-saving-"
NEW = "new"
OLD = "old"
OWNER = "owner.json"
PLAN = "plan.json"
#: seconds to wait for another process that replaces the same directory
_PATIENCE = 120.0
#: seconds after which the folder of a process on another machine, which cannot be asked, counts as left behind
_STALE = 24 * 3600.0

_held: set[int] = set()


def _close_in_child() -> None:
    # A lock belongs to all processes that share its descriptor. A child that outlives a killed saver would keep it.
    for descriptor in list(_held):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """An exclusive lock on a directory. The kernel releases it when the process ends, however it ends."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        self._descriptor: int | None = None

    def acquire(self, wait: float) -> bool | None:
        """Returns True when the lock is held, False if another holds it, None where there are no locks."""
        if fcntl is None:
            return None
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        _held.add(descriptor)
        self._descriptor = descriptor
        try:
            return self._wait(descriptor, time.monotonic() + wait)
        except BaseException:  # Ctrl-C: nobody would release it
            self.release()
            raise

    def _wait(self, descriptor: int, deadline: float) -> bool | None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self.release()
                    return False
                time.sleep(0.01)
            except OSError as error:  # e.g. NFS, which locks only files that are open for writing
                logger.info("%s cannot be locked (%s): two savers at once could mix their files", self.directory, error)
                self.release()
                return None

    def release(self) -> None:
        """Releases the lock; without effect if it is not held."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or descriptor not in _held:  # not held, or in a child after a fork
            return
        _held.discard(descriptor)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock: no other saver changes the directory meanwhile.

    Raises:
        TimeoutError: another process has held it for two minutes.
    """
    lock = Lock(directory)
    try:
        if lock.acquire(_PATIENCE) is False:
            raise TimeoutError(
                f"another process has been replacing the files of {directory} for {_PATIENCE:.0f} seconds; try again when "
                f"it has ended"
            )
        yield
    finally:
        lock.release()


class Scratch:
    """A folder in which a new checkpoint grows: ``new`` holds its files. It lies in the target, or next to a new target.

    Attributes:
        target: the directory to replace; symbolic links are resolved.
        folder: the scratch folder.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        inside = target.is_dir()
        base = target if inside else target.parent
        name = PREFIX if inside else _beside(target)
        self.folder = base / f"{name}{secrets.token_hex(4)}"
        self._lock = Lock(self.folder)
        made = False
        try:
            with locked(base):
                remove_debris(target)
                os.mkdir(self.folder, 0o700)  # keeps the setgid bit that it gets from a setgid directory
                made = True
                self._lock.acquire(0)
            (self.folder / OWNER).write_text(json.dumps(_this_process()), encoding="utf-8")
            os.mkdir(self.new)
        except BaseException:
            if made:
                self.remove()
            raise

    @property
    def new(self) -> Path:
        """Directory of the new files."""
        return self.folder / NEW

    def move_into_target(self) -> None:
        """Moves the folder into the target, which another saver has created meanwhile."""
        place = self.target / f"{PREFIX}{secrets.token_hex(4)}"
        os.rename(self.folder, place)
        self.folder = place

    def file_mode(self) -> int:
        """Returns the permissions of a new file here: umask and default ACL are applied by the kernel, not computed."""
        probe = self.folder / "mode"
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            return os.fstat(descriptor).st_mode & 0o7777
        finally:
            os.close(descriptor)
            os.unlink(probe)

    def remove(self) -> None:
        """Deletes the folder and releases its lock."""
        try:
            remove_folder(self.folder)
        finally:  # interrupted: while this process held the lock, no later save could delete what is left
            self._lock.release()

    def leave(self) -> None:
        """Releases the lock; the folder stays, for `requanto.checkpoint.commit.finish_interrupted`."""
        self._lock.release()


def remove_folder(folder: Path) -> None:
    """Deletes a scratch folder. Its plan goes first, so that a half-deleted folder is not taken for a save to finish."""
    with contextlib.suppress(OSError):  # there is none, or the folder is another user's
        os.unlink(folder / PLAN)
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        logger.warning("%s could not be deleted; it is not needed any more", folder)


def folders_in(directory: Path) -> list[Path]:
    """Returns the scratch folders inside a target."""
    try:
        with os.scandir(directory) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return []


def remove_debris(target: Path) -> None:
    """Deletes what killed saves to this target have left behind. The target, or its parent if it is new, must be locked."""
    from requanto.checkpoint.commit import finish

    for folder in folders_in(target):
        if not in_use(folder):
            finish(folder, target)
            remove_folder(folder)
    beside = [folder for folder in folders_in(target.parent) if folder.name.startswith(_beside(target))]
    if not beside:
        return
    # Folders next to a target are created under the lock of the parent.
    with locked(target.parent) if target.is_dir() else contextlib.nullcontext():
        for folder in beside:
            if not in_use(folder):
                remove_folder(folder)


def in_use(folder: Path) -> bool:
    """Whether the process that created a scratch folder may be alive."""
    lock = Lock(folder)
    try:
        free = lock.acquire(0)
    except OSError:
        return False  # deleted meanwhile
    try:
        if free is False:
            return True
        try:
            # a FIFO or device of a downloaded directory would never end
            owner = json.loads((folder / OWNER).read_text(encoding="utf-8")) if (folder / OWNER).is_file() else None
        except (OSError, ValueError, RecursionError):
            owner = None
        here = _this_process()
        if owner is None or not isinstance(owner, dict):
            return free is None and _age(folder) < _STALE
        if owner.get("boot") == here["boot"] and here["boot"]:
            return free is None and owner.get("start") == _start_time(owner.get("pid"))
        if owner.get("host") == here["host"]:
            return False  # this machine was started again
        return _age(folder) < _STALE
    finally:
        lock.release()


def _beside(target: Path) -> str:
    # Not the target's name itself, which may have 255 bytes.
    return f"{PREFIX}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "start": _start_time(pid), "boot": _boot(), "host": socket.gethostname()}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_time(pid: Any) -> str | None:
    """Returns when a process started, in the kernel's ticks; None if it has ended. A pid alone may be given to another."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None


def _age(folder: Path) -> float:
    """Returns the seconds since the last change in a scratch folder."""
    newest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            newest = max(newest, path.lstat().st_mtime)
    return time.time() - newest
