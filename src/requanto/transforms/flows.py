"""What feeds a layer, found by running a block: the norm whose output it reads, or the rows of the layer before.

Which layers read one tensor is seen by the tensor's memory. Which row of an earlier layer each input channel comes from is
measured: rows are multiplied by factors that all differ, and the factor by which an input channel changes names its row. It
works for values that attention has mixed over tokens, for value heads that several query heads share, for a layer that
computes queries, keys and values together, and for gated MLPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from requanto.methods.moments import InputHooks
from requanto.transforms.twin import difference
from requanto.transforms.weights import FloatWeight

#: Relative change up to which a trial in float64 counts as exact; norms compute in float32.
TOLERANCE = 1e-5

Run = Callable[[], list[torch.Tensor]]


class Flow:
    """One run of a block.

    Attributes:
        groups: layers by the tensor that they read, in the order in which they run.
        readers: a norm -> the group that reads its output, or [].
        output: what the block returned.
    """

    def __init__(self, run: Run, weights: Iterable[FloatWeight], norms: Iterable[nn.Module]) -> None:
        by_module: dict[nn.Module, list[FloatWeight]] = {}
        for weight in weights:
            by_module.setdefault(weight.module, []).append(weight)
        self.groups: list[list[FloatWeight]] = []
        at: dict[tuple, int] = {}
        outputs: dict[nn.Module, torch.Tensor] = {}
        inputs: list[torch.Tensor] = []
        alive: list[torch.Tensor] = []  # so that no memory is used twice

        def key(tensor: torch.Tensor) -> tuple:
            alive.append(tensor)
            return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()

        def take(module: nn.Module, given: torch.Tensor) -> None:
            number = at.setdefault(key(given), len(self.groups))
            if number == len(self.groups):
                self.groups.append([])
                inputs.append(given)
            reading = [w for w in by_module[module] if w.columns == given.shape[-1] and w not in self.groups[number]]
            # The last weight of fused experts reads what the others compute.
            self.groups[number] += reading[:1] if by_module[module][0].kind == "experts" else reading

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                outputs[module] = output

        hooks = [module.register_forward_hook(note) for module in norms]
        try:
            with AnyInput(by_module, take):
                self.output = run()
        finally:
            for hook in hooks:
                hook.remove()
        self.readers = {m: self.groups[at[k]] if (k := key(o)) in at else [] for m, o in outputs.items()}
        # A model may multiply the output of its last norm by a number before the head (T5).
        free = {
            n for n, group in enumerate(self.groups) if group and not any(g is group for g in self.readers.values())
        }
        for norm, output in outputs.items():
            near = (n for n in free if not self.readers[norm] and _proportional(inputs[n], output))
            self.readers[norm] = self.readers[norm] or next((self.groups[n] for n in near), [])
        self.groups = [group for group in self.groups if group]


def _proportional(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.numel() != two.numel() or one.shape[-1] != two.shape[-1]:
        return False
    a, b = one.flatten().double(), two.flatten().double()
    return bool(((a * a.dot(b) - b * a.dot(a)).norm() <= TOLERANCE * b.norm() * a.dot(a)) & (a.norm() > 0))


class AnyInput(InputHooks):
    """`InputHooks` for modules whose input may have any name."""

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        floats = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point())
        super()._hook(module, tuple(floats)[:1], {})


def find_source(
    run: Run, flow: Flow, number: int, heads: Iterable[int]
) -> tuple[FloatWeight, torch.Tensor, torch.Tensor] | None:
    """Finds the earlier layer on whose rows the input channels of a group of layers depend, one by one and linearly.

    Args:
        number: of the group in the flow.
        heads: sizes that attention's heads may have.

    Returns:
        The layer, the rows that count, and for each input channel its position among them; None if there is none.
    """
    group = flow.groups[number]
    before = _input_of(run, group[0])
    for earlier in reversed(flow.groups[:number]):
        for producer in reversed(earlier):
            if before is None or producer.shared or producer.kind not in ("linear", "conv1d") or producer in group:
                continue
            for rows in row_candidates(producer, group[0].columns, heads):
                source = row_map(run, producer, rows, group[0], before)
                if source is not None:
                    return producer, rows, source
    return None


def row_map(
    run: Run, producer: FloatWeight, rows: torch.Tensor, consumer: FloatWeight, before: torch.Tensor
) -> torch.Tensor | None:
    """Measures which row of a layer each input channel of a later one comes from.

    Args:
        producer: the earlier layer.
        rows: candidates among its rows; the others stay as they are.
        consumer: the later layer, with K input channels.
        before: its input ``[tokens, K]``.

    Returns:
        Positions in ``rows``, ``[K]``; None if a channel does not change by the factor of one row.
    """
    count = len(rows)
    steps = torch.randperm(count, generator=torch.Generator().manual_seed(count), device="cpu").double()
    logs = (2 * (steps + 0.5) / count - 1).to(producer.matrix.device)  # factors between 1/2 and 2
    with scaled_rows(producer, rows, torch.exp2(logs)):
        after = _input_of(run, consumer)
    if after is None or before.shape != after.shape:
        return None
    energy = before.square().sum(0)
    ratio = (before * after).sum(0) / energy
    silent = energy == 0
    steady = (after - ratio * before).square().sum(0) <= (TOLERANCE**2 * energy)
    if not bool((steady | silent).all()) or bool((ratio <= 0).any()) or bool(silent.all()):
        return None
    order = logs.argsort()
    nearest = torch.searchsorted(logs[order], ratio.log2().nan_to_num()).clamp(0, count - 1)
    lower = (nearest - 1).clamp(min=0)
    distance = (logs[order][torch.stack([nearest, lower])] - ratio.log2()).abs()
    found = order[torch.where(distance[0] <= distance[1], nearest, lower)]
    if bool((distance.amin(0) > 0.5 / count)[~silent].any()):
        return None
    if silent.any():  # channels that are 0 in all tokens, as after a ReLU: only where the others leave no doubt
        plain = torch.arange(len(found), device=found.device)
        if count != len(found) or bool((found != plain)[~silent].any()):
            return None
        found = plain
    # Every row is read by as many channels as every other one (query heads that share values).
    return found if bool((found.bincount(minlength=count) * count == len(found)).all()) else None


class scaled_rows:
    """Context: rows of a layer, and their bias, multiplied by factors."""

    def __init__(self, weight: FloatWeight, rows: torch.Tensor, factors: torch.Tensor) -> None:
        self.weight = weight
        self.factors = torch.ones(weight.rows, dtype=torch.float64, device=weight.matrix.device)
        self.factors[rows] = factors.double()

    def __enter__(self) -> None:
        self.saved = saved(self.weight.parameter, self.weight.bias)
        self.weight.scale_rows(self.factors)

    def __exit__(self, *exception: Any) -> None:
        restore(self.saved)


def saved(*parameters: nn.Parameter | None) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Copies of parameters' values, for `restore`."""
    return [(p, p.data.clone()) for p in parameters if p is not None]


