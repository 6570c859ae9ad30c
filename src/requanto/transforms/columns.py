"""Folded column scales: weights whose columns are even, with the inverse in the norm or the rows of the layer before.

A group of weights along a row is rounded with one step, so columns of very different size cost accuracy (SINQ, Müller et al.
2025, arXiv:2509.22944). Dividing each column by its scale and multiplying the input by it makes them even. Here the input is
multiplied for free: the scale goes into the weight (and bias) of the norm that produces it, or into the rows of a layer
whose output it depends on linearly (an MLP's up projection, attention's values). Layers that read one tensor get one scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from requanto.transforms.flows import Flow, Run, find_source, restore, row_candidates, saved, unchanged
from requanto.transforms.heads import head_sizes
from requanto.transforms.twin import Twin
from requanto.transforms.weights import FloatWeight, float_weights, norm_vector

logger = logging.getLogger(__name__)

#: ``[N, K]`` -> positive scale of each column ``[K]``
Scale = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class NormFold:
    """A column scale of layers that read a norm's output.

    Attributes:
        offset: 1 for norms that multiply by ``1 + weight``.
    """

    twin: Twin
    norm: nn.Module
    offset: float
    consumers: list[FloatWeight]

    def scale(self, of: Scale, counted: list[FloatWeight]) -> torch.Tensor:
        """The common scale of the columns ``[K]`` of the layers ``counted``."""
        return _common(of, [w.matrix.reshape(-1, w.columns) for w in counted])

    def apply(self, scale: torch.Tensor) -> None:
        """Multiplies the norm by ``scale`` and divides the layers' columns by what that is after rounding."""
        weight, bias = norm_vector(self.norm), self.norm._parameters.get("bias")
        assert weight is not None
        old = weight.data.double() + self.offset
        weight.data.copy_(self.twin.stored(weight, (old * scale - self.offset).to(weight.dtype)))
        real = (weight.data.double() + self.offset) / old
        # A scale that the norm's dtype rounds to 0, and a weight that is 0: no scale.
        real = torch.where((old == 0) | (real <= 0) | ~torch.isfinite(real), torch.ones_like(real), real)
        weight.data.copy_(torch.where(real == 1, old - self.offset, weight.data.double()))
        if bias is not None:
            bias.data.mul_(real)
        for consumer in self.consumers:
            consumer.scale_columns(1 / real)

    def touched(self) -> list[nn.Parameter | None]:
        """All parameters that :meth:`apply` changes."""
        return [*self.norm._parameters.values(), *(w.parameter for w in self.consumers)]


@dataclass
class RowFold:
    """A column scale of layers that read what depends linearly on rows of an earlier layer.

    Attributes:
        rows: candidates among the producer's rows.
        source: position in ``rows`` of each input channel, ``[K]``.
    """

    producer: FloatWeight
    rows: torch.Tensor
    source: torch.Tensor
    consumers: list[FloatWeight]

    def scale(self, of: Scale, counted: list[FloatWeight]) -> torch.Tensor:
        """The common scale of the columns that come from one row, for each row: ``[rows]``, or ``[E, rows]`` of experts."""
        order = self.source.argsort(stable=True)
        matrices = [w.matrix[..., order].unflatten(-1, (len(self.rows), -1)).movedim(-1, -3) for w in counted]
        if matrices[0].dim() == 4:  # fused experts, each with its own scale
            return torch.stack([of(even_rows(expert.flatten(0, 1))) for expert in matrices[0]])
        return _common(of, [m.flatten(0, 1) for m in matrices])

    def apply(self, scale: torch.Tensor) -> None:
        """Multiplies the rows by ``scale`` and divides the columns that come from them."""
        shape = (*self.producer.matrix.shape[:-2], self.producer.rows)
        factors = torch.ones(shape, dtype=torch.float64, device=scale.device)
        factors[..., self.rows] = scale.double()
        self.producer.scale_rows(factors)
        for consumer in self.consumers:
            consumer.scale_columns(1 / scale[..., self.source])

    def touched(self) -> list[nn.Parameter | None]:
        """All parameters that :meth:`apply` changes."""
        return [self.producer.parameter, self.producer.bias, *(w.parameter for w in self.consumers)]


def _common(of: Scale, matrices: list[torch.Tensor]) -> torch.Tensor:
    """One scale for the columns of several matrices: the geometric mean of theirs, weighted with the number of rows.

    Not the scale of all rows together: its columns would be those of the largest matrix.
    """
    rows = sum(len(m) for m in matrices)
    return sum(len(m) / rows * of_finite(of(even_rows(m))).log() for m in matrices).exp()  # type: ignore[union-attr]


