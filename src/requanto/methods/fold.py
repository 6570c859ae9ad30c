"""Scaling of input channels, with the inverse folded exactly into the module that produces the input.

``(x / s) (W s)^T = x W^T``. If ``x`` is the output of a norm, ``1 / s`` is folded into the norm's weight. If ``x`` depends
linearly on another layer's output channels, one by one (as on an MLP's up projection), it is folded into that layer's rows.
Which case applies is not derived from the kind of model: each candidate is applied to the block, the block runs on a sample,
and the fold is accepted if the output is unchanged. The test scales are powers of two, which cause no rounding in floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from requanto.methods.layers import Layer
from requanto.methods.moments import InputHooks

#: Relative change of a block's output up to which a fold counts as exact.
TOLERANCE = 1e-3


class Fold:
    """A module into which the inverse of some layers' input scales can be folded.

    Attributes:
        producer: the norm, or the layer.
        consumers: the layers that take its output as input.
        offset: 1 for norms that multiply by ``1 + weight``.
    """

    def __init__(self, producer: nn.Module | Layer, consumers: list[Layer], offset: float = 0.0) -> None:
        self.producer, self.consumers, self.offset = producer, consumers, offset

    def apply(self, scales: torch.Tensor) -> torch.Tensor:
        """Folds ``1 / scales`` into the producer and ``scales`` into the consumers.

        Returns:
            The scales that were applied, after rounding the norm's weight to its dtype.
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
    """Returns a fold for each group of layers that share an input; None if there is none.

    Args:
        block: the block.
        sources: groups of layers with the same input (`requanto.methods.stages.Stage`), in the order in which they run.
        layers: all layers of the block that are to be quantized.
        run: runs the block on a sample.
    """
    leading = {source[0].modules[0]: number for number, source in enumerate(sources)}
    given: dict[int, torch.Tensor] = {}
    outputs: list[tuple[nn.Module, torch.Tensor]] = []
    held = {module for layer in layers for module in layer.modules}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append((module, output))

    norms = [m for m in block.modules() if m not in held and _vector(m) is not None]
    hooks = [module.register_forward_hook(record) for module in norms]
    try:
        with InputHooks(leading, lambda m, x: given.__setitem__(leading[m], x)):
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
    # Layers whose output is only multiplied (up projections, values) run shortly before the layer that takes the result.
    for earlier in reversed(sources[:number]):
        for layer in reversed(earlier):
            if layer.rows == columns and len(layer.places) == 1:
                folds.append(Fold(layer, consumers))
    return folds


def _exact(fold: Fold, before: list[Any], run: Callable[[], list[Any]]) -> bool:
    """Whether the block's output is unchanged by a fold: applies it, runs the block, and undoes it."""
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
            layer.set_values(layer.weight())
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
