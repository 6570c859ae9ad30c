"""Two places where Diffusers speaks for its built-in quanto: a deprecation, and a checkpoint of another backend."""

from __future__ import annotations

import functools
from typing import Any

from requanto.config.config import QuantizationMethod, QuantoConfig


def silence_deprecation() -> None:
    """The built-in QuantoConfig is deprecated because its quantizer is; with ours behind it there is nothing to say."""
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
    """Loading a checkpoint of another backend with our config is a mistake that the library only warns of."""
    if not hasattr(selector.merge_quantization_configs, "_requanto"):
        selector.merge_quantization_configs = classmethod(_merging(selector.merge_quantization_configs.__func__))


def _merging(original: Any) -> Any:
    @functools.wraps(original)
    def merge_quantization_configs(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if isinstance(quantization_config_from_args, QuantoConfig):
            stored = quantization_config
            stored = stored if isinstance(stored, dict) else stored.to_dict()
            found = getattr(stored.get("quant_method"), "value", stored.get("quant_method"))
            if found != QuantizationMethod.QUANTO.value:
                raise ValueError(
                    f"the checkpoint is quantized by {found!r} and cannot be quantized again with a QuantoConfig. Load "
                    f"it without quantization_config, or take the float checkpoint it was made of."
                )
        return original(cls, quantization_config, quantization_config_from_args)

    merge_quantization_configs._requanto = True
    return merge_quantization_configs
