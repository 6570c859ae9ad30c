"""Two patches of Diffusers' quantizer selection: its deprecation of quanto, and checkpoints of other backends."""

from __future__ import annotations

import functools
from typing import Any

from requanto.config.config import QuantizationMethod, QuantoConfig


def silence_deprecation() -> None:
    """Suppresses the deprecation warning of Diffusers' QuantoConfig, which now uses Requanto's quantizer."""
    from diffusers.quantizers import quantization_config

    original = getattr(quantization_config, "deprecate", None)
    if original is None or hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def deprecate(*args: Any, **kwargs: Any) -> Any:
        return None if "QuantoConfig" in args else original(*args, **kwargs)

    deprecate._requanto = True
    quantization_config.deprecate = deprecate


def refuse_other_backends(selector: Any) -> None:
    """Makes loading a checkpoint of another backend with a QuantoConfig an error; Diffusers only warns."""
    if not hasattr(selector.merge_quantization_configs, "_requanto"):
        selector.merge_quantization_configs = classmethod(_wrap_merge(selector.merge_quantization_configs.__func__))


def _wrap_merge(original: Any) -> Any:
    @functools.wraps(original)
    def merge_quantization_configs(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, QuantoConfig):
            stored = quantization_config
            stored = stored if isinstance(stored, dict) else stored.to_dict()
            found = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
            if found != QuantizationMethod.QUANTO.value:
                raise ValueError(
                    f"the checkpoint is quantized by {found!r} and cannot be quantized again with a QuantoConfig. Load "
                    f"it without quantization_config, or load the float checkpoint that it was made from."
                )
        return original(cls, quantization_config, quantization_config_from_args)

    merge_quantization_configs._requanto = True
    return merge_quantization_configs
