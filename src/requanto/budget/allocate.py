"""The multiple-choice knapsack: one option for each item, least total error within a capacity of bytes.

First the Lagrange relaxation: with a price a byte, every item takes its best option by itself, and the price at which the
capacity is just met gives a lower bound and a good solution. Then dynamic programming over the items, whose states are
(bytes used, error so far): a state is dropped when another uses no more bytes at no more error, or when even its bound is no
better than the best solution known. What is left is exact; where the states grow past a limit, the most promising are kept
and the gap to the lower bound is reported. (Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapters 3 and 11.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: States kept after each item. 2 ** 16 of them take 1 MB an item.
MOST_STATES = 2**16

#: Relative differences below this are rounding errors of sums.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Option:
    """What an item may be.

    Attributes:
        bytes: what it takes.
        error: what it costs; any unit, not negative, summed over items.
    """

    bytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """The solution.

    Attributes:
        picks: the number of each item's option.
        bytes, error: their sums.
        bound: no allocation has less error than this.
        exact: no allocation has less error than this one.
    """

    picks: list[int]
    bytes: int
    error: float
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """How far above the least possible error this may be at most, relative to it; 0: optimal."""
        if self.exact or self.error <= self.bound:
            return 0.0
        return self.error / self.bound - 1 if self.bound > 0 else math.inf


def allocate(items: Sequence[Sequence[Option]], capacity: int, most_states: int = MOST_STATES) -> Allocation:
    """Chooses one option of each item so that the bytes fit and the error is least.

    Args:
        items: each item's options, at least one.
        capacity: bytes in all.
        most_states: limit of the search's memory; beyond it the result may not be exact, and says so.

    Raises:
        ValueError: the smallest options of all items together do not fit, or an error is negative or not finite.
    """
    for index, options in enumerate(items):
        if not options or not all(math.isfinite(o.error) and o.error >= 0 and o.bytes >= 0 for o in options):
            raise ValueError(f"item {index} needs options of finite errors and bytes that are not negative")
    smallest = sum(min(o.bytes for o in options) for options in items)
    if smallest > capacity:
        raise ValueError(f"the smallest options take {smallest} bytes, more than the capacity of {capacity}")
    fronts = [_front(options) for options in items]
    order = sorted(range(len(items)), key=lambda i: -max((o.error for o in items[i]), default=0.0))
    search = _Search([fronts[i] for i in order], [items[i] for i in order], capacity, most_states)
    picks = [0] * len(items)
    for position, pick in zip(order, search.run()):
        picks[position] = pick
    chosen = [items[i][pick] for i, pick in enumerate(picks)]
    error = sum(o.error for o in chosen)
    exact = search.dropped == math.inf
    bound = error if exact else min(error, max(search.relaxed, min(search.dropped, error)))
    return Allocation(picks, sum(o.bytes for o in chosen), error, bound, exact or bound >= error)


def _front(options: Sequence[Option]) -> list[int]:
    """Options that no other one beats in both, by bytes: errors fall."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].error)):
        if not kept or options[index].error < options[kept[-1]].error:
            kept.append(index)
    return kept


