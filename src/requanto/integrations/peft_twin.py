"""A float copy of one adapter layer: PEFT's own merge runs on it, so that no method has to be known here."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from requanto.tensor.qtensor import QTensor


def float_twin(module: nn.Module, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A copy of a module whose weights are float and independent of the original; quantized ones are dequantized.

    Attributes that are no module, parameter or buffer are shared, except that dicts, lists and sets are copied.

    Args:
        module: the module, with any submodules.
        dtype: of the float tensors of the copy; None: that of each tensor.
    """
    return _module(module, dtype, {})


def _module(module: nn.Module, dtype: torch.dtype | None, done: dict[int, Any]) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    twin = done[id(module)] = copy.copy(module)
    for name, value in list(twin.__dict__.items()):
        if type(value) in (dict, list, set, OrderedDict):
            twin.__dict__[name] = _content(value, dtype, done)
        elif isinstance(value, (nn.Module, torch.Tensor)):
            twin.__dict__[name] = _content([value], dtype, done)[0]
    return twin


def _content(value: Any, dtype: torch.dtype | None, done: dict[int, Any]) -> Any:
    """A copy of a container, with the twins of the modules and tensors in it."""

    def twin(item: Any) -> Any:
        if isinstance(item, nn.Module):
            return _module(item, dtype, done)
        return _tensor(item, dtype, done) if isinstance(item, torch.Tensor) else item

    if isinstance(value, (dict, OrderedDict)):
        return type(value)((name, twin(item)) for name, item in value.items())
    return type(value)(twin(item) for item in value)


def _tensor(tensor: torch.Tensor, dtype: torch.dtype | None, done: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in done:
        wanted = dtype if tensor.is_floating_point() else None
        if isinstance(tensor, QTensor):
            value = tensor.dequantize(wanted)
        else:
            value = tensor.detach().to(wanted or tensor.dtype, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter) or getattr(tensor, "_is_param", False)
        done[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    return done[id(tensor)]
