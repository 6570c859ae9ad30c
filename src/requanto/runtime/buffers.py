"""One buffer a thread, kept between calls: fresh pages cost more than the dequantization that fills them.

(Into a fresh 32 MB tensor 14 to 28 ms go into page faults, into a kept one 2.4 ms into the work: docs/cpu.md.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from requanto.runtime.settings import settings
from requanto.runtime.tracing import has_numbers

_local = threading.local()
T = TypeVar("T", bound="_Sized")


def workspace(shape: tuple[int, ...], dtype: torch.dtype, slot: int | str = 0) -> torch.Tensor:
    """An uninitialized tensor, valid until this thread asks for the same slot again."""
    if not has_numbers():
        return torch.empty(shape, dtype=dtype, device="cpu")  # of a trace, perhaps: it must not outlive that
    wanted = dtype.itemsize
    for size in shape:
        wanted *= size
    buffers = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(slot)
    if buffer is None or buffer.numel() < wanted:
        # Never under inference mode's rules: the next call may come from outside it.
        with torch.inference_mode(False):
            buffer = buffers[slot] = torch.empty(wanted, dtype=torch.uint8, device="cpu")
    return buffer[:wanted].view(dtype).view(shape)


class _Sized(Protocol):
    nbytes: int


def keep(slot: tuple[object, ...], nbytes: int, make: Callable[[], T]) -> T:
    """This thread's object of that name, made if it is not there; all of them take half of the bound at most.

    Those that were asked for longest ago go first. One that is larger than that alone is kept alone.
    """
    objects: OrderedDict[tuple[object, ...], T] | None = _local.__dict__.get("objects")
    if objects is None:
        objects = _local.__dict__["objects"] = OrderedDict()
    found = objects.get(slot)
    if found is not None:
        objects.move_to_end(slot)
        return found
    while objects and nbytes + sum(held.nbytes for held in objects.values()) > settings.workspace_bytes // 2:
        objects.popitem(last=False)
    objects[slot] = made = make()
    return made


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
    buffers = _local.__dict__.get("buffers", {})
    for slot in [slot for slot in buffers if isinstance(slot, str)]:
        del buffers[slot]


def rows_that_fit(row_bytes: int, rows: int) -> int:
    """How many rows of a weight fit into the bound; one at least."""
    return max(1, min(rows, settings.workspace_bytes // max(1, row_bytes)))


def held_bytes() -> int:
    """Bytes that this thread keeps."""
    held = (_local.__dict__.get(name, {}).values() for name in ("buffers", "objects"))
    return sum(buffer.nbytes for buffers in held for buffer in buffers)


def release() -> None:
    """Gives this thread's buffers back."""
    _local.__dict__.pop("buffers", None)
    _local.__dict__.pop("objects", None)
