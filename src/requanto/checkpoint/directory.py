"""Atomic replacement of a checkpoint directory: a loader finds the old checkpoint or the new one, never a mix.

`requanto.checkpoint.commit` says how. Nobody else's file is deleted: only the weight files that an earlier save of the same
model and variant wrote (`requanto.checkpoint.weight_files.obsolete`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from requanto.checkpoint.commit import commit, unfinished
from requanto.checkpoint.readme import keep_readmes
from requanto.checkpoint.scratch import Scratch
from requanto.checkpoint.variants import warn_of_variants

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_target(target: str | os.PathLike) -> None:
    """Checks that a directory can be saved to, before a long computation whose result goes there.

    Raises:
        NotADirectoryError: it, or one of its parents, is a file.
        PermissionError: it may not be written to.
    """
    folder = resolved = Path(os.path.realpath(target))
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        what = "it" if folder == resolved else folder
        raise NotADirectoryError(f"cannot save to {target}: {what} is a file, expected a directory")
    if not os.access(folder, os.W_OK | os.X_OK):
        error = PermissionError(errno.EACCES, "no permission to write", str(folder))
        raise _explained(error, folder)


@contextlib.contextmanager
def replaced_directory(target: str | os.PathLike, remove: Sequence[str] = ()) -> Iterator[Path]:
    """Yields a scratch directory whose files replace those of ``target`` when the block ends without an exception.

    The target itself stays the same directory, with its permissions and with every file that the block did not write (e.g. a
    tokenizer, an adapter), except weight files that an earlier save of the same model and variant wrote. A symbolic link is
    followed. If the block raises (disk full, interrupted), the target is unchanged.

    Args:
        target: the directory; created if it does not exist.
        remove: names of further files of the old checkpoint to delete. It is read when the block has ended.

    Raises:
        NotADirectoryError: ``target`` is a file.
        OSError: nothing can be written there, or there is no space.
    """
    check_target(target)
    target = Path(os.path.realpath(target))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(target)
    except OSError as error:
        raise _explained(error, target) from error
    try:
        yield scratch.new
        keep_readmes(scratch.new, target)
        warn_of_variants(scratch.new, target)
        commit(scratch, remove)
    except Exception as error:
        explained = _explained(error, target) if scratch.new.is_dir() else _removed(error, target)
        if explained is error:
            raise
        raise explained from error
    finally:
        if unfinished(scratch.folder, scratch.target):
            scratch.leave()  # not all files could be put in place; the next load or save tries again
        else:
            scratch.remove()


@contextlib.contextmanager
def replaced_by_all_ranks(target: str | os.PathLike) -> Iterator[Path]:
    """:func:`replaced_directory` for a directory that every rank of torch.distributed writes into.

    All ranks must enter the block, on a shared file system. Rank 0 replaces the old directory after all ranks have left
    the block; if a rank raises or dies, the old directory is unchanged::

        with replaced_by_all_ranks("checkpoint") as scratch:
            torch.distributed.checkpoint.save({"model": model.state_dict()}, checkpoint_id=scratch)

    Raises:
        OSError: on every rank, if rank 0 cannot create the new directory.
    """
    with contextlib.ExitStack() as stack:
        place: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                place = [stack.enter_context(replaced_directory(target))]
            except OSError as error:
                place = [error]
        dist.broadcast_object_list(place, src=0)
        if isinstance(place[0], OSError):
            raise place[0]
        yield place[0]
        dist.barrier()  # all ranks have written
    dist.barrier()  # rank 0 has replaced the directory


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces one file when the new one is complete and on disk; permissions are those that the umask and the ACL give.

    Args:
        path: the file.
        write: called with the path of a temporary file beside it. One that a killed process left is overwritten.
    """
    part = path.with_name(
        f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.part"
    )  # names may have 255 bytes
    try:
        part.unlink(missing_ok=True)
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        write(part)
        os.chmod(part, mode)  # safetensors makes files that only their owner can read
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _removed(error: Exception, target: Path) -> Exception:
    """Returns an error that says what happened to the folder of the new files while they were written."""
    return FileNotFoundError(
        errno.ENOENT,
        f"{target} was deleted, renamed or replaced while a checkpoint was saved there ({error}): the new files went with "
        f"it; save again",
    )


def _explained(error: Exception, target: Path) -> Exception:
    """Returns an OSError that says what to do, or the error itself where its own message must do."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # of safetensors
        number = int(found[1])
    if number in _NO_SPACE:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(target if target.is_dir() else target.parent).free
            return OSError(
                number,
                f"{os.strerror(number)}: the checkpoint does not fit into {target}, where {free / 1e6:.0f} MB are free. "
                f"What was there is unchanged and needs its space until the new files are complete: free some, or save "
                f"elsewhere",
            )
    if number in _NOT_ALLOWED:
        return OSError(
            number,
            f"{os.strerror(number)}: cannot save to {target} ({error}). What was there is unchanged: change the "
            f"permissions, or save elsewhere",
        )
    return error
