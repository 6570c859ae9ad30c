"""The knapsack against brute force, its bounds, its refusals."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requanto.budget.allocate import Option, allocate

options = st.lists(
    st.builds(Option, st.integers(0, 12), st.floats(0, 10, allow_nan=False, width=16)), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(st.lists(options, min_size=1, max_size=6), st.integers(0, 40))
def test_it_finds_what_trying_everything_finds(items, capacity):
    best = min(
        (sum(o.error for o in pick) for pick in itertools.product(*items) if sum(o.bytes for o in pick) <= capacity),
        default=None,
    )
    if best is None:
        with pytest.raises(ValueError, match="more than the capacity"):
            allocate(items, capacity)
        return
    found = allocate(items, capacity)
    chosen = [item[pick] for item, pick in zip(items, found.picks)]
    assert found.bytes == sum(o.bytes for o in chosen) <= capacity
    assert found.error == pytest.approx(sum(o.error for o in chosen))
    assert found.error == pytest.approx(best, abs=1e-9)
    assert found.exact
    assert found.gap == 0


def many(count=300, seed=0):
    chance = random.Random(seed)
    return [
        [
            Option(size * chance.choice((3, 7, 11)), 4.0**-bits * chance.lognormvariate(0, 2))
            for bits, size in enumerate((2, 3, 4, 5, 8))
        ]
        for _ in range(count)
    ]


def test_hundreds_of_layers_are_solved_exactly():
    items = many()
    capacity = sum(o.bytes for o in (item[2] for item in items))
    found = allocate(items, capacity)
    assert found.bytes <= capacity
    assert found.exact
    # Every exchange of two layers' choices that fits is no better.
    for i, j in itertools.combinations(range(0, 300, 17), 2):
        now = items[i][found.picks[i]], items[j][found.picks[j]]
        for one, other in itertools.product(items[i], items[j]):
            if found.bytes - now[0].bytes - now[1].bytes + one.bytes + other.bytes <= capacity:
                assert one.error + other.error >= (now[0].error + now[1].error) * (1 - 1e-9)


def test_with_little_memory_the_gap_is_proven():
    items = many(120, seed=1)
    capacity = sum(o.bytes for o in (item[2] for item in items))
    exact, rough = allocate(items, capacity), allocate(items, capacity, most_states=2)
    assert exact.exact
    assert rough.bytes <= capacity
    assert rough.bound <= exact.error * (1 + 1e-9) <= rough.error * (1 + 1e-9)
    assert rough.gap >= rough.error / exact.error - 1 - 1e-9
    assert rough.gap < 0.05


def test_everything_fits_or_nothing_does():
    items = [[Option(4, 1.0), Option(8, 0.0)]] * 3
    assert allocate(items, 100).error == 0
    assert allocate(items, 12).picks == [0, 0, 0]
    with pytest.raises(ValueError, match="take 12 bytes, more than the capacity of 11"):
        allocate(items, 11)
    with pytest.raises(ValueError, match="item 0 needs options"):
        allocate([[Option(1, -1.0)]], 10)
    with pytest.raises(ValueError, match="item 0 needs options"):
        allocate([[]], 10)
