"""Puts the files of a new checkpoint into a directory: a kill at any moment leaves the old checkpoint or the new one.

The files are renamed one by one, the config first. Before that, a plan is written to disk. The rename of the first file is
the moment at which the new checkpoint counts: a save that is killed before it has changed nothing, and one that is killed
after it is finished by the next load or save (`finish_interrupted`). The directory itself stays, with whatever others keep
there, so it may be a mount point or the current directory of a process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.plan import read_plan
from requanto.checkpoint.scratch import (
    NEW,
    OLD,
    PLAN,
    PREFIX,
    Scratch,
    folders_in,
    in_use,
    locked,
    remove_folder,
)
from requanto.checkpoint.weight_files import obsolete

logger = logging.getLogger(__name__)

# The file that a loader reads first is replaced first.
_FIRST = ("model_index.json", "config.json", ".metadata")


def commit(scratch: Scratch, remove: Iterable[str] = ()) -> None:
    """Replaces the target's files by those in ``scratch.new``; the scratch folder remains, with the old files in it.

    Args:
        scratch: the folder.
        remove: names of files of the target to move away, in addition to weight files that are obsolete.

    Raises:
        OSError: a file cannot be replaced; the old files are back in place, or the message says that they are not.
    """
    target, new = scratch.target, scratch.new
    mode = scratch.file_mode()
    for name in _files(new):
        if not (new / name).is_symlink():
            os.chmod(new / name, mode)  # safetensors makes files that only their owner can read
    _sync(new)
    if not target.exists():
        with locked(target.parent):
            if not target.exists():
                os.rename(new, target)
                sync_directory(target.parent)
                return
            scratch.move_into_target()
            new = scratch.new
    with locked(target):
        plan = _plan(new, target, remove)
        _check_places(plan, target)
        for name in plan["install"]:
            _keep_permissions(new / name, target / name)
        plan["new"] = {name: _stamp(new / name) for name in plan["install"]}
        _link_old(scratch.folder, target, plan)
        path = scratch.folder / PLAN
        with open(path, "w", encoding="utf-8") as file:
            json.dump(plan, file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(scratch.folder)
        _replace(scratch.folder, target, plan)


def _replace(folder: Path, target: Path, plan: dict[str, Any]) -> None:
    """Carries out a plan. If a file cannot be replaced, the old ones are put back."""
    try:
        _forward(folder, target, plan)
    except BaseException as error:
        if not _begun(folder, plan):
            raise
        try:
            _forward(folder, target, plan)  # e.g. interrupted by Ctrl-C between two files
        except OSError:
            try:
                _back(folder, target, plan)
            except OSError as second:
                raise OSError(
                    second.errno,
                    f"{target} is half replaced: {error}; and the old files could not be put back: {second}. All files "
                    f"are there, in {target} and {folder}; loading or saving again continues",
                ) from error
            raise
        if not isinstance(error, OSError):
            raise


def _plan(new: Path, target: Path, more: Iterable[str]) -> dict[str, Any]:
    names = _files(new)
    install = sorted(names, key=lambda name: (name not in _FIRST, name))
    if install and install[0] not in _FIRST:
        # No such file at the top: the first of a subdirectory's.
        install.sort(key=lambda name: (os.path.basename(name) not in _FIRST, name))
    remove = [name for name in more if name not in names and (target / name).is_file()]
    for parent in sorted({os.path.dirname(name) for name in names}):
        if (target / parent).is_dir():
            written = [os.path.basename(name) for name in names if os.path.dirname(name) == parent]
            remove += [os.path.join(parent, name) for name in obsolete(target / parent, written)]
    remove = list(dict.fromkeys(remove))
    touched = [*install, *remove]
    return {"install": install, "remove": remove, "old": {name: _stamp(target / name) for name in touched}}


def _check_places(plan: dict[str, Any], target: Path) -> None:
    """Raises before anything is changed if a file of the new checkpoint has no place."""
    for name in plan["install"]:
        place = target / name
        if place.is_dir() and not place.is_symlink():
            raise IsADirectoryError(
                f"cannot save to {target}: {name} is a directory there, and the checkpoint has a file of that name; "
                f"move the directory, or save elsewhere"
            )
        for parent in list(Path(name).parents)[:-1]:
            if (target / parent).exists() and not (target / parent).is_dir():
                raise NotADirectoryError(
                    f"cannot save to {target}: {parent} is a file there, and the checkpoint has a directory of that name; "
                    f"move the file, or save elsewhere"
                )


def _keep_permissions(new: Path, old: Path) -> None:
    """Gives a new file the permissions and the group of the file that it replaces."""
    try:
        before = old.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(before.st_mode) or new.is_symlink():
        return
    if before.st_gid != new.stat().st_gid:
        try:
            os.chown(new, -1, before.st_gid)
        except OSError as error:
            logger.info("%s: the new file cannot be given the group %d of the old one (%s)", old, before.st_gid, error)
    os.chmod(new, stat.S_IMODE(before.st_mode))


def _link_old(folder: Path, target: Path, plan: dict[str, Any]) -> None:
    """Links the files that will be replaced into the scratch folder, from which they are put back after an error."""
    for name in plan["install"]:
        if plan["old"][name] is None:
            continue
        link = folder / OLD / name
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(target / name, link, follow_symlinks=False)
        except (OSError, NotImplementedError) as error:  # a file system without hard links
            logger.info(
                "%s cannot be linked (%s): it could not be put back if saving fails halfway", target / name, error
            )


def _forward(folder: Path, target: Path, plan: dict[str, Any]) -> None:
    """Carries out what is left of a plan."""
    for count, name in enumerate(plan["install"]):
        if os.path.lexists(folder / NEW / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / NEW / name, target / name)
            if count == 0:
                sync_directory((target / name).parent)  # on disk before any other file changes
    for name in plan["remove"]:
        if _stamp(target / name) == plan["old"][name]:
            (folder / OLD / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(target / name, folder / OLD / name)
    for parent in {os.path.dirname(name) for name in (*plan["install"], *plan["remove"])}:
        sync_directory(target / parent)
    sync_directory(target)


def _back(folder: Path, target: Path, plan: dict[str, Any]) -> None:
    """Puts the old files back. Only what has been replaced is touched, and the first file last."""
    for name in reversed(plan["remove"]):
        if os.path.lexists(folder / OLD / name) and not os.path.lexists(target / name):
            os.replace(folder / OLD / name, target / name)
    for name in reversed(plan["install"]):
        if os.path.lexists(folder / NEW / name):
            continue
        if plan["old"][name] is None:
            os.replace(target / name, folder / NEW / name)
        elif os.path.lexists(folder / OLD / name):
            os.link(target / name, folder / NEW / name, follow_symlinks=False)
            os.replace(folder / OLD / name, target / name)  # there is a file of this name at every moment
        else:
            raise OSError(f"there is no link to the old {name}")


def unfinished(folder: Path, target: Path) -> bool:
    """Whether some files of the target have been replaced by those of a scratch folder, and others have not."""
    plan = read_plan(folder, target)
    if plan is None:
        return False
    waiting = any(os.path.lexists(folder / NEW / name) for name in plan["install"])
    waiting |= any(_stamp(target / name) == plan["old"][name] for name in plan["remove"])
    return _begun(folder, plan) and waiting


def _begun(folder: Path, plan: dict[str, Any]) -> bool:
    return bool(plan["install"]) and not os.path.lexists(folder / NEW / plan["install"][0])


def finish(folder: Path, target: Path) -> bool:
    """Finishes a save that was killed while it replaced files; returns False if there is nothing to finish.

    ``target`` must be locked, and the process that made the folder must have ended.
    """
    plan = read_plan(folder, target)
    if plan is None or not _begun(folder, plan):
        return False
    for name in (*plan["install"], *plan["remove"]):
        waiting = name in plan["remove"] or os.path.lexists(folder / NEW / name)
        expected = plan["old"][name] if waiting else plan["new"][name]
        found = _stamp(target / name)
        if found != expected and not (name in plan["remove"] and found is None):
            logger.warning(
                "%s was changed after a save to %s had been interrupted; what that save left in %s is not used",
                target / name,
                target,
                folder,
            )
            return False
    _forward(folder, target, plan)
    logger.warning("%s: a save was interrupted while it replaced the files; it is now complete", target)
    return True


def finish_interrupted(directory: str | os.PathLike) -> None:
    """Finishes a save to a directory, or to the pipeline that it is part of, that was killed while it replaced files.

    Waits for a save that is just now replacing files. To be called before a directory is read.

    Raises:
        CheckpointError: the save cannot be finished, e.g. in a directory that this process may not write.
    """
    directory = Path(directory)
    places = [directory]
    if (directory.parent / "model_index.json").is_file():
        places.append(directory.parent)
    for place in places:
        if not any(_has_plan(folder) for folder in folders_in(place)):
            continue
        with locked(place):
            for folder in folders_in(place):
                if not _has_plan(folder) or in_use(folder):
                    continue
                try:
                    if finish(folder, place):
                        remove_folder(folder)
                except OSError as error:
                    raise CheckpointError(
                        f"a save to {place} was interrupted while it replaced the files, and cannot be finished ({error}). "
                        f"Load it once as a user who may write there, or save it again."
                    ) from error


def _has_plan(folder: Path) -> bool:
    """Whether there is a plan; another user's folder cannot be looked into."""
    try:
        return stat.S_ISREG((folder / PLAN).lstat().st_mode)
    except OSError:
        return False


def _files(directory: Path) -> list[str]:
    """Returns the names of all files below a directory, relative to it; scratch folders of other saves are left out."""
    return sorted(_walk(directory, ""))


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith(PREFIX):
                    yield from _walk(directory / entry.name, os.path.join(prefix, entry.name))
            else:
                yield os.path.join(prefix, entry.name)


def _stamp(path: Path) -> list[int] | None:
    """Returns size and time of the last change, by which a file is recognized after a rename; None if there is no file."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns]


def _sync(directory: Path) -> None:
    """Flushes all files and directories to disk, so that a rename does not publish unwritten data."""
    parents: set[Path] = {directory}
    for name in _files(directory):
        path = directory / name
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        parents |= {parent for parent in path.parents if parent.is_relative_to(directory)}
    for parent in sorted(parents):
        sync_directory(parent)


def sync_directory(directory: Path) -> None:
    """Flushes the names in a directory to disk: a rename is durable only after this."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except (PermissionError, IsADirectoryError):  # Windows, or a directory that may be written but not read
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse fsync on a directory
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
