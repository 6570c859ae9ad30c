"""`DirectLinear`: nn.Linear with a quantized weight, whose forward calls the cached plan itself.

``F.linear`` finds out that the weight is a tensor subclass, and calls ``__torch_function__``, which looks up the function:
a tenth of the time of a small model's token. Only the class of the layer changes: parameters, names, hooks and files stay
as they are, and whatever is not a token on a CPU runs through ``nn.Linear.forward`` and ``F.linear`` as before. So does
everything where a program has replaced one of these two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from requanto.linear.registry import quick_gemm
from requanto.nn.float_linear import FloatLinear, change_class, change_linear_layers
from requanto.nn.modules import QLinear
from requanto.nn.registry import modules
from requanto.tensor.qtensor import QTensor

_FORWARD, _LINEAR = nn.Linear.forward, torch._C._nn.linear


class DirectLinear(nn.Linear):
    """nn.Linear; a few rows of x on a CPU are multiplied with a quantized weight without `F.linear`'s dispatch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return F.linear(input, self.weight, self.bias)
        else:
            if not torch.compiler.is_compiling() and type(input) is torch.Tensor and not input.is_nested:
                parameters = self._parameters
                weight = parameters.get("weight")
                if type(weight) is QTensor and parameters.get("bias", self) is None and not _is_watched():
                    out = quick_gemm(input, weight)
                    if out is not None:
                        return out
            return nn.Linear.forward(self, input)

    def _get_name(self) -> str:  # ``print(model)`` shows what it shows without this class
        return "Linear" if type(self) is DirectLinear else type(self).__name__


def _is_watched() -> bool:
    """Whether a mode of torch functions, or a function that somebody put in the place of torch's, is to see the call."""
    modes = torch._C._len_torch_function_stack()  # type: ignore[attr-defined]
    return modes > 0 or F.linear is not _LINEAR or nn.Linear.forward is not _FORWARD


modules.register(DirectLinear)(QLinear)


def use_plain_linear(module: nn.Module) -> None:
    """Makes a `DirectLinear` or a `FloatLinear` an nn.Linear again."""
    if type(module) in (DirectLinear, FloatLinear):
        change_class(module, nn.Linear)


def use_direct_linear(model: nn.Module) -> list[str]:
    """Makes the layers of a model that are nn.Linear and have a quantized weight on the CPU `DirectLinear`.

    Returns:
        Names of these layers.
    """
    return change_linear_layers(model, DirectLinear, _gains)


def _gains(module: nn.Linear) -> bool:
    weight = module._parameters.get("weight")
    return type(weight) is QTensor and weight.device.type == "cpu"
