"""`DirectLinear`: nn.Linear with a quantized weight, whose forward calls the cached plan itself.

``F.linear`` finds out that the weight is a tensor subclass, and calls ``__torch_function__``, which looks up the function:
a tenth of the time of a small model's token. Only the class of the layer changes: parameters, names, hooks and files stay
as they are, and whatever is not a token on a CPU runs through ``F.linear`` as before.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from requanto.linear.registry import quick_gemm
from requanto.nn.modules import QLinear
from requanto.nn.registry import modules
from requanto.tensor.qtensor import QTensor


class DirectLinear(nn.Linear):
    """nn.Linear; a few rows of x on a CPU are multiplied with a quantized weight without `F.linear`'s dispatch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and type(input) is torch.Tensor and not input.is_nested:
            parameters = self._parameters
            weight = parameters.get("weight")
            plain = type(weight) is QTensor and parameters.get("bias", self) is None
            # A mode of torch functions is to see the call.
            if plain and not torch._C._len_torch_function_stack():  # type: ignore[attr-defined]
                out = quick_gemm(input, weight)  # type: ignore[arg-type]
                if out is not None:
                    return out
        return F.linear(input, self.weight, self.bias)


modules.register(DirectLinear)(QLinear)


def use_direct_linear(model: nn.Module) -> list[str]:
    """Makes the layers of a model that are nn.Linear and have a quantized weight on the CPU `DirectLinear`.

    Returns:
        Names of these layers.
    """
    found = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or not _gains(module):
            continue
        module.__class__ = DirectLinear
        wrapped: Any = module.__dict__.get("_old_forward")  # what Accelerate's hooks call
        if isinstance(wrapped, types.MethodType):
            module._old_forward = types.MethodType(DirectLinear.forward, module)  # type: ignore[assignment]
        found.append(name)
    return found


def _gains(module: nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    if type(weight) is not QTensor or weight.device.type != "cpu":
        return False
    wrapped = module.__dict__.get("_old_forward")
    return "forward" not in module.__dict__ or getattr(wrapped, "__func__", None) is nn.Linear.forward