class _Search:
    def __init__(self, fronts: list[list[int]], items: list[Sequence[Option]], capacity: int, most_states: int) -> None:
        self.fronts, self.capacity, self.most_states = fronts, capacity, most_states
        self.sizes = [np.array([items[i][o].bytes for o in f], dtype=np.int64) for i, f in enumerate(fronts)]
        self.errors = [np.array([items[i][o].error for o in f]) for i, f in enumerate(fronts)]
        #: the least bound of a state that was given up for want of room; infinite: none was
        self.dropped = math.inf
        self.price = self._price()
        #: a bound of any solution's error
        self.relaxed = max(0.0, sum(self._reduced(i).min() for i in range(len(fronts))) - self.price * capacity)

    def _reduced(self, item: int) -> np.ndarray:
        return self.errors[item] + self.price * self.sizes[item]

    def _price(self) -> float:
        """The price of a byte at which every item's own choice just fits: one of the slopes of the convex hulls."""
        slopes = sorted({s for sizes, errors in zip(self.sizes, self.errors) for s in _hull_slopes(sizes, errors)})
        low, high = 0, len(slopes)  # the smallest price that fits
        while low < high:
            middle = (low + high) // 2
            if self._taken(slopes[middle]) <= self.capacity:
                high = middle
            else:
                low = middle + 1
        if self._taken(0.0) <= self.capacity or not slopes:
            return 0.0
        return slopes[min(low, len(slopes) - 1)]

    def _taken(self, price: float) -> int:
        # Ties go to the smaller option, which comes first.
        return int(sum(s[np.argmin(e + price * s)] for s, e in zip(self.sizes, self.errors)))

    def run(self) -> list[int]:
        """The option of each item."""
        count = len(self.fronts)
        reduced = [self._reduced(i) for i in range(count)]
        best_at = [int(np.argmin(r)) for r in reduced]
        # From item i on: the bound's part, and what taking each item's own choice gives.
        tail_bound = _tails([r.min() for r in reduced])
        tail_error = _tails([e[b] for e, b in zip(self.errors, best_at)])
        tail_bytes = _tails([s[b] for s, b in zip(self.sizes, best_at)])
        smallest = _tails([s.min() for s in self.sizes])
        incumbent, end = math.inf, (0, 0)
        used, error = np.zeros(1, dtype=np.int64), np.zeros(1)
        history: list[tuple[np.ndarray, np.ndarray]] = []
        for item in range(count + 1):
            fits = used + tail_bytes[item] <= self.capacity
            whole = np.where(fits, error + tail_error[item], math.inf)
            state = int(np.argmin(whole))
            if whole[state] < incumbent:
                incumbent, end = float(whole[state]), (item, state)
            if item == count:
                break
            parents = np.repeat(np.arange(len(used)), len(self.sizes[item]))
            picks = np.tile(np.arange(len(self.sizes[item])), len(used))
            used = used[parents] + self.sizes[item][picks]
            error = error[parents] + self.errors[item][picks]
            bound = error + tail_bound[item + 1] - self.price * (self.capacity - used)
            keep = (used + smallest[item + 1] <= self.capacity) & (bound < incumbent * (1 - ROUNDING))
            if math.isinf(incumbent):
                keep = used + smallest[item + 1] <= self.capacity
            kept = np.flatnonzero(keep)
            kept = kept[_undominated(used[kept], error[kept])]
            if len(kept) > self.most_states:
                ranked = kept[np.argsort(bound[kept], kind="stable")]
                # The smallest state can always be completed, so that a solution is found whatever is given up.
                rest = np.setdiff1d(ranked[self.most_states :], [kept[0]])
                if len(rest):
                    self.dropped = min(self.dropped, float(bound[rest].min()))
                kept = np.sort(np.append(np.setdiff1d(ranked[: self.most_states], [kept[0]]), kept[0]))
            if not len(kept):
                break
            used, error = used[kept], error[kept]
            history.append((parents[kept].astype(np.int32), picks[kept].astype(np.int16)))
        item, state = end
        chosen = best_at[item:]
        for parents, picks in reversed(history[:item]):
            chosen.insert(0, int(picks[state]))
            state = int(parents[state])
        return [self.fronts[i][pick] for i, pick in enumerate(chosen)]


def _tails(values: Sequence) -> list:
    """Sums from each place to the end; one more 0."""
    sums = [values[0] * 0 if len(values) else 0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _hull_slopes(sizes: np.ndarray, errors: np.ndarray) -> list[float]:
    """Error saved a byte along the lower convex hull of (bytes, error)."""
    hull: list[int] = []
    for index in range(len(sizes)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (errors[a] - errors[b]) * (sizes[index] - sizes[a]) <= (errors[a] - errors[index]) * (
                sizes[b] - sizes[a]
            ):
                hull.pop()
            else:
                break
        hull.append(index)
    return [float((errors[a] - errors[b]) / (sizes[b] - sizes[a])) for a, b in pairwise(hull)]


def _undominated(used: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Indices, by bytes, of states that no state of no more bytes has at most the error of."""
    order = np.lexsort((error, used))
    least = np.minimum.accumulate(error[order]) if len(order) else error
    better = np.ones(len(order), dtype=bool)
    better[1:] = error[order][1:] < least[:-1]
    return order[better]
