"""Float models with the config of a quantized one: made by ``from_config(a quantized model's config)``, or dequantized.

Their files hold floats, so their config.json must not describe quantized weights.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from requanto.checkpoint.activation_table import activation_table
from requanto.integrations.conversion import has_quantized

logger = logging.getLogger(__name__)


def is_float(model: Any) -> bool:
    """Whether the model holds nothing quantized. One with offloaded weights may: their values are not in memory."""
    return not (has_quantized(model) or activation_table(model) or any(p.is_meta for p in model.parameters()))


def forget_in_transformers(model: Any) -> None:
    """Removes Requanto's quantization_config from a float model, which gets a config of its own: others may use this one."""
    config, quantizer = model.config, getattr(model, "hf_quantizer", None)
    ours = quantizer is None or type(quantizer).__module__.startswith("requanto.")
    if not ours or not _names_quanto(getattr(config, "quantization_config", None)):
        return
    model.config = copy.deepcopy(config)
    del model.config.quantization_config
    model.config.__dict__.pop("_is_quantized", None)
    if quantizer is not None:
        del model.hf_quantizer
        model.is_quantized, model.quantization_method = False, None
    _log(model)


def forget_in_diffusers(model: Any) -> None:
    """The same for a model of Diffusers, whose config is frozen and its own."""
    quantizer = getattr(model, "hf_quantizer", None)
    ours = quantizer is None or type(quantizer).__module__.startswith("requanto.")
    if not ours or not _names_quanto(model.config.get("quantization_config")):
        return
    kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = type(model.config)(kept)
    if quantizer is not None:
        model.hf_quantizer = None
    _log(model)


def _log(model: Any) -> None:
    logger.info("%s is float: the quantization_config in its config was removed", type(model).__name__)


def _names_quanto(config: Any) -> bool:
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return getattr(method, "value", method) == "quanto"
