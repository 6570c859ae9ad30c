"""Scratch buffers: the bound of all that a thread keeps, and whose modes they are made under."""

import random
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from requanto.runtime import buffers
from requanto.runtime.buffers import cached_object, held_bytes, scratch_buffer, scratch_like
from requanto.runtime.settings import settings

BOUND = 4096


@pytest.fixture(autouse=True)
def bounded(monkeypatch):
    monkeypatch.setattr(settings, "workspace_bytes", BOUND)
    buffers.release()
    yield
    buffers.release()


class Held:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


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
    cached_object(("object",), BOUND, lambda: Held(BOUND))
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
    assert cached_object(("object",), BOUND + 1, lambda: Held(BOUND + 1)).nbytes == BOUND + 1
    assert held_bytes() == 64


def test_a_bound_set_lower_holds_at_the_next_request(monkeypatch):
    for slot in (0, 1):
        buffer(BOUND // 4, slot)
    cached_object(("object",), BOUND // 4, lambda: Held(BOUND // 4))
    monkeypatch.setattr(settings, "workspace_bytes", BOUND // 4)
    buffer(8, 1)  # there already
    assert list(buffers._local.cached) == [1]
    cached_object(("object",), BOUND // 4, lambda: Held(BOUND // 4))
    monkeypatch.setattr(settings, "workspace_bytes", 100)
    cached_object(("object",), BOUND // 4, lambda: Held(BOUND // 4))
    assert held_bytes() == 0
    monkeypatch.setattr(settings, "workspace_bytes", 0)
    buffer(8, 1)
    assert held_bytes() == 0


def test_a_buffer_that_grows_counts_once():
    for size in (100, 200, 400, BOUND):
        buffer(size)
        assert held_bytes() == size
    assert list(buffers._local.cached) == [0]


def test_objects_and_buffers_share_the_bound():
    first = cached_object(("a",), BOUND // 2, lambda: Held(BOUND // 2))
    assert cached_object(("a",), BOUND // 2, lambda: pytest.fail("it is kept")) is first
    buffer(BOUND // 2)
    assert held_bytes() == BOUND
    cached_object(("b",), 16, lambda: Held(16))  # objects take half at most
    assert list(buffers._local.cached) == [0, ("b",)]
    cached_object(("c",), BOUND, lambda: Held(BOUND))
    assert list(buffers._local.cached) == [("c",)]


def test_objects_leave_half_to_buffers():
    cached_object(("a",), BOUND // 2, lambda: Held(BOUND // 2))
    cached_object(("b",), 16, lambda: Held(16))
    assert list(buffers._local.cached) == [("b",)]


def test_room_is_made_before_an_object_is():
    """Both at once would be more than the bound."""
    seen = []
    buffer(BOUND)
    cached_object(("a",), BOUND // 2, lambda: (seen.append(held_bytes()), Held(BOUND // 2))[1])
    assert seen == [0]


def test_what_an_object_really_takes_is_counted():
    cached_object(("a",), 10, lambda: Held(BOUND - 10))
    buffer(10)
    cached_object(("b",), 10, lambda: Held(3 * BOUND))
    assert held_bytes() <= BOUND
    cached_object(("c",), 10, lambda: (buffer(BOUND, 5), Held(BOUND))[1])  # a buffer is asked for meanwhile
    assert list(buffers._local.cached) == [("c",)]


def test_any_sequence_of_requests():
    choose = random.Random(3)
    for _ in range(3000):
        size = choose.randrange(0, BOUND + 200)
        if choose.random() < 0.5:
            got = buffer(size, choose.choice([0, 1, 2, "a", "b"]))
            assert got.numel() == size
        else:
            cached_object((choose.randrange(4),), size, lambda size=size: Held(size))
        if choose.random() < 0.05:
            buffers.release_scratch()
            assert not {"a", "b"} & buffers._local.cached.keys()
        assert held_bytes() <= BOUND
        assert held_bytes() == buffers._local.nbytes == sum(buffers._local.sizes.values())
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
        made = cached_object(("tensor",), 64, lambda: torch.zeros(16, dtype=torch.float32, device="cpu"))
    for tensor in (made, buffers._local.cached[0]):
        assert tensor.device.type == "cpu"
        assert not tensor.is_inference()
        assert not tensor.requires_grad
    buffer(64).fill_(1)  # not under inference mode
    made.add_(1)


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
        made = cached_object(("tensor",), 64, lambda: torch.ones(16, dtype=torch.float32, device="cpu"))
    assert type(fake).__name__ == "FakeTensor"
    assert 0 not in buffers._local.cached
    assert type(made) is torch.Tensor
    assert float(made.sum()) == 16


def test_what_torch_func_watches_is_not_kept():
    def work(x: torch.Tensor) -> torch.Tensor:
        made = cached_object(("tensor",), 64, lambda: torch.ones(16, dtype=torch.float32, device="cpu"))
        return (scratch_buffer((16,), torch.float32).copy_(x) * made).sum()

    torch.func.grad(work)(torch.rand(16))
    assert 0 not in buffers._local.cached
    assert not torch._C._functorch.is_gradtrackingtensor(buffers._local.cached["tensor",])
