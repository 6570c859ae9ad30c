"""Which planned weights are calibrated, and how."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from requanto.config.plan import PlannedWeight, parameter_holders
from requanto.methods.layers import Layer

logger = logging.getLogger(__name__)

#: kinds of `PlannedWeight` whose weight, seen as a matrix, is multiplied with rows; the others are quantized without samples
CALIBRATED = ("linear", "conv1d", "convolution")
#: Convolutions with longer rows are quantized without samples: the second moment of their patches would take over 1 GiB.
MOST_COLUMNS = 16384


def find_layers(model: nn.Module, planned: Mapping[str, PlannedWeight]) -> tuple[list[Layer], list[Layer], list[Layer]]:
    """Returns (layers to calibrate, fused experts to calibrate, layers to quantize without samples, e.g. embeddings).

    A weight shared by several modules is one layer.

    Raises:
        ValueError: a shared weight is planned with two different configurations.
    """
    holders, modules = parameter_holders(model), dict(model.named_modules())
    found: dict[int, Layer] = {}
    for name, choice in planned.items():
        parent, _, leaf = name.rpartition(".")
        module = modules[parent]
        parameter = module._parameters[leaf]
        first = found.get(id(parameter))
        if first is None:
            others = [place for place in holders[id(parameter)] if place[0] is not module]
            found[id(parameter)] = Layer(name, choice, [(module, leaf), *others])
        elif vars(first.planned.options) != vars(choice.options):
            raise ValueError(
                f"one weight is shared by {first.name} ({first.planned.options!r}) and {name} ({choice.options!r}): "
                f"quantize both the same way, or exclude one"
            )
        elif first.planned.kind == "embedding":  # tied: calibrate the weight as that of the Linear layer
            first.planned = choice
    layers = list(found.values())
    calibrated = [layer for layer in layers if layer.planned.kind in CALIBRATED and layer.columns <= MOST_COLUMNS]
    experts = [layer for layer in layers if layer.planned.kind == "experts"]
    others = [layer for layer in layers if layer not in calibrated and layer not in experts]
    if others:
        kinds = sorted({layer.planned.kind for layer in others})
        logger.warning(
            "%d weights (%s) are quantized without samples, which are used only for Linear, Conv1D and convolution layers "
            "with rows of up to %d weights, and for fused experts: %s%s",
            len(others),
            ", ".join(kinds),
            MOST_COLUMNS,
            ", ".join(layer.name for layer in others[:5]),
            " ..." if len(others) > 5 else "",
        )
    return calibrated, experts, others
