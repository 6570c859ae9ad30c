"""Writing a checkpoint directory so that it is the old one or the new one, never half of each."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

# What a save writes anew; such a file of an earlier save, no longer written, must not stay beside the new ones.
_WEIGHTS = re.compile(r".*(\.safetensors|\.safetensors\.index\.json|\.bin|\.bin\.index\.json|\.distcp|\.metadata)$")


@contextlib.contextmanager
def replaced_directory(target: str | os.PathLike) -> Iterator[Path]:
    """A scratch directory beside ``target`` that takes its place when the block ends well.

    Files of the old directory that the block did not write (a tokenizer, say) are carried over, old weights are not. If
    the block raises (disk full, interrupted), the scratch directory is deleted and the old one is as it was.

    Raises:
        NotADirectoryError: ``target`` is a file.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"cannot save to {target}: it is a file, expected a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
    try:
        yield scratch
        os.chmod(scratch, 0o777 & ~_umask())
        _sync(scratch)
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def replaced_by_all_ranks(target: str | os.PathLike) -> Iterator[Path]:
    """:func:`replaced_directory` for a directory that every process of torch.distributed writes into.

    All of them must enter it, on a file system that they share. Rank 0 puts the new directory in its place when all have
    left the block; if one of them raises or dies, the old directory stays as it was::

        with replaced_by_all_ranks("checkpoint") as scratch:
            torch.distributed.checkpoint.save({"model": model.state_dict()}, checkpoint_id=scratch)

    Raises:
        OSError: on every rank, if rank 0 cannot make the new directory.
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
        dist.barrier()  # all have written
    dist.barrier()  # it is in its place


def _swap(scratch: Path, target: Path) -> None:
    if not target.exists():
        os.rename(scratch, target)
        return
    kept = [p for p in target.iterdir() if not (scratch / p.name).exists() and not _WEIGHTS.fullmatch(p.name)]
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        os.rename(target, old / "dir")
    except OSError as error:  # a mount point, or a directory another process holds
        old.rmdir()
        logger.warning("%s cannot be replaced at once (%s); its files are replaced one by one", target, error)
        _replace_files(scratch, target)
        return
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old / "dir", target)
        old.rmdir()
        raise
    for path in kept:
        os.rename(old / "dir" / path.name, target / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _replace_files(scratch: Path, target: Path) -> None:
    written = {p.name for p in scratch.iterdir()}
    # Without its config a directory does not load: it goes first and comes back last.
    for name in ("config.json", "model_index.json"):
        (target / name).unlink(missing_ok=True)
    for path in list(target.iterdir()):
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
    for path in sorted(scratch.iterdir(), key=lambda p: p.name in ("config.json", "model_index.json")):
        os.replace(path, target / path.name)


def _sync(directory: Path) -> None:
    """Asks the disk to hold what was written before the rename makes it visible."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
