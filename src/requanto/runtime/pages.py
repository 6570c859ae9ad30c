"""Memory in huge pages for packed weights on CPUs.

A token reads every weight once. With pages of 4 KB the processor looks up an address for each 64 lines, in tables that are
not in its caches either; in a virtual machine each lookup is two. Of pages of 2 MB one thread read 31 GB/s, of small ones 14
to 25 (AMD EPYC, benchmarks/NOTES.md).

Linux gives huge pages to memory that asks for them (``/sys/kernel/mm/transparent_hugepage``), if it has some; else the
memory has small ones. Weights are placed one after the other in large ranges of addresses, since most are smaller than a
huge page. A range takes memory only for what was placed in it, up to the end of a huge page; the memory of a weight that is
gone is returned.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import threading
import weakref

import torch

from requanto.runtime import fork

logger = logging.getLogger(__name__)

#: Bytes of a huge page.
HUGE = 2 * 2**20
#: Addresses that are reserved at a time; larger tensors than a quarter of it get their own.
RANGE = 256 * 2**20
#: Smaller tensors (bytes) are allocated by torch.
SMALLEST = 4096
_LINE = 64
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_RETURN = getattr(mmap, "MADV_DONTNEED", None)


class _Range:
    """Reserved addresses, from a multiple of `HUGE` on.

    Args:
        nbytes: bytes that will be placed in it.
        huge: of these, the first for which huge pages are asked for, a multiple of `HUGE`.
    """

    def __init__(self, nbytes: int, huge: int) -> None:
        self.memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.next = -address % HUGE
        self.end = self.next + nbytes
        if huge:
            self.memory.madvise(_ADVICE, self.next, huge)

    def place(self, nbytes: int) -> torch.Tensor | None:
        """uint8 ``[nbytes]``, aligned to 64 bytes; None if there is no room."""
        begin = self.next
        if begin + nbytes > self.end:
            return None
        self.next = begin + -(-nbytes // _LINE) * _LINE
        owner = (ctypes.c_uint8 * nbytes).from_buffer(self.memory, begin)
        weakref.finalize(owner, _give_back, self.memory, begin, nbytes).atexit = False
        return torch.frombuffer(owner, dtype=torch.uint8)  # it keeps the owner


def _give_back(memory: mmap.mmap, begin: int, nbytes: int) -> None:
    """Returns the whole pages of a tensor that is gone."""
    first, last = -(-begin // mmap.PAGESIZE), (begin + nbytes) // mmap.PAGESIZE
    if last > first:
        memory.madvise(_RETURN, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


_lock = fork.new_in_child(threading.Lock())
_range: _Range | None = None
_failed = False


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialized CPU tensor, in huge pages where the system has them; outside of tracers and torch's modes."""
    nbytes = math.prod(shape) * dtype.itemsize
    found = None if nbytes < SMALLEST or _ADVICE is None or _RETURN is None else _placed(nbytes)
    if found is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return found.view(dtype).view(shape)


def _placed(nbytes: int) -> torch.Tensor | None:
    global _range, _failed
    if _failed:
        return None
    try:
        if nbytes > RANGE // 4:
            return _Range(nbytes, nbytes // HUGE * HUGE).place(nbytes)
        with _lock:
            found = None if _range is None else _range.place(nbytes)
            if found is None:
                _range = _Range(RANGE, RANGE)
                found = _range.place(nbytes)
            return found
    except (OSError, ValueError) as error:  # a limit on addresses, or a kernel without huge pages
        _failed = True
        logger.info("no memory in huge pages, so packed weights are read more slowly: %s", error)
        return None
