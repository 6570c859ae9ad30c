"""Requanto as a quantization backend of PEFT (0.21 and later).

PEFT asks for a backend where a method reads the base weight as floats and writes it back. Older versions of PEFT have no
backends; there the same methods read the weight directly (`requanto.tensor.reading`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from requanto.integrations.patching import replace_everywhere
from requanto.tensor import exact
from requanto.tensor.qtensor import QTensor

try:
    from peft.utils import quantization_utils
except ImportError:  # PEFT before 0.21
    quantization_utils = None


def register_backend() -> None:
    """Makes PEFT find the backend for layers with a quantized weight."""
    if quantization_utils is None:
        return

    class Backend(quantization_utils.QuantizationBackend):
        """Reads the float values of a quantized weight, and writes what can be stored without rounding."""

        supports_merge = True
        backend_name = "requanto"

        def __init__(self, layer_type: str) -> None:
            self.layer_type = layer_type

        def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
            """The float weight; a change of it does not change the layer."""
            weight = base_layer.weight
            return weight.dequantize() if isinstance(weight, QTensor) else weight.data

        def set_base_weight(self, peft_layer: Any, weight_data: torch.Tensor) -> None:
            """Changes the weight to these values.

            Raises:
                NotImplementedError: they cannot be stored without rounding (`requanto.tensor.exact`).
            """
            base = peft_layer.get_base_layer()
            if isinstance(base.weight, QTensor):
                exact.assign(base.weight, weight_data)
            else:
                base.weight.data = weight_data

    def wrap(original: Callable) -> Callable:
        @functools.wraps(original)
        def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
            if isinstance(getattr(base_layer, "weight", None), QTensor):
                return Backend(_layer_type(base_layer))
            return original(base_layer, **kwargs)

        return resolve_quantization_backend

    replace_everywhere(quantization_utils.resolve_quantization_backend, wrap)


def _layer_type(base_layer: nn.Module) -> str:
    """PEFT's word for the kind of layer; for others (GPT-2's Conv1D) a word that no method takes for a linear layer."""
    kinds = ((nn.Linear, "linear"), (nn.Conv2d, "conv2d"), (nn.Embedding, "embedding"))
    return next((word for kind, word in kinds if isinstance(base_layer, kind)), type(base_layer).__name__.lower())
