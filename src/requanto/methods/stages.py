"""Groups layers by their input, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from requanto.methods.layers import Layer
from requanto.methods.moments import InputHooks

#: A block with more stages than this (e.g. many experts) is one stage: every stage runs the block on all samples.
MOST_STAGES = 8


class Stage:
    """Layers that are quantized together, with moments from the same run of the block.

    Attributes:
        sources: for each distinct input, the layers that take it; moments are computed by a hook on the first one.
    """

    def __init__(self, sources: list[list[Layer]]) -> None:
        self.sources = sources

    @property
    def layers(self) -> list[Layer]:
        """All layers of the stage."""
        return [layer for source in self.sources for layer in source]


def find_stages(layers: list[Layer], run: Callable[[], object], in_turn: bool) -> tuple[list[Stage], list[Layer]]:
    """Returns (stages in the order of their first call, layers that were not called).

    Args:
        layers: the layers.
        run: runs the model or the block once.
        in_turn: one stage per distinct input, so that later layers see the errors of earlier ones; else one stage for all.
    """
    owner = {module: layer for layer in layers for module in layer.modules}
    inputs: list[tuple[torch.Tensor, list[Layer]]] = []
    seen: set[Layer] = set()

    def take(module: nn.Module, given: torch.Tensor) -> None:
        layer = owner[module]
        if layer in seen:
            return
        seen.add(layer)
        # Layers with the same input run shortly after one another, so only the last four inputs are compared and stored.
        alike = (s for t, s in inputs[-4:] if t is given and s[0].geometry == layer.geometry)
        shared = None if len(layer.modules) > 1 else next(alike, None)
        if shared is not None:
            shared.append(layer)
        else:
            inputs.append((given, [layer]))
            if len(inputs) > 4:
                inputs[-5] = (given.new_empty(0), inputs[-5][1])

    with InputHooks(owner, take):
        run()
    sources = [source for _, source in inputs]
    missing = [layer for layer in layers if layer not in seen]
    if not in_turn or len(sources) > MOST_STAGES:
        return ([Stage(sources)] if sources else []), missing
    return [Stage([source]) for source in sources], missing
