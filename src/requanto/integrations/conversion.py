"""Helpers of the Transformers and the Diffusers quantizer: configs, sizes in bytes, dequantization."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from requanto.config.config import QuantoConfig
from requanto.integrations.shards import local_quantized
from requanto.nn.direct_linear import use_plain_linear
from requanto.nn.mixin import QModuleMixin
from requanto.nn.swap import restore_float_class
from requanto.tensor.qtensor import QTensor


def as_config(config: Any) -> QuantoConfig:
    """Converts a dict or a built-in QuantoConfig of Transformers or Diffusers to requanto's QuantoConfig.

    Raises:
        TypeError: anything else.
    """
    if isinstance(config, QuantoConfig):
        return config
    if isinstance(config, dict):
        return QuantoConfig.from_dict(config)
    if type(config).__name__ == "QuantoConfig":
        # Further keywords than the library's own: `requanto.integrations.builtin_configs`.
        return QuantoConfig(**{key: getattr(config, key) for key in QuantoConfig.parameters() if hasattr(config, key)})
    raise TypeError(f"expected a QuantoConfig, found {type(config).__module__}.{type(config).__name__}")


def frozen_parameter(tensor: QTensor) -> QTensor:
    """Returns the tensor as a parameter with ``requires_grad=False``."""
    return nn.Parameter(tensor, requires_grad=False)  # type: ignore[return-value]


def true_bytes(model: nn.Module, buffers: bool = True) -> int:
    """Returns the bytes of the model's parameters (and buffers): codes and scales of quantized weights, shared ones once.

    Of a DTensor, only this rank's shard is counted.
    """
    tensors = list(model.parameters()) + (list(model.buffers()) if buffers else [])
    tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum(t.nbytes if isinstance(t, QTensor) else t.nelement() * t.element_size() for t in tensors)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces every quantized parameter by a float one in place and turns activation quantization off; ties are kept.

    Raises:
        NotImplementedError: a weight is sharded over ranks.
    """
    for name, parameter in model.named_parameters():
        if local_quantized(parameter) is not None:
            raise NotImplementedError(
                f"dequantize(): {name} is sharded over ranks. Save the model (save_pretrained, on every rank), load it in "
                f"one process and dequantize it there."
            )
    for module in model.modules():
        if isinstance(module, QModuleMixin):
            restore_float_class(module)
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, QTensor):
                if id(parameter) not in done:
                    value = parameter.dequantize(dtype).contiguous()
                    done[id(parameter)] = nn.Parameter(value, requires_grad=False)
                setattr(module, name, done[id(parameter)])
                use_plain_linear(module)
    return model


def has_quantized(model: nn.Module) -> bool:
    """Whether any parameter is a QTensor, or a DTensor of one."""
    return any(isinstance(p, QTensor) or local_quantized(p) is not None for p in model.parameters())


def world_size() -> int:
    """Number of ranks of torch.distributed; 1 if it is not initialized."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
