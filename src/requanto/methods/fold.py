"""Input channels scaled, and the inverse folded into what comes before: exact, found by trying.

``(x / s) (W s)^T = x W^T``: where ``x`` is the output of a norm, the norm's weight takes the ``1 / s``; where another
layer's output channels reach it by way of products and sums alone (an MLP's up projection), that layer's rows do. Whether
they do is not read off the kind of model: the scaling is applied, the block runs on a sample, and a fold is one that leaves
its output as it was. The scales tried are powers of two, which floats take without rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from requanto.methods.layers import Layer
from requanto.methods.moments import Inputs

#: Relative change of a block's output up to which a fold counts as exact.
TOLERANCE = 1e-3


class Fold:
    """A place that takes the inverse of the scales of some layers' input channels.

    Attributes:
        producer: the norm, or the layer.
        consumers: the layers that read its output.
        offset: 1 for norms that multiply by ``1 + weight``.
    """

    def __init__(self, producer: nn.Module | Layer, consumers: list[Layer], offset: float = 0.0) -> None:
        self.producer, self.consumers, self.offset = producer, consumers, offset

    def apply(self, scales: torch.Tensor) -> torch.Tensor:
        """Folds ``1 / scales`` into the producer and ``scales`` into the consumers.

        Returns:
            The scales as they were applied: those that the norm's dtype holds.
        """
        if isinstance(self.producer, Layer):
            self.producer.scale_rows(1 / scales)
        else:
            weight = self.producer._parameters["weight"]
            old = weight.detach().float() + self.offset
            weight.data.copy_(old / scales - self.offset)
            new = weight.detach().float() + self.offset
            scales = torch.where(new == 0, torch.ones_like(scales), old / new)
            bias = self.producer._parameters.get("bias")
            if bias is not None:
                bias.data.copy_(bias.detach().float() / scales)
        for layer in self.consumers:
            layer.scale_columns(scales)
        return scales


def find_folds(
    block: nn.Module, sources: list[list[Layer]], layers: list[Layer], run: Callable[[], list[Any]]
) -> list[Fold | None]:
    """For each group of layers that share an input, where its scales can go; None where nowhere.

    Args:
        block: the block.
        sources: layers by their input (`requanto.methods.stages.Stage`), in the order in which they run.
        layers: all layers of the block that are to be quantized.
        run: runs the block on a sample.
    """
    leading = {source[0].modules[0]: number for number, source in enumerate(sources)}
    given: dict[int, torch.Tensor] = {}
    outputs: list[tuple[nn.Module, torch.Tensor]] = []
    held = {module for layer in layers for module in layer.modules}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append((module, output))

    norms = [m for m in block.modules() if m not in held and _vector(m) is not None]
    hooks = [module.register_forward_hook(keep) for module in norms]
    try:
        with Inputs(leading, lambda m, x: given.__setitem__(leading[m], x)):
            before = run()
    finally:
        for hook in hooks:
            hook.remove()

    found: list[Fold | None] = []
    for number, source in enumerate(sources):
        fold = None
        if number in given and not any(len(layer.places) > 1 for layer in source):
            for candidate in _candidates(number, sources, given[number], outputs):
                if _exact(candidate, before, run):
                    fold = candidate
                    break
        found.append(fold)
    return found


def _candidates(
    number: int, sources: list[list[Layer]], given: torch.Tensor, outputs: list[tuple[nn.Module, torch.Tensor]]
) -> list[Fold]:
    consumers, columns = sources[number], sources[number][0].columns
    place = given.untyped_storage().data_ptr()
    folds = [
        Fold(module, consumers, offset)
        for module, output in outputs
        if output.untyped_storage().data_ptr() == place and len(_vector(module)) == columns
        for offset in (0.0, 1.0)
    ]
    # What multiplies (up projections, values) runs last before the layer that reads it.
    for earlier in reversed(sources[:number]):
        for layer in reversed(earlier):
            if layer.rows == columns and len(layer.places) == 1:
                folds.append(Fold(layer, consumers))
    return folds


def _exact(fold: Fold, before: list[Any], run: Callable[[], list[Any]]) -> bool:
    """Applies a fold, runs the block, and takes the fold back."""
    layers = [layer for layer in (*fold.consumers, fold.producer) if isinstance(layer, Layer)]
    floats = [layer.parameter for layer in layers]
    others = fold.producer.places[0][0] if isinstance(fold.producer, Layer) else fold.producer
    small = [p for p in others._parameters.values() if p is not None and p.dim() == 1]
    saved = [p.detach().clone() for p in small]
    powers = torch.randint(
        -1, 2, (fold.consumers[0].columns,), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    try:
        fold.apply(torch.exp2(powers.float()).to(floats[0].device))
        for layer in layers:
            layer.show(layer.weight())
        after = run()
    finally:
        for parameter, values in zip(small, saved, strict=True):
            parameter.data.copy_(values)
        for layer, parameter in zip(layers, floats, strict=True):
            layer.restore(parameter)
    pairs = zip(before, after, strict=True)
    floating = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return all(float((a - b).float().norm()) <= TOLERANCE * float(a.float().norm()) for a, b in floating)


def _vector(module: nn.Module) -> torch.Tensor | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 1 else None
