"""Two patches of Diffusers' quantizer selection: its deprecation of quanto, and who opens a checkpoint."""

from __future__ import annotations

import functools
from typing import Any

from requanto.config.config import QuantizationMethod, QuantoConfig
from requanto.integrations.diffusers_foreign import claim
from requanto.integrations.foreign import method_of


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


def choose_who_opens(selector: Any) -> None:
    """Makes Requanto open checkpoints of other libraries where it should; others with a QuantoConfig become an error."""
    if not hasattr(selector.merge_quantization_configs, "_requanto"):
        selector.merge_quantization_configs = classmethod(_wrap_merge(selector.merge_quantization_configs.__func__))


def _wrap_merge(original: Any) -> Any:
    @functools.wraps(original)
    def merge_quantization_configs(cls: Any, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        claimed = claim(quantization_config, quantization_config_from_args)
        if claimed is not None:
            return claimed
        if isinstance(quantization_config_from_args, QuantoConfig):
            found = method_of(quantization_config)
            if found != QuantizationMethod.QUANTO.value:
                raise ValueError(
                    f"the checkpoint is quantized by {found!r}, a format that Requanto does not read, and cannot be "
                    f"quantized again with a QuantoConfig. Load it without quantization_config, or load the float "
                    f"checkpoint that it was made from."
                )
        return original(cls, quantization_config, quantization_config_from_args)

    merge_quantization_configs._requanto = True
    return merge_quantization_configs
