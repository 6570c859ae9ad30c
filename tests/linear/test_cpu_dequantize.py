"""Dequantization by the CPU kernels: bit for bit what the generic operators compute, at every level."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest
import torch
from cpu_levels import PROPERTY
from cpu_weights import DTYPES, KINDS, Weight, combinations, weight

from requanto_cpu import level, levels, library, set_level

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 7.0


@pytest.fixture(params=levels())
def at_level(request, record_property):
    before = level()
    set_level(request.param)
    record_property(PROPERTY, request.param)
    yield request.param
    set_level(before)


def dequantize(w: Weight, plain: bool, rows: tuple[int, int] | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows from the first number to the second, or those of an index; what is around the result must stay as it was."""
    index = rows if isinstance(rows, torch.Tensor) else None
    start, stop = (0, len(rows)) if index is not None else rows
    length = w.plain.length
    out = torch.full((stop - start + 1, length + 3), GUARD, dtype=dtype)
    address = index.data_ptr() if index is not None else None
    arguments = (start, stop, address, out.data_ptr(), DTYPES[dtype], out.stride(0))
    if plain:
        code = library().rq_dequantize_plain(ctypes.byref(w.plain), w.is_signed, *arguments)
    else:
        code = library().rq_dequantize(ctypes.byref(w.strips), *arguments)
    assert code == 0, library().rq_error(code)
    assert bool((out[:, length:] == GUARD).all()), "wrote beside the result"
    assert bool((out[-1] == GUARD).all()), "wrote below the result"
    return out[:-1, :length]


def check(w: Weight, plain: bool, rows, dtype: torch.dtype) -> None:
    expected = (w.values[rows] if isinstance(rows, torch.Tensor) else w.values[rows[0] : rows[1]]).to(dtype)
    found = dequantize(w, plain, rows, dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    same = found.contiguous().view(bits) == expected.contiguous().view(bits)
    assert bool((same | expected.isnan()).all()), (found, expected)


def cases(seed: int, count: int, groups: tuple[int, ...]):
    chosen = random.Random(seed)
    every = list(combinations())
    chosen.shuffle(every)
    for kind, scale, shift in itertools.islice(itertools.cycle(every), count):
        length = chosen.choice([8, 16, 24, 40, 64, 96, 100, 120, 530, 1056])
        group = chosen.choice([None, *(g for g in groups if length % g == 0)])
        rows = chosen.choice([1, 15, 16, 17, 33, 70])
        w = weight(
            kind, rows, length, group, scale, shift, chosen.choice(FLOATS), chosen.choice([4, 5, 6, 8]),
            chosen.random() < 0.5, nan=True,
        )  # fmt: skip
        start = chosen.randrange(rows)
        index = torch.tensor([chosen.randrange(rows) for _ in range(5)])
        yield w, [(start, chosen.randint(start, rows)), (0, rows), index], chosen.choice(FLOATS)


def test_strips(at_level):
    torch.manual_seed(0)
    for w, parts, dtype in cases(1, 250, (8, 16, 24, 32, 40, 64)):
        for rows in parts:
            check(w, False, rows, dtype)


def test_plain_rows(at_level):
    """Any group size, rows that begin anywhere."""
    torch.manual_seed(0)
    for w, parts, dtype in cases(2, 250, (1, 2, 5, 8, 10, 12, 20, 24, 32, 53)):
        for rows in parts:
            check(w, True, rows, dtype)


def test_tables_of_256_values(at_level):
    torch.manual_seed(0)
    for group, dtype in itertools.product((None, 10, 16), FLOATS):
        w = weight("table256", 5, 80, group)
        check(w, True, (0, 5), dtype)
        check(w, True, torch.tensor([4, 0, 0]), dtype)


def test_large_and_small_numbers(at_level):
    """Infinities, subnormal results and ties round as torch's conversions do."""
    torch.manual_seed(0)
    for kind, _ in KINDS:
        w = weight(kind, 40, 64, 8, dtype=torch.float32)
        scale = next(part for part in w.kept if part.dtype == torch.float32 and part.shape == (8, 40))
        scale.fill_(1.0)
        numbers = dequantize(w, True, (0, 40), torch.float32).clone()
        scale.copy_(torch.linspace(-148, 127, 320).exp2().view(8, 40))
        w.values = numbers * scale.t().repeat_interleave(8, 1)
        for plain, dtype in itertools.product((False, True), FLOATS):
            check(w, plain, (0, 40), dtype)


def test_threads_change_nothing(at_level):
    torch.manual_seed(0)
    w = weight("int4", 900, 512, 32, "plain", "plain")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for plain, dtype in itertools.product((False, True), FLOATS):
                check(w, plain, (3, 890), dtype)
    finally:
        torch.set_num_threads(threads)
