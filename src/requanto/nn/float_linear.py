"""`FloatLinear`: a layer that stays float in a quantized model, such as ``lm_head``; with few rows at the memory's speed.

Only the class of the layer changes: parameters, names, hooks and files stay as they are.
"""

from __future__ import annotations

import logging
import types
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
    found = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or not _gains(module):
            continue
        module.__class__ = FloatLinear
        wrapped: Any = module.__dict__.get("_old_forward")  # what Accelerate's hooks call
        if isinstance(wrapped, types.MethodType):
            module._old_forward = types.MethodType(FloatLinear.forward, module)  # type: ignore[assignment]
        found.append(name)
    if found:
        logger.info("float layers that read a few rows by a kernel for CPUs: %s", ", ".join(found))
    return found


def _gains(module: nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.numel() < SMALLEST:
        return False
    wrapped = module.__dict__.get("_old_forward")
    own = "forward" not in module.__dict__ or getattr(wrapped, "__func__", None) is nn.Linear.forward
    return own and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
