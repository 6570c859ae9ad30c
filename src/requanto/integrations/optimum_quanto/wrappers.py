"""The wrapper classes of `models`, for models quantized with optimum-quanto's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.integrations.optimum_quanto import models
from requanto.integrations.optimum_quanto.quantize import freeze, quantization_map, quantize, requantize


class _Compat:
    """Quantizes, saves and loads with the functions of `integrations.optimum_quanto`."""

    @classmethod
    def _quantize(cls, model: nn.Module, kind: qtype | None, activations: Any, optimizer: Any, **patterns: Any) -> None:
        quantize(model, kind, activations, optimizer, **patterns)
        freeze(model)

    @classmethod
    def _map(cls, model: nn.Module) -> dict[str, dict[str, str]]:
        return quantization_map(model)

    @classmethod
    def _state(cls, model: nn.Module) -> dict[str, torch.Tensor]:
        return model.state_dict()

    @classmethod
    def _load(cls, model: nn.Module, state: Any, qmap: dict) -> None:
        requantize(model, state, qmap)


class QuantizedTransformersModel(_Compat, models.QuantizedTransformersModel):
    """A quantized Transformers model; subclasses set ``auto_class``."""


class QuantizedDiffusersModel(_Compat, models.QuantizedDiffusersModel):
    """A quantized Diffusers model; subclasses set ``base_class``."""


def __getattr__(name: str) -> Any:
    if name == "QuantizedModelForCausalLM":
        from transformers import AutoModelForCausalLM as auto

        bases, attributes = (QuantizedTransformersModel,), {"auto_class": auto}
    elif name == "QuantizedPixArtTransformer2DModel":
        from diffusers import PixArtTransformer2DModel as base

        bases, attributes = (QuantizedDiffusersModel,), {"base_class": base}
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = type(name, bases, {**attributes, "__module__": __name__})
    return globals()[name]
