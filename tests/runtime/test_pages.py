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

STATUS = Path("/proc/self/status")
needs_linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages to ask for on this system")


def resident() -> int:
    """Bytes of this process that are in memory and of no file."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


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
def test_memory_is_taken_for_what_is_placed_and_returned():
    # Torch's own memory of first calls.
    assert all([int(pages.empty((300_000,), torch.uint8).fill_(1).sum()) for _ in range(9)])
    gc.collect()
    size, count = 300_000, 40
    before = resident()
    made = [pages.empty((size,), torch.uint8).fill_(1) for _ in range(count)]
    taken = resident() - before
    assert size * count - HUGE <= taken <= size * count + 2 * HUGE, "small ones together take at most a page more"
    made = made[: count // 2]
    assert resident() - before <= taken - size * count // 2 + count * 2 * mmap.PAGESIZE + HUGE
    assert all(int(one.sum()) == size for one in made)
    del made
    assert resident() - before <= 2 * HUGE + count * 2 * mmap.PAGESIZE  # pages that two tensors shared stay
    before = resident()
    large = pages.empty((RANGE // 4 + HUGE // 2,), torch.uint8).fill_(
        1
    )  # with addresses of its own, and no page in vain
    assert abs(resident() - before - large.nbytes) <= HUGE
    del large
    assert resident() - before <= HUGE


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
