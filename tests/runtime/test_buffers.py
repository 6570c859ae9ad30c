"""Scratch buffers: the bound of all that a thread keeps, and whose modes they are made under."""

import random
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from requanto.runtime import buffers
from requanto.runtime.buffers import held_bytes, scratch_buffer, scratch_like
from requanto.runtime.settings import settings

BOUND = 4096


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    monkeypatch.setattr(settings, "workspace_bytes", BOUND)
    buffers.release()
    yield
    buffers.release()


def buffer(nbytes: int, slot: int | str = 0) -> torch.Tensor:
    return scratch_buffer((nbytes,), torch.uint8, slot)


def test_the_same_memory_for_the_same_slot():
    first = scratch_buffer((4, 16), torch.float32)
    second = scratch_buffer((2, 16), torch.bfloat16)
    assert first.data_ptr() == second.data_ptr()
    assert second.shape == (2, 16)
    assert second.dtype == torch.bfloat16
    assert held_bytes() == 256


def test_slots_together_keep_to_the_bound():
    """The four buffers of one product, each as large as the bound, were all kept."""
    for slot in (0, 1, 2, "units"):
        buffer(BOUND, slot)
        assert held_bytes() == BOUND


def test_the_oldest_request_goes_first():
    for slot in (0, 1, 2):
        buffer(BOUND // 4, slot)
    kept = {slot: buffer(BOUND // 4, slot).data_ptr() for slot in (1, 0, 2)}
    buffer(BOUND // 2, 3)  # slot 1 is the one to go
    assert list(buffers._local.cached) == [0, 2, 3]
    assert buffer(BOUND // 4, 0).data_ptr() == kept[0]
    assert held_bytes() == BOUND


def test_numbers_last_until_the_same_slot_is_asked_for():
    """Other requests may drop the buffer here; its memory is the caller's."""
    mine = buffer(BOUND, 0).fill_(7)
    for slot in (1, 2, 3):
        buffer(BOUND, slot).fill_(slot)
    assert 0 not in buffers._local.cached
    others = [torch.zeros(BOUND, dtype=torch.uint8) for _ in range(20)]
    assert bool((mine == 7).all())
    del others


def test_one_larger_than_the_bound_is_not_kept():
    small = buffer(64, 0).data_ptr()
    large = buffer(BOUND + 1, 0)
    assert large.numel() == BOUND + 1
    assert held_bytes() == 64
    assert buffer(64, 0).data_ptr() == small


def test_a_bound_set_lower_holds_at_the_next_request(monkeypatch):
    for slot in (0, 1):
        buffer(BOUND // 4, slot)
    monkeypatch.setattr(settings, "workspace_bytes", BOUND // 4)
    buffer(8, 1)  # there already
    assert list(buffers._local.cached) == [1]
    monkeypatch.setattr(settings, "workspace_bytes", 0)
    buffer(8, 1)
    assert held_bytes() == 0


def test_a_buffer_that_grows_counts_once():
    for size in (100, 200, 400, BOUND):
        buffer(size)
        assert held_bytes() == size
    assert list(buffers._local.cached) == [0]


def test_any_sequence_of_requests():
    choose = random.Random(3)
    for _ in range(3000):
        size = choose.randrange(0, BOUND + 200)
        got = buffer(size, choose.choice([0, 1, 2, "a", "b"]))
        assert got.numel() == size
        if choose.random() < 0.05:
            buffers.release_scratch()
            assert not {"a", "b"} & buffers._local.cached.keys()
        assert held_bytes() <= BOUND
        assert held_bytes() == buffers._local.nbytes
    buffers.release()
    assert buffers._local.nbytes == held_bytes() == 0


def test_each_thread_has_its_own():
    own = buffer(64)
    seen = []
    thread = threading.Thread(target=lambda: seen.append((held_bytes(), buffer(64).data_ptr(), held_bytes())))
    thread.start()
    thread.join()
    assert seen[0][0] == 0
    assert seen[0][2] == 64
    assert held_bytes() == 64
    assert own.numel() == 64


class _Elsewhere(TorchFunctionMode):
    """A user's mode that has a say in every function."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta"), _Elsewhere, torch.enable_grad])
def test_made_outside_the_caller_s_modes(mode):
    with mode():
        buffer(64)
    made = buffers._local.cached[0]
    assert made.device.type == "cpu"
    assert not made.is_inference()
    assert not made.requires_grad
    buffer(64).fill_(1)  # not under inference mode


def test_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert scratch_like(torch.zeros(4), "units").dtype == torch.float32
        assert buffers._local.cached["units"].dtype == torch.uint8
    finally:
        torch.set_default_dtype(torch.float32)


def test_fake_tensors_are_not_kept():
    with FakeTensorMode():
        fake = buffer(64)
    assert type(fake).__name__ == "FakeTensor"
    assert 0 not in buffers._local.cached


def test_what_torch_func_watches_is_not_kept():
    def work(x: torch.Tensor) -> torch.Tensor:
        return scratch_buffer((16,), torch.float32).copy_(x).sum()

    torch.func.grad(work)(torch.rand(16))
    assert not buffers._local.cached
