"""The growing buffer: chunks, crop, sliding windows, batches; and that no block is quantized twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requanto.kv import Growing, KVSettings

WINDOW, BLOCK = 5, 8


def stores(kind: str, x: torch.Tensor, window: int = WINDOW) -> list[Growing]:
    made = KVSettings(kind, kind, window, BLOCK)
    return [Growing(x, codec, window, BLOCK) for codec in (made.key_codec(), made.value_codec())]


def tokens(count: int, channels: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, count, channels, generator=torch.Generator().manual_seed(seed)).to(dtype)


def add(store: Growing, x: torch.Tensor) -> torch.Tensor:
    store.append(x)
    found = store.read()
    store.quantize_old()
    return found


@pytest.mark.parametrize("kind", ["int8", "int2"])
@settings(max_examples=15)
@given(data=st.data())
def test_chunks_give_what_one_append_gives(kind, data):
    total = data.draw(st.integers(0, 60))
    window = data.draw(st.sampled_from([0, 1, 5, 8]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = tokens(total, data.draw(st.sampled_from([1, 7, 12])), data.draw(st.integers(0, 99)), dtype)
    for whole, parts in zip(stores(kind, x, window), stores(kind, x, window)):
        add(whole, x)
        done = 0
        while done < total:
            count = data.draw(st.integers(1, total - done))
            found = add(parts, x[:, :, done : done + count])
            done += count
            assert torch.equal(found[:, :, done - count :], x[:, :, done - count : done])  # new tokens as they are
            assert found.shape[2] == parts.length == done
        assert torch.equal(parts.read(), whole.read())
        assert parts.nbytes == whole.nbytes
        floats = total - parts.quantized
        assert floats == total if total < window + BLOCK else window <= floats < window + BLOCK
        assert torch.equal(whole.read()[:, :, total - floats :], x[:, :, total - floats :])


@pytest.mark.parametrize("kind", ["int4"])
def test_nothing_is_quantized_twice(kind):
    """The values of a quantized token never change again, however many tokens follow."""
    x = tokens(100)
    for store in stores(kind, x):
        seen = None
        for token in range(100):
            add(store, x[:, :, token : token + 1])
            now = store.read()[:, :, : store.quantized]
            if seen is not None:
                assert torch.equal(now[:, :, : seen.shape[2]], seen)
            seen = now
        assert seen.shape[2] == 88


@settings(max_examples=15)
@given(data=st.data())
def test_crop_leaves_the_other_tokens_as_they_are(data):
    x = tokens(50, seed=data.draw(st.integers(0, 99)))
    for store in stores("int4", x):
        add(store, x)
        for _ in range(3):
            before, quantized = store.read(), store.quantized
            count = data.draw(st.integers(0, store.length + 2))
            store.crop(count)
            kept = max(0, before.shape[2] - count)
            assert store.length == kept
            assert torch.equal(store.read(), before[:, :, :kept])
            new = tokens(data.draw(st.integers(0, 20)), seed=7)
            found = add(store, new)
            assert torch.equal(found, torch.cat([before[:, :, :kept], new], 2))
            frozen = min(kept, quantized)
            assert torch.equal(store.read()[:, :, :frozen], before[:, :, :frozen])


@settings(max_examples=15)
@given(data=st.data())
def test_dropping_the_front(data):
    x = tokens(60, seed=data.draw(st.integers(0, 99)))
    for store in stores("int4", x):
        reference = stores("int4", x)[0 if store.codec.per == "channel" else 1]
        gone = done = 0
        while done < 60:
            count = data.draw(st.integers(1, 60 - done))
            found, wanted = (add(each, x[:, :, done : done + count]) for each in (store, reference))
            done += count
            assert torch.equal(found, wanted[:, :, gone:])
            drop = data.draw(st.integers(0, store.length))
            store.drop_front(drop)
            gone += drop
            # Float tokens that are dropped can no longer be part of a block.
            if gone > reference.quantized:
                return
            assert store.length == done - gone
            assert torch.equal(store.read(), reference.read()[:, :, gone:])


def test_dropping_frees_memory():
    x = tokens(64)
    for store in stores("int8", x, window=0):
        add(store, x)
        full = store.nbytes
        store.drop_front(40)
        assert store.nbytes == full * 24 // 64
        store.drop_front(24)
        assert (store.length, store.nbytes) == (0, 0)


def test_batches():
    x = tokens(30)
    for store in stores("int4", x):
        add(store, x)
        before = store.read()
        store.select(torch.tensor([1, 1, 0]))
        assert torch.equal(store.read(), before[[1, 1, 0]])
        store.repeat(2)
        assert torch.equal(store.read(), before[[1, 1, 1, 1, 0, 0]])


def test_gradients_reach_float_tokens_and_codes_hold_no_graph():
    x = tokens(30).requires_grad_()
    for store in stores("int8", x):
        found = add(store, x)
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.ones_like(x))
        new = tokens(2, seed=3).requires_grad_()
        found = add(store, new)
        assert torch.equal(torch.autograd.grad(found.sum(), new)[0], torch.ones_like(new))
        assert not store._coded.codes.requires_grad
        assert store._coded.scale.grad_fn is None


def test_float_stores_return_what_they_were_given():
    x = tokens(100)
    store = Growing(x, None, WINDOW, BLOCK)
    for part in x.split(7, 2):
        add(store, part)
    assert torch.equal(store.read(), x)
    assert store.quantized == 0
