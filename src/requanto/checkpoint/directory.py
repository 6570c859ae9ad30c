"""Atomic replacement of a checkpoint directory: it holds the old checkpoint or the new one, never a mix."""

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

# Weight files. Those of an earlier save are deleted, or a loader could read old shards together with new ones.
_WEIGHTS = re.compile(r".*(\.safetensors|\.safetensors\.index\.json|\.bin|\.bin\.index\.json|\.distcp|\.metadata)$")


@contextlib.contextmanager
def replaced_directory(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a scratch directory next to ``target`` that replaces ``target`` when the block ends without an exception.

    Files of the old directory that the block did not write (e.g. a tokenizer) are moved to the new one, except weights.
    If the block raises (disk full, interrupted), the scratch directory is deleted and the old one is unchanged.

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


def _swap(scratch: Path, target: Path) -> None:
    if not target.exists():
        os.rename(scratch, target)
        return
    carried_over = [p for p in target.iterdir() if not (scratch / p.name).exists() and not _WEIGHTS.fullmatch(p.name)]
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    try:
        os.rename(target, old / "dir")
    except OSError as error:  # a mount point, or a directory another process holds
        old.rmdir()
        logger.warning("%s cannot be renamed (%s); its files are replaced one by one", target, error)
        _replace_files(scratch, target)
        return
    try:
        os.rename(scratch, target)
    except BaseException:
        os.rename(old / "dir", target)
        old.rmdir()
        raise
    for path in carried_over:
        os.rename(old / "dir" / path.name, target / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _replace_files(scratch: Path, target: Path) -> None:
    written = {p.name for p in scratch.iterdir()}
    # The config is deleted first and written last: a half-replaced directory then has none and does not load.
    for name in ("config.json", "model_index.json"):
        (target / name).unlink(missing_ok=True)
    for path in list(target.iterdir()):
        if _WEIGHTS.fullmatch(path.name) and path.name not in written:
            path.unlink()
    for path in sorted(scratch.iterdir(), key=lambda p: p.name in ("config.json", "model_index.json")):
        os.replace(path, target / path.name)


def _sync(directory: Path) -> None:
    """Flushes all files to disk (fsync), so that the rename does not publish unwritten data."""
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
