"""Scratch buffers that each thread reuses between calls.

Reuse pays because fresh pages cost more than the dequantization that fills them: a fresh 32 MB tensor costs 14 to 28 ms of
page faults, a reused one 2.4 ms in all (docs/cpu.md).

A thread's cached buffers take at most ``settings.workspace_bytes`` after each request. The least recently requested ones are
evicted first; one larger than the limit is allocated for each request and not cached. A caller may hold several buffers at
once: eviction only drops the cache's reference. So the contents of a buffer stay valid until the same thread requests the
same slot again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeAlias

import torch

from requanto.runtime.settings import settings
from requanto.runtime.tracing import outside_tracing, runs_eagerly

#: Key of a buffer.
Slot: TypeAlias = int | str


class _Local(threading.local):
    """This thread's cache, least recently requested buffer first, with the bytes of all."""

    def __init__(self) -> None:
        self.cached: OrderedDict[Slot, torch.Tensor] = OrderedDict()
        self.nbytes = 0


_local = _Local()


def scratch_buffer(shape: tuple[int, ...], dtype: torch.dtype, slot: Slot = 0) -> torch.Tensor:
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
    buffer = _local.cached.get(slot)
    if buffer is None or buffer.numel() < nbytes or _local.nbytes > settings.workspace_bytes:
        return scratch_buffer((nbytes,), torch.uint8, slot)
    return buffer


def _new_buffer(slot: Slot, nbytes: int) -> torch.Tensor:
    cacheable = nbytes <= settings.workspace_bytes
    if cacheable:
        _drop(slot)  # before the allocation, so that the old and the new buffer never exist at once
    _evict_for(nbytes if cacheable else 0)
    # Not under the caller's modes (inference mode, a default device): the next call may run outside them.
    with outside_tracing(), torch._C.DisableTorchFunction():
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if cacheable:
        _local.cached[slot] = buffer
        _local.nbytes += nbytes
    return buffer


def _evict_for(nbytes: int) -> None:
    """Evicts the least recently requested buffers until ``nbytes`` more fit the limit, or the cache is empty."""
    while _local.cached and _local.nbytes + nbytes > settings.workspace_bytes:
        _drop(next(iter(_local.cached)))


def _drop(slot: Slot) -> None:
    buffer = _local.cached.pop(slot, None)
    if buffer is not None:
        _local.nbytes -= buffer.nbytes


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
    """Bytes of this thread's cached buffers."""
    return sum(buffer.nbytes for buffer in _local.cached.values())


def release() -> None:
    """Frees all cached buffers of this thread."""
    for slot in list(_local.cached):
        _drop(slot)