def restore(values: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    """Gives parameters back the values that `saved` copied."""
    for parameter, old in values:
        parameter.data.copy_(old)


def unchanged(run: Run, before: list[torch.Tensor]) -> bool:
    """Whether the block's output is the one of before."""
    return difference(before, run()) <= TOLERANCE


def _input_of(run: Run, weight: FloatWeight) -> torch.Tensor | None:
    found: list[torch.Tensor] = []
    with AnyInput([weight.module], lambda module, given: found.append(given.detach().clone()), stop=True):
        run()
    return found[0].reshape(-1, found[0].shape[-1]) if found else None


def row_candidates(producer: FloatWeight, columns: int, heads: Iterable[int] = ()) -> list[torch.Tensor]:
    """Sets of rows that may be what a later layer with this many input channels reads, most likely first.

    All rows; the last or the first half (gate and up together); the last third (query, key, value together), also head by
    head; the values of a layer that computes all queries and fewer keys and values.
    """
    n = producer.rows
    index = torch.arange(n, device=producer.matrix.device)
    found = []
    if columns % n == 0:
        found.append(index)
    if n % 2 == 0 and columns == n // 2:
        found += [index[n // 2 :], index[: n // 2]]
    if n % 3 == 0 and columns % (n // 3) == 0:
        found.append(index[2 * n // 3 :])
        found += [index.view(-1, 3, head)[:, 2].reshape(-1) for head in heads if n % (3 * head) == 0]
    values = (n - columns) // 2
    if 0 < values < columns and (n - columns) % 2 == 0 and columns % values == 0:
        found.append(index[n - values :])
    return found
