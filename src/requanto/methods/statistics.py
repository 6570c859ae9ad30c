"""Second moments of the inputs of a float model's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from requanto.config.plan import PlannedWeight
from requanto.methods.moments import InputHooks, Moments
from requanto.methods.samples import Samples
from requanto.methods.selection import find_layers


def layer_moments(
    model: nn.Module, planned: Mapping[str, PlannedWeight], calibration: Any, *, full: bool = False
) -> dict[str, Moments]:
    """Computes the moments of the inputs of every planned Linear, Conv1D or convolution weight, in one run of the model.

    Args:
        model: any float model.
        planned: full parameter name -> how it will be quantized (`plan.plan`); other kinds of weights are left out.
        calibration: samples, or a function that runs the model (`requanto.methods.samples`).
        full: compute moments of all pairs of input channels (``[K, K]`` float32 per layer, for all layers at once), not only
            of each channel.

    Returns:
        Moments by parameter name; ``rows`` is 0 for a layer that no sample reached.
    """
    layers, _, _ = find_layers(model, planned)
    owner = {module: layer for layer in layers for module in layer.modules}
    found = {layer: Moments(layer.columns, layer.parameter.device, full, paired=False) for layer in layers}
    was_training = model.training
    model.eval()
    try:
        with InputHooks(owner, lambda m, x: found[owner[m]].add_inputs(m, x)):
            for _ in Samples(calibration).run(model):
                pass
    finally:
        model.train(was_training)
    return {layer.name: moments for layer, moments in found.items()}