def even_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with rows of the same size: groups along a row have scales of their own, so the size of a row is free."""
    size = matrix.square().mean(-1, keepdim=True).sqrt()
    return matrix / torch.where(size > 0, size, torch.ones_like(size))


def fold_columns(twin: Twin, names: set[str], of: Scale) -> tuple[set[str], set[str]]:
    """Folds column scales of the weights ``names`` in the copy, where a trial shows the fold exact.

    Returns:
        (names of weights whose columns are scaled, names of the others).

    Raises:
        Inexact: the model's output changes although every fold was exact in its block.
    """
    weights = [w for w in float_weights(twin.model) if w.kind != "embedding"]
    before = twin.run()
    folded: set[str] = set()
    done: set[str] = set()
    for part in twin.parts({w.module for w in weights}):
        inside = set(part.module.modules())
        here = [w for w in weights if w.module in inside and w.name not in done]
        done |= {w.name for w in here}
        if any(w.name in names for w in here):
            with twin.part(part) as run:
                folded |= _fold_block(twin, part.module, run, here, names, of)
    twin.check(before, "folding column scales")
    left = names - folded
    for name in sorted(left):
        logger.info("%s: no norm and no layer takes the inverse of its column scale exactly: none is folded", name)
    return folded, left


def _fold_block(
    twin: Twin, block: nn.Module, run: Run, weights: list[FloatWeight], names: set[str], of: Scale
) -> set[str]:
    owned = {w.module for w in weights}
    norms = [m for m in block.modules() if m not in owned and norm_vector(m) is not None]
    flow = Flow(run, weights, norms)
    before = flow.output
    folds: list[tuple[NormFold | RowFold, list[FloatWeight]]] = []
    for number, group in enumerate(flow.groups):
        counted = [w for w in group if w.name in names and not w.shared]
        if counted and not any(w.shared for w in group):
            for fold in _candidates(twin, block, run, flow, number):
                if _exact(fold, run, before):
                    folds.append((fold, counted))
                    break
    for first, last in _experts(weights):
        if last.name in names:
            for rows in row_candidates(first, last.columns) + _interleaved(first, last.columns):
                fold = RowFold(first, rows, torch.arange(len(rows), device=rows.device), [last])
                if len(rows) == last.columns and _exact(fold, run, before):
                    folds.append((fold, [last]))
                    break
    folded: set[str] = set()
    for fold, counted in reversed(folds):  # a layer's rows are final before its columns are measured
        fold.apply(of_finite(fold.scale(of, counted)))
        folded |= {w.name for w in counted}
    return folded


def of_finite(scale: torch.Tensor) -> torch.Tensor:
    """The scale, with 1 where it is not a positive finite number."""
    good = torch.isfinite(scale) & (scale > 0)
    return torch.where(good, scale, torch.ones_like(scale)).double()


def _candidates(twin: Twin, block: nn.Module, run: Run, flow: Flow, number: int) -> Iterator[NormFold | RowFold]:
    """Yields folds that may be exact for a group of layers."""
    group = flow.groups[number]
    norms = [norm for norm, readers in flow.readers.items() if readers is group]
    for norm in norms:
        if len(norm_vector(norm)) == group[0].columns:  # type: ignore[arg-type]
            yield from (NormFold(twin, norm, offset, group) for offset in (0.0, 1.0))
    if not norms:
        found = find_source(run, flow, number, head_sizes(block, twin.model))
        if found is not None:
            yield RowFold(*found, group)


def _experts(weights: list[FloatWeight]) -> list[tuple[FloatWeight, FloatWeight]]:
    """(first, last) weight of each module of fused experts."""
    by_module: dict[nn.Module, list[FloatWeight]] = {}
    for weight in weights:
        if weight.kind == "experts" and not weight.shared:
            by_module.setdefault(weight.module, []).append(weight)
    return [(found[0], found[-1]) for found in by_module.values() if len(found) > 1]


def _interleaved(first: FloatWeight, columns: int) -> list[torch.Tensor]:
    index = torch.arange(first.rows, device=first.matrix.device)
    return [index[1::2], index[::2]] if first.rows == 2 * columns else []


def _exact(fold: NormFold | RowFold, run: Run, before: list[torch.Tensor]) -> bool:
    """Whether the block's output stays the same with random scales; undoes them."""
    old = saved(*fold.touched())
    count = len(fold.rows) if isinstance(fold, RowFold) else fold.consumers[0].columns
    random = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64, device="cpu")
    try:
        fold.apply(torch.exp2(2 * random - 1).to(fold.consumers[0].matrix.device))
        return unchanged(run, before)
    finally:
        restore(old)
