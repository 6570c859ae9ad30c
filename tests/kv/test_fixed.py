"""The buffer of fixed size: the same values as the growing one, in buffers that stay, compiled once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requanto.kv import Fixed, Growing, KVSettings

BLOCK = 8


class Steps:
    """A Fixed with its counters, as a layer keeps them."""

    def __init__(self, x: torch.Tensor, codec, window: int, capacity: int, sliding: bool = False) -> None:
        self.store = Fixed(x, codec, window, BLOCK, capacity, sliding)
        self.length, self.quantized = torch.tensor(0), torch.tensor(0)
        self.capacity, self.sliding = capacity, sliding

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens that can be seen from the new ones."""
        count, length = x.shape[2], int(self.length)
        size, offset = self.capacity, 0
        if self.sliding:
            size = self.capacity - 1 + count if length >= self.capacity else max(self.capacity, length + count)
            offset = (self.length - self.capacity + 1).clamp(min=0)
        found = self.store.update(x, self.length, self.quantized, offset, size)
        assert found.isfinite().all()
        self.quantized = self.store.quantized_after(self.length + count, self.quantized)
        self.length = self.length + count
        return found[:, :, : int(self.length) - int(offset)]


def tokens(count: int, channels: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, count, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("per", ["keys", "values"])
@pytest.mark.parametrize("kind", ["int4", None])
@settings(max_examples=15)
@given(data=st.data())
def test_it_gives_what_the_growing_buffer_gives(per, kind, data):
    total, window = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([0, 3, 8]))
    sliding = data.draw(st.booleans())
    capacity = data.draw(st.integers(window + BLOCK, 40) if sliding else st.integers(total, total + 30))
    made = KVSettings(kind, kind, window, BLOCK)
    codec = made.key_codec() if per == "keys" else made.value_codec()
    x = tokens(total, 7, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    fixed = Steps(x, codec, window, capacity, sliding)
    # Buffers that are too small for one block stay float.
    growing = Growing(x, fixed.store.codec, window, BLOCK)
    done = 0
    while done < total:
        count = data.draw(st.one_of(st.just(1), st.integers(1, total - done)))
        part = x[:, :, done : done + count]
        done += count
        growing.append(part)
        found, wanted = fixed.add(part), growing.read()
        growing.quantize_old()
        assert int(fixed.quantized) == growing.quantized
        if sliding:
            wanted = wanted[:, :, -(capacity - 1 + count) :]
            found = found[:, :, -wanted.shape[2] :]
        assert torch.equal(found, wanted)


def test_buffers_stay_where_they_are_and_rows_move():
    made = KVSettings("int4", "int4", 3, BLOCK)
    x = tokens(40)
    steps = Steps(x, made.key_codec(), 3, 50)
    where = [buffer.data_ptr() for buffer in steps.store.buffers]
    steps.add(x)
    before = steps.store.read(steps.length, steps.quantized, 0, 50).clone()
    steps.store.select(torch.tensor([1, 0]))
    assert torch.equal(steps.store.read(steps.length, steps.quantized, 0, 50), before[[1, 0]])
    assert [buffer.data_ptr() for buffer in steps.store.buffers] == where
    steps.store.zero()
    assert not any(buffer.any() for buffer in steps.store.buffers)


@pytest.mark.parametrize(("kind", "sliding"), [("int8", False), ("int4", True)])
def test_a_step_is_compiled_once(kind, sliding):
    from torch._dynamo.testing import CompileCounter

    made = KVSettings(kind, kind, 3, BLOCK)
    x, size = tokens(40), 20 if sliding else 40
    compiled_stores, plain = (
        [Fixed(x, codec, 3, BLOCK, size, sliding) for codec in (made.key_codec(), made.value_codec())] for _ in range(2)
    )

    def step(stores, new, length, quantized):
        offset = (length - size + 1).clamp(min=0) if sliding else 0
        return [store.update(new, length, quantized, offset, size) for store in stores]

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=False)
    length, quantized = torch.tensor(0), torch.tensor(0)
    for token in range(40):
        new = x[:, :, token : token + 1].clone()
        found = compiled(compiled_stores, new, length.clone(), quantized.clone())
        wanted = step(plain, new, length, quantized)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
        quantized = plain[0].quantized_after(length + 1, quantized)
        length = length + 1
    assert int(quantized) == 32
    assert counter.frame_count == 1
