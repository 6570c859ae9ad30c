"""Arguments of Transformers' ``from_pretrained`` that come from a quantized model in memory.

``state_dict=model.state_dict()``, and ``config=model.config``, whose ``quantization_config`` is an object: the library takes
the one apart as float weights, and reads the other as a dict.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from requanto.checkpoint.format import flatten, table_of
from requanto.config.config import QuantoConfig
from requanto.integrations.conversion import as_config
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


def with_stored_state_dict(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords of ``from_pretrained`` with a state dict of quantized weights as files would hold them.

    The weights stay as they are, whatever ``quantization_config`` says.

    Args:
        options: the keywords; they are not changed.

    Raises:
        TypeError: there are quantized weights, and ``config`` is no config object that can describe them.
    """
    state_dict, config = options.get("state_dict"), options.get("config")
    if not isinstance(state_dict, Mapping):
        return options
    table = table_of(state_dict.items())
    if not table:
        return options
    if not hasattr(config, "to_dict"):
        raise TypeError(
            f"state_dict holds quantized weights ({next(iter(table))} and {len(table) - 1} more): from_pretrained needs "
            f"config=, a config object of the model, found {config!r}"
        )
    options, config = dict(options), copy.deepcopy(config)
    given = options.pop("quantization_config", None)
    if given is not None:
        logger.warning(
            "the %d quantized weights of state_dict stay as they are, and its float weights stay float: "
            "quantization_config=%r is not used. To quantize again, call dequantize() on the model first.",
            len(table),
            given,
        )
    own = getattr(config, "quantization_config", None) or given
    kinds = [weight.qtype.name for weight in state_dict.values() if isinstance(weight, QTensor)]
    recipe = (
        QuantoConfig(weights=max(sorted(set(kinds)), key=kinds.count)) if own is None else copy.deepcopy(as_config(own))
    )
    recipe.record(table)
    config.quantization_config = recipe.to_dict()
    return options | {"config": config, "state_dict": flatten(state_dict)}


def taken_recipe(config: Any) -> QuantoConfig | None:
    """Removes the ``quantization_config`` of a model in memory from a model config.

    Returns:
        What it says about quantizing a float model, without the table of that model's weights; None if the config has none,
        or one that was read from a file.
    """
    own = getattr(config, "quantization_config", None)
    if not isinstance(own, QuantoConfig):
        return None
    del config.quantization_config
    return type(own)(**{key: copy.deepcopy(getattr(own, key)) for key in own.parameters() if key != "weights_dtype"})
