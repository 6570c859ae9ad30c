"""Memory in huge pages: what tensors in it share, what it takes, and that it is returned."""

from __future__ import annotations

import gc
import mmap
import os
import signal
from pathlib import Path

import pytest
import torch

from requanto.runtime import pages
from requanto.runtime.pages import HUGE, RANGE

PAGEMAP = Path("/proc/self/pagemap")
EVERYWHERE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages to ask for on this system")


def taken(begin: int, end: int) -> int:
    """Bytes of the pages at these addresses that the process holds, in memory or swapped out.

    Not the memory of the whole process: other tests, threads and allocators of the worker change that at any time.
    """
    first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    with PAGEMAP.open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = torch.frombuffer(bytearray(file.read(8 * (last - first))), dtype=torch.int64)
    assert len(entries) == last - first
    return mmap.PAGESIZE * int((entries >> 62 & 3 != 0).sum())  # the two highest bits: in memory, in swap


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(pages, "_range", None)
    monkeypatch.setattr(pages, "_failed", False)


def test_tensors_are_ordinary():
    made = [
        pages.empty((n, 3), dtype)
        for n in (0, 1, 7, 5000, 70000)
        for dtype in (torch.uint8, torch.bfloat16, torch.float32)
    ]
    for number, tensor in enumerate(made):
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
        assert tensor.is_contiguous()
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(made))  # none overlaps another
    assert made[-1].untyped_storage().nbytes() == made[-1].nbytes
    assert torch.equal(made[-1].clone(), made[-1])


@needs_linux
@pytest.mark.skipif(not PAGEMAP.exists(), reason="no /proc/self/pagemap on this system")
def test_memory_is_taken_for_what_is_placed_and_returned():
    size, count = 300_000, 40
    made = [pages.empty((size,), torch.uint8) for _ in range(count)]
    begin = made[0].data_ptr()
    where = begin, begin + size * count + 2 * HUGE
    assert begin % HUGE == 0
    assert made[-1].data_ptr() + size <= begin + (size + 64) * count, "one after the other"
    assert taken(*where) == 0, "addresses that nobody wrote to take no memory"
    for tensor in made:
        tensor.fill_(1)
    del tensor
    before = taken(*where)
    assert size * count <= before <= size * count + HUGE, "all together take at most a page more"
    made = made[: count // 2]
    # Of each tensor that is gone, the pages at both ends may hold bytes of others, too.
    assert taken(*where) <= before - size * count // 2 + count * mmap.PAGESIZE
    assert all(int(one.sum()) == size for one in made)
    del made
    assert taken(*where) <= 2 * count * mmap.PAGESIZE + HUGE


@needs_linux
@pytest.mark.skipif(not PAGEMAP.exists(), reason="no /proc/self/pagemap on this system")
def test_a_large_tensor_has_addresses_of_its_own():
    small = pages.empty((5000,), torch.uint8)
    large = pages.empty((RANGE // 4 + HUGE // 2,), torch.uint8).fill_(1)
    begin = large.data_ptr()
    where = begin, begin + large.nbytes + HUGE // 2
    spare = HUGE if EVERYWHERE.exists() and "[always]" in EVERYWHERE.read_text() else mmap.PAGESIZE
    assert large.nbytes <= taken(*where) <= large.nbytes + spare, "no page in vain"
    assert pages.empty((5000,), torch.uint8).data_ptr() - small.data_ptr() < HUGE, "small ones go on where they were"
    del large
    assert taken(*where) <= HUGE  # what another thread allocates may lie there


@needs_linux
def test_a_view_keeps_the_memory():
    tensor = pages.empty((100_000,), torch.uint8).fill_(3)
    view = tensor[50_000:]
    del tensor
    gc.collect()
    others = [pages.empty((100_000,), torch.uint8).fill_(4) for _ in range(3)]
    assert (view == 3).all()
    assert others


@needs_linux
def test_a_full_range_is_followed_by_another(monkeypatch):
    monkeypatch.setattr(pages, "RANGE", 4 * HUGE)
    made = [pages.empty((HUGE // 2 + 100,), torch.uint8).fill_(i) for i in range(20)]
    assert all((one == i).all() for i, one in enumerate(made))


def test_without_addresses_torch_allocates(monkeypatch, caplog):
    def refuse(*_args, **_how):
        raise OSError("cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    with caplog.at_level("INFO", "requanto"):
        for _ in range(2):
            assert pages.empty((5000,), torch.uint8).shape == (5000,)
    assert len(caplog.records) == (1 if hasattr(mmap, "MADV_HUGEPAGE") else 0)


@needs_linux
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_has_its_own():
    tensor = pages.empty((100_000,), torch.uint8).fill_(1)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        tensor.fill_(2)
        del tensor
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tensor == 1).all()
