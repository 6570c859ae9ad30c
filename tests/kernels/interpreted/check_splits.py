"""Splits of K in one launch: the right sum, the same bits in any order of programs, whatever the workspace held."""

import random

import pytest
import torch
from reference import TOLERANCE, error, weight
from triton.runtime import interpreter

from requanto_kernels import Config, _split, wq_gemm

HALF = torch.float16


@pytest.fixture
def shuffled(monkeypatch):
    """Programs run in a new random order at each launch."""
    builder, place = interpreter.interpreter_builder, interpreter.interpreter_builder.set_grid_idx
    order: dict = {}

    def start(*grid):
        cells = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order.update(zip(cells, random.sample(cells, len(cells))))
        builder.__class__.set_grid_dim(builder, *grid)

    monkeypatch.setattr(builder, "set_grid_dim", start, raising=False)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *cell: place(*order[cell]), raising=False)
    return order


@pytest.fixture
def counters(monkeypatch):
    """The counters that launches allocate, filled as the test says before the launch; counters are NaN."""
    found, real = [], torch.empty
    fill = {"words": lambda words: words.random_()}

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        if out.dtype == torch.int64:
            fill["words"](out)
            found.append(out)
        elif out.dtype == torch.float32:
            out.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", empty)
    return found, fill


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "splits"), [(1, 2), (3, 3), (20, 3)])
def test_any_order(m, splits, bias, shuffled, counters):
    w = weight(40, 384, 4, 64, affine=True)
    x, b = torch.randn(m, 384).to(HALF), torch.randn(40) if bias else None
    config = Config(block_m=16, block_n=32, block_k=128, split_k=splits, num_stages=1)
    want = x.double() @ w.meaning.T + (0 if b is None else b.double())
    results = [wq_gemm(x, w.qdata, w.scale, w.shift, b, bits=4, group_size=64, config=config) for _ in range(3)]
    assert error(results[0], want) <= TOLERANCE[HALF]
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(counters[0]) == 3
    tiles = -(-m // 16) * 2
    for work in counters[0]:
        assert not work.any(), "the last program clears its counter"
        assert work.numel() == tiles
    assert len(shuffled) == tiles * splits


@pytest.mark.parametrize("word", [0, -1, _split.MARK.value, _split.MARK.value + 1, 1 << 62])
def test_any_contents(word, counters):
    counters[1]["words"] = lambda words: words.fill_(word)
    w = weight(40, 512, 4, 128)
    x = torch.randn(2, 512).to(HALF)
    config = Config(block_m=16, block_n=32, block_k=128, split_k=4, num_stages=1)
    got = wq_gemm(x, w.qdata, w.scale, bits=4, group_size=128, config=config)
    assert error(got, x.double() @ w.meaning.T) <= TOLERANCE[HALF]
    assert len(counters[0]) == 1
