"""`FloatLinear`: a layer that stays float in a quantized model, such as ``lm_head``; with few rows at the memory's speed.

Only the class of the layer changes: parameters, names, hooks and files stay as they are.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from requanto.linear.cpu.float_linear import SMALLEST, few_rows
from requanto.nn.modules import QLinear
from requanto.nn.registry import modules

logger = logging.getLogger(__name__)


class FloatLinear(nn.Linear):
    """nn.Linear; a few rows of x are computed by a kernel of this package on CPUs (`requanto.linear.cpu.float_linear`)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = few_rows(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias) if out is None else out

    def _get_name(self) -> str:  # ``print(model)`` shows what it shows without this class
        return "Linear" if type(self) is FloatLinear else type(self).__name__


modules.register(FloatLinear)(QLinear)


def use_float_linear(model: nn.Module) -> list[str]:
    """Makes the large linear layers of a model that are float, and on the CPU, `FloatLinear`; others stay as they are.

    Returns:
        Names of these layers.
    """
    found = change_linear_layers(model, FloatLinear, _gains)
    if found:
        logger.info("float layers that read a few rows by a kernel for CPUs: %s", ", ".join(found))
    return found


def change_linear_layers(model: nn.Module, cls: type[nn.Linear], gains: Callable[[nn.Linear], bool]) -> list[str]:
    """Makes the layers of a model that are nn.Linear, have its forward, and gain by it, layers of that class.

    Returns:
        Names of these layers.
    """
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and gains(module) and _has_own_forward(module):
            change_class(module, cls)
            found.append(name)
    return found


def change_class(module: nn.Module, cls: type[nn.Linear]) -> None:
    """Makes a linear layer one of another class, whose forward Accelerate's hooks call from then on, too."""
    wrapped: Any = module.__dict__.get("_old_forward")
    if getattr(wrapped, "__func__", None) is type(module).forward:
        module._old_forward = types.MethodType(cls.forward, module)  # type: ignore[assignment]
    module.__class__ = cls


def _has_own_forward(module: nn.Linear) -> bool:
    """Whether nobody has replaced its forward, but for Accelerate's hooks."""
    wrapped = module.__dict__.get("_old_forward")
    return "forward" not in module.__dict__ or getattr(wrapped, "__func__", None) is nn.Linear.forward


def _gains(module: nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.numel() < SMALLEST:
        return False
    return weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
