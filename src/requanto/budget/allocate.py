"""The multiple-choice knapsack: one option for each item, least total error within a capacity of bytes.

First the Lagrange relaxation: with a price per byte, every item independently takes its best option, and the price at which
the capacity is just met gives a lower bound and a good solution. Then dynamic programming over the items, whose states are
(bytes used, error so far): a state is removed if another one uses no more bytes and has no more error, or if its lower bound
is not below the best known solution. This is exact. If there are more states than a limit, those with the lowest bounds
remain, and the gap to the lower bound is reported. (Kellerer, Pferschy and Pisinger 2004,
Knapsack Problems, chapters 3 and 11.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: Maximum number of states after each item; 2 ** 16 take 1 MB per item.
MOST_STATES = 2**16

#: Relative differences below this are treated as rounding errors.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Option:
    """One option of an item.

    Attributes:
        bytes: its size.
        error: its error in any unit, not negative; errors are summed over items.
    """

    bytes: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """Result of `allocate`.

    Attributes:
        picks: the index of each item's chosen option.
        bytes, error: sums over the chosen options.
        bound: lower bound of the error of any allocation.
        exact: whether this allocation is optimal.
    """

    picks: list[int]
    bytes: int
    error: float
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """Upper bound of the relative excess over the least possible error; 0: optimal."""
        if self.exact or self.error <= self.bound:
            return 0.0
        return self.error / self.bound - 1 if self.bound > 0 else math.inf


def allocate(items: Sequence[Sequence[Option]], capacity: int, most_states: int = MOST_STATES) -> Allocation:
    """Chooses one option per item with the least total error within a capacity of bytes.

    Args:
        items: each item's options, at least one.
        capacity: limit of the total bytes.
        most_states: limit of the search's memory; if it is reached, the result may not be exact (see `Allocation.exact`).

    Raises:
        ValueError: the smallest options exceed the capacity, or an error is negative or not finite.
    """
    for index, options in enumerate(items):
        if not options or not all(math.isfinite(o.error) and o.error >= 0 and o.bytes >= 0 for o in options):
            raise ValueError(f"item {index} needs options with finite errors, and errors and bytes of at least 0")
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
    """Returns the Pareto-optimal options by ascending bytes (and descending error)."""
    front: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].error)):
        if not front or options[index].error < options[front[-1]].error:
            front.append(index)
    return front


class _Search:
    def __init__(self, fronts: list[list[int]], items: list[Sequence[Option]], capacity: int, most_states: int) -> None:
        self.fronts, self.capacity, self.most_states = fronts, capacity, most_states
        self.sizes = [np.array([items[i][o].bytes for o in f], dtype=np.int64) for i, f in enumerate(fronts)]
        self.errors = [np.array([items[i][o].error for o in f]) for i, f in enumerate(fronts)]
        #: lowest bound of the states removed because of ``most_states``; infinite: none was removed
        self.dropped = math.inf
        self.price = self._price()
        #: lower bound of the error of any solution
        self.relaxed = max(0.0, sum(self._reduced(i).min() for i in range(len(fronts))) - self.price * capacity)

    def _reduced(self, item: int) -> np.ndarray:
        return self.errors[item] + self.price * self.sizes[item]

    def _price(self) -> float:
        """Returns the lowest price per byte at which the items' independent choices fit: a slope of the convex hulls."""
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
        # argmin returns the first of equal options, which is the smaller one.
        return int(sum(s[np.argmin(e + price * s)] for s, e in zip(self.sizes, self.errors)))

    def run(self) -> list[int]:
        """Returns the chosen option of each item."""
        count = len(self.fronts)
        reduced = [self._reduced(i) for i in range(count)]
        best_at = [int(np.argmin(r)) for r in reduced]
        # Sums over the items from i on: of the lower bound, and of the independent choices.
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
            states = np.flatnonzero(keep)
            states = states[_undominated(used[states], error[states])]
            if len(states) > self.most_states:
                ranked = states[np.argsort(bound[states], kind="stable")]
                # Always keep the smallest state: it can be completed, so a solution is found in any case.
                rest = np.setdiff1d(ranked[self.most_states :], [states[0]])
                if len(rest):
                    self.dropped = min(self.dropped, float(bound[rest].min()))
                states = np.sort(np.append(np.setdiff1d(ranked[: self.most_states], [states[0]]), states[0]))
            if not len(states):
                break
            used, error = used[states], error[states]
            history.append((parents[states].astype(np.int32), picks[states].astype(np.int16)))
        item, state = end
        chosen = best_at[item:]
        for parents, picks in reversed(history[:item]):
            chosen.insert(0, int(picks[state]))
            state = int(parents[state])
        return [self.fronts[i][pick] for i, pick in enumerate(chosen)]


def _tails(values: Sequence) -> list:
    """Returns the sums of ``values[i:]`` for i = 0 .. len(values); the last one is 0."""
    sums = [values[0] * 0 if len(values) else 0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _hull_slopes(sizes: np.ndarray, errors: np.ndarray) -> list[float]:
    """Returns the decrease of error per byte along the lower convex hull of (bytes, error)."""
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
    """Returns the indices of the Pareto-optimal states (bytes, error), by ascending bytes."""
    order = np.lexsort((error, used))
    least = np.minimum.accumulate(error[order]) if len(order) else error
    better = np.ones(len(order), dtype=bool)
    better[1:] = error[order][1:] < least[:-1]
    return order[better]
