"""Folds while `from_pretrained` loads: the float weights are loaded first, changed, and then quantized."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from requanto.config.config import QuantoConfig
from requanto.config.plan import PlannedWeight, parameter_holders
from requanto.integrations.conversion import frozen_parameter
from requanto.tensor.qtensor import QTensor
from requanto.transforms import asks_for_fold

logger = logging.getLogger(__name__)


def check_fold(config: QuantoConfig, planned: Mapping[str, PlannedWeight], device_map: Any) -> None:
    """Refuses what cannot be folded while loading, before anything is loaded.

    Raises:
        ValueError: a budget, whose choice is made before the weights are there, or weights on several devices or on disk.
    """
    if not asks_for_fold(config):
        return
    if any(one.options.auto for one in planned.values()):
        raise ValueError(
            "weights='auto' measures the weights in the files, before anything is folded into them. Load the float model, "
            "then call requanto.quantize(model, weights='auto', ..., fold=True) and requanto.freeze(model)"
        )
    if isinstance(device_map, dict) and len({str(device) for device in device_map.values()}) > 1:
        raise ValueError(
            f"folding runs the float model on one device, and device_map has {sorted(map(str, set(device_map.values())))}: "
            f"load and save it once on one device (requanto quantize --fold), then load the result with this device_map"
        )
    logger.info("the float weights are loaded as they are, and quantized when the folds are done")


def quantize_planned_weights(model: nn.Module, planned: Mapping[str, PlannedWeight]) -> None:
    """Quantizes weights that were loaded as floats, one at a time; modules that share one go on sharing it."""
    holders = parameter_holders(model)
    for name, one in planned.items():
        old = model.get_parameter(name)
        if not isinstance(old, QTensor):  # else it was quantized with the one that it shares
            new = frozen_parameter(one.quantize(old.detach(), name))
            for module, leaf in holders[id(old)]:
                module._parameters[leaf] = new
