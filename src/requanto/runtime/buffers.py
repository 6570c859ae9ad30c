"""Scratch buffers of each thread, kept between calls: fresh pages cost more than the dequantization that fills them.

(Into a fresh 32 MB tensor 14 to 28 ms go into page faults, into a kept one 2.4 ms into the work: docs/cpu.md.)

All that a thread keeps, buffers and objects, takes ``settings.workspace_bytes`` at most after each request; what was
asked for longest ago goes first, and what alone is larger is made for each request and not kept. A caller may hold
several at once: one that goes is forgotten here, and its memory lasts as long as the caller's tensor. So a tensor's
numbers are the caller's until this thread asks for the same slot again, whatever else it asks for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from requanto.runtime.settings import settings
from requanto.runtime.tracing import has_numbers, unwatched

#: A number or a string names a buffer, a tuple an object.
Slot: TypeAlias = int | str | tuple[object, ...]


class _Local(threading.local):
    """What this thread keeps, the last request last, and the bytes of each and of all."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Slot, Any] = OrderedDict()
        self.sizes: dict[Slot, int] = {}
        self.nbytes = 0


_local = _Local()


class _Sized(Protocol):
    nbytes: int


T = TypeVar("T", bound=_Sized)


def workspace(shape: tuple[int, ...], dtype: torch.dtype, slot: int | str = 0) -> torch.Tensor:
    """An uninitialized tensor on the CPU, its numbers the caller's until this thread asks for the same slot again."""
    if not has_numbers():
        return torch.empty(shape, dtype=dtype, device="cpu")  # of a trace, perhaps: it must not outlive that
    wanted = dtype.itemsize
    for size in shape:
        wanted *= size
    buffer = _local.kept.get(slot)
    if buffer is None or buffer.numel() < wanted:
        buffer = _fresh(slot, wanted)
    else:
        _local.kept.move_to_end(slot)
        if _local.nbytes > settings.workspace_bytes:  # set lower meanwhile
            _make_room(0)
    return buffer[:wanted].view(dtype).view(shape)


def _fresh(slot: int | str, nbytes: int) -> torch.Tensor:
    bounded = nbytes <= settings.workspace_bytes
    if bounded:
        _drop(slot)  # first, so that both are never there at once
    _make_room(nbytes if bounded else 0)
    # Never under the caller's modes (inference, a default device): the next call may come from outside them.
    with unwatched(), torch._C.DisableTorchFunction():
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if bounded:
        _add(slot, buffer, nbytes)
    return buffer


def keep(slot: tuple[object, ...], nbytes: int, make: Callable[[], T]) -> T:
    """This thread's object of that name, made if it is not there; all objects take half of the bound at most.

    Those that were asked for longest ago go first. One that is larger than that half is the only object, and one that is
    larger than the bound is not kept.

    Args:
        nbytes: that it will take.
        make: makes it, outside the caller's modes; with device and dtype of its own choice.
    """
    found: T | None = _local.kept.get(slot)
    if found is not None:
        _local.kept.move_to_end(slot)
        if _local.nbytes > settings.workspace_bytes:
            _make_room(0)
        return found
    objects = [held for held in _local.kept if isinstance(held, tuple)]
    taken = sum(_local.sizes[held] for held in objects)
    for held in objects:
        if taken + nbytes <= settings.workspace_bytes // 2:
            break
        taken -= _local.sizes[held]
        _drop(held)
    _make_room(nbytes if nbytes <= settings.workspace_bytes else 0)
    with unwatched(), torch._C.DisableTorchFunction():
        made = make()
    size = made.nbytes
    if size <= settings.workspace_bytes:
        _make_room(size)  # what it took to make it may be kept too
        _add(slot, made, size)
    return made


def _make_room(nbytes: int) -> None:
    """Forgets what was asked for longest ago, until so many bytes more keep to the bound, or nothing is left."""
    while _local.kept and _local.nbytes + nbytes > settings.workspace_bytes:
        _drop(next(iter(_local.kept)))


def _add(slot: Slot, made: object, nbytes: int) -> None:
    _local.kept[slot], _local.sizes[slot] = made, nbytes
    _local.nbytes += nbytes


def _drop(slot: Slot) -> None:
    if _local.kept.pop(slot, None) is not None:
        _local.nbytes -= _local.sizes.pop(slot)


def scratch(like: torch.Tensor, slot: str) -> torch.Tensor:
    """An uninitialized float32 tensor of ``like``'s shape; on a CPU this thread's buffer of that name.

    Accelerators' allocators keep their pages, the CPU's gives them back: while a model is loaded, fresh ones for every
    temporary made its quantization take three times as long.
    """
    if like.device.type != "cpu" or type(like) is not torch.Tensor or not has_numbers():
        return torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return workspace(tuple(like.shape), torch.float32, slot)


def release_scratch() -> None:
    """Gives this thread's named buffers back: between two weights they are not needed."""
    for slot in [slot for slot in _local.kept if isinstance(slot, str)]:
        _drop(slot)


def rows_that_fit(row_bytes: int, rows: int) -> int:
    """How many rows of a weight fit into the bound; one at least."""
    return max(1, min(rows, settings.workspace_bytes // max(1, row_bytes)))


def held_bytes() -> int:
    """Bytes that this thread keeps."""
    return sum(held.nbytes for held in _local.kept.values())


def release() -> None:
    """Gives this thread's buffers back."""
    for slot in list(_local.kept):
        _drop(slot)
