"""Scratch buffers that each thread reuses between calls.

Reuse pays because fresh pages cost more than the dequantization that fills them: a fresh 32 MB tensor costs 14 to 28 ms of
page faults, a reused one 2.4 ms in all (docs/cpu.md).

A thread's cached buffers and objects take at most ``settings.workspace_bytes`` after each request. The least recently
requested entries are evicted first; an entry larger than the limit is allocated for each request and not cached. A caller
may hold several buffers at once: eviction only drops the cache's reference. So the contents of a buffer stay valid until
the same thread requests the same slot again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from requanto.runtime.settings import settings
from requanto.runtime.tracing import outside_tracing, runs_eagerly

#: Key of a cache entry: an int or a string for a buffer, a tuple for an object.
Slot: TypeAlias = int | str | tuple[object, ...]


class _Local(threading.local):
    """This thread's cache, least recently requested entry first, with the bytes of each entry and of all."""

    def __init__(self) -> None:
        self.cached: OrderedDict[Slot, Any] = OrderedDict()
        self.sizes: dict[Slot, int] = {}
        self.nbytes = 0


_local = _Local()


class _Sized(Protocol):
    nbytes: int


T = TypeVar("T", bound=_Sized)


def scratch_buffer(shape: tuple[int, ...], dtype: torch.dtype, slot: int | str = 0) -> torch.Tensor:
    """An uninitialized CPU tensor, valid until this thread requests the same slot again."""
    if not runs_eagerly():
        return torch.empty(shape, dtype=dtype, device="cpu")  # may belong to a trace: must not outlive it
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    buffer = _local.cached.get(slot)
    if buffer is None or buffer.numel() < nbytes:
        buffer = _new_buffer(slot, nbytes)
    else:
        _local.cached.move_to_end(slot)
        if _local.nbytes > settings.workspace_bytes:  # the setting was lowered since
            _evict_for(0)
    return buffer[:nbytes].view(dtype).view(shape)


def scratch_memory(nbytes: int, slot: str) -> torch.Tensor:
    """A scratch buffer of ``nbytes`` or more as uint8, for code that runs eagerly and uses its address.

    It takes a third of the time of `scratch_buffer`, in calls of a few microseconds.
    """
    buffer: torch.Tensor | None = _local.cached.get(slot)
    if buffer is None or buffer.numel() < nbytes or _local.nbytes > settings.workspace_bytes:
        return scratch_buffer((nbytes,), torch.uint8, slot)
    return buffer


def _new_buffer(slot: int | str, nbytes: int) -> torch.Tensor:
    cacheable = nbytes <= settings.workspace_bytes
    if cacheable:
        _drop(slot)  # before the allocation, so that the old and the new buffer never exist at once
    _evict_for(nbytes if cacheable else 0)
    # Not under the caller's modes (inference mode, a default device): the next call may run outside them.
    with outside_tracing(), torch._C.DisableTorchFunction():
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if cacheable:
        _add(slot, buffer, nbytes)
    return buffer


def cached_object(slot: tuple[object, ...], nbytes: int, make: Callable[[], T]) -> T:
    """This thread's object for a slot, made on the first request.

    All objects together take at most half of the limit; the least recently requested are evicted first. An object larger
    than that half is cached alone, one larger than the limit is not cached.

    Args:
        slot: key of the object.
        nbytes: expected size of the object.
        make: makes the object; it runs outside the caller's modes and must name device and dtype itself.
    """
    found: T | None = _local.cached.get(slot)
    if found is not None:
        _local.cached.move_to_end(slot)
        if _local.nbytes > settings.workspace_bytes:
            _evict_for(0)
        return found
    objects = [other for other in _local.cached if isinstance(other, tuple)]
    total = sum(_local.sizes[other] for other in objects)
    for other in objects:
        if total + nbytes <= settings.workspace_bytes // 2:
            break
        total -= _local.sizes[other]
        _drop(other)
    _evict_for(nbytes if nbytes <= settings.workspace_bytes else 0)
    with outside_tracing(), torch._C.DisableTorchFunction():
        made = make()
    size = made.nbytes
    if size <= settings.workspace_bytes:
        _evict_for(size)  # `make` may have cached buffers of its own
        _add(slot, made, size)
    return made


def _evict_for(nbytes: int) -> None:
    """Evicts the least recently requested entries until ``nbytes`` more fit the limit, or the cache is empty."""
    while _local.cached and _local.nbytes + nbytes > settings.workspace_bytes:
        _drop(next(iter(_local.cached)))


def _add(slot: Slot, made: object, nbytes: int) -> None:
    _local.cached[slot], _local.sizes[slot] = made, nbytes
    _local.nbytes += nbytes


def _drop(slot: Slot) -> None:
    if _local.cached.pop(slot, None) is not None:
        _local.nbytes -= _local.sizes.pop(slot)


def scratch_like(like: torch.Tensor, slot: str) -> torch.Tensor:
    """An uninitialized float32 tensor of ``like``'s shape; on a CPU a scratch buffer of this thread.

    Allocators of accelerators cache their pages, the CPU's returns them to the system: with fresh pages for every
    temporary, quantizing a model while it is loaded took three times as long.
    """
    if like.device.type != "cpu" or type(like) is not torch.Tensor or not runs_eagerly():
        return torch.empty(like.shape, dtype=torch.float32, device=like.device)
    return scratch_buffer(tuple(like.shape), torch.float32, slot)


def release_scratch() -> None:
    """Frees this thread's buffers from `scratch_like`, which are not needed between two weights."""
    for slot in [slot for slot in _local.cached if isinstance(slot, str)]:
        _drop(slot)


def rows_that_fit(row_bytes: int, rows: int) -> int:
    """How many rows of ``row_bytes`` fit into the limit; at least one."""
    return max(1, min(rows, settings.workspace_bytes // max(1, row_bytes)))


def held_bytes() -> int:
    """Bytes of this thread's cached buffers and objects."""
    return sum(entry.nbytes for entry in _local.cached.values())


def release() -> None:
    """Frees all cached buffers and objects of this thread."""
    for slot in list(_local.cached):
        _drop(slot)
