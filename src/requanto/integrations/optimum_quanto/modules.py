"""QModuleMixin and the quantized modules with optimum-quanto's names, group sizes and state dict.

Differences from `requanto.nn`: a weight becomes a Weight*Tensor, a module stays a quantized module after freezing, and
activation scales are always static (1 until calibrated) and always saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.integrations.optimum_quanto.activations import quantize_activation
from requanto.integrations.optimum_quanto.base import QTensor
from requanto.integrations.optimum_quanto.weights import WeightQBitsTensor, WeightQBytesTensor, quantize_weight
from requanto.model import calibrate
from requanto.nn import mixin as native
from requanto.nn import modules as native_modules
from requanto.nn.activation import QActivation
from requanto.nn.registry import Registry
from requanto.scales.optimizers import Optimizer, SymmetricOptimizer, default_optimizer
from requanto.scales.quanto import group_size_rule

#: quantized modules registered with optimum-quanto's names
registry = Registry()


def register_qmodule(module_cls: type) -> Any:
    """Registers a quantized module for ``module_cls`` and its subclasses."""
    return registry.register(module_cls)


class QModuleMixin(native.QModuleMixin):
    """Base of the quantized modules, see `requanto.nn.QModuleMixin`."""

    def __init__(self, *args: Any, optimizer: Optimizer | None = None, **kwargs: Any) -> None:
        mro = type(self).__mro__
        if nn.Module in mro and mro.index(QModuleMixin) > mro.index(nn.Module):
            raise TypeError(
                f"{type(self).__name__}: QModuleMixin must come before the torch.nn.Module class in its bases"
            )
        super().__init__(*args, **kwargs)
        self.weight_group_size = None
        if self.weight_qtype is not None:
            optimizer = optimizer or default_optimizer(self.weight_qtype)
            if self.weight_qtype.bits < 8:
                self.weight_group_size = group_size_rule(self.weight.shape)
        self.optimizer = optimizer
        if self.activation_qtype is None:
            weight = getattr(self, "weight", None)
            dtype = torch.float32 if weight is None else weight.dtype
            for name in ("input_scale", "output_scale"):
                self.register_buffer(name, torch.ones((), dtype=dtype, device=kwargs.get("device")))

    @property
    def frozen(self) -> bool:
        return isinstance(self.weight, QTensor)

    @property
    def qweight(self) -> Any:
        """The quantized weight: the frozen one, or the float one quantized now; None if the weight stays float."""
        if self.weight_qtype is None:
            return None
        if self.frozen:
            return self.weight
        group = self.weight_group_size
        if isinstance(self.optimizer, SymmetricOptimizer):
            scale, shift = self.optimizer(self.weight, qtype=self.weight_qtype, axis=0), None
        else:
            scale, shift = self.optimizer(self.weight, qtype=self.weight_qtype, axis=0, group_size=group)
        return quantize_weight(
            self.weight, self.weight_qtype, 0, scale, shift, group, activation_qtype=self.activation_qtype
        )

    @property
    def weight_to_use(self) -> Any:
        """The weight that forward computes with."""
        return self.weight if self.weight_qtype is None else self.qweight

    def freeze(self) -> None:
        qweight = self.qweight
        if qweight is not None and not self.frozen:
            self.weight = nn.Parameter(qweight.detach(), requires_grad=False)

    def sync_activation(self) -> None:
        """Does nothing: activation scales are static here, the weight does not need them."""

    # ------------------------------------------------------------------ activations

    def quantize_input(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, QActivation) or not self.quantizes_input:
            return super().quantize_input(input)
        return quantize_activation(input, self.activation_qtype, self.input_scale)

    def quantize_output(self, output: torch.Tensor) -> torch.Tensor:
        if isinstance(output, QActivation) or not self.quantizes_output:
            return output
        return quantize_activation(output, self.activation_qtype, self.output_scale)

    def disable_output_quantization(self) -> None:
        if self.quantizes_output:
            self.quantizes_output = False
            self._quantize_hooks.pop("output").remove()

    def refresh_calibrated(self) -> None:
        """Does nothing: activation scales are static here."""

    # ------------------------------------------------------------------ state dict

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if self.frozen:
            del destination[prefix + "weight"]
            self.weight.save_to_state_dict(destination, prefix + "weight.", keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing: list, unexpected: list,
        errors: list,
    ) -> None:  # fmt: skip
        if self.weight_qtype is not None and prefix + "weight" not in state_dict:
            loaded = self._take_weight(state_dict, prefix + "weight.", missing)
            if loaded is not None:
                assign = local_metadata.get("assign_to_params_buffers", False)
                device = self.weight.device
                moved = loaded if assign or device.type == "meta" else loaded.to(device)
                self.weight = nn.Parameter(moved, requires_grad=False)
        before = len(missing)
        nn.Module._load_from_state_dict(self, state_dict, prefix, local_metadata, False, missing, unexpected, errors)
        missing[before:] = [key for key in missing[before:] if key != prefix + "weight" or not self.frozen]

    def _take_weight(self, state_dict: dict, prefix: str, missing: list) -> Any:
        size, stride = self.weight.size(), self.weight.stride()
        if self.weight_qtype.bits == 8:
            axis = None if self.weight.shape[0] == 1 else 0
            return WeightQBytesTensor.load_from_state_dict(
                state_dict, prefix, self.weight_qtype, axis, size, stride, self.activation_qtype, missing
            )
        return WeightQBitsTensor.load_from_state_dict(
            state_dict, prefix, self.weight_qtype, 0, self.weight_group_size, size, stride, missing
        )


class Calibration(calibrate.Calibration):
    """`requanto.Calibration`, except that a model without quantized activations is not an error."""

    needs_modules = False


@register_qmodule(nn.Linear)
class QLinear(QModuleMixin, nn.Linear):
    """nn.Linear, quantized."""

    qcreate = classmethod(native_modules.QLinear.qcreate.__func__)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight_to_use, self.bias)


@register_qmodule(nn.Conv2d)
class QConv2d(QModuleMixin, nn.Conv2d):
    """nn.Conv2d, quantized."""

    qcreate = classmethod(native_modules._QConvNd.qcreate.__func__)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight_to_use, self.bias)


@register_qmodule(nn.LayerNorm)
class QLayerNorm(QModuleMixin, nn.LayerNorm):
    """nn.LayerNorm whose output is quantized."""

    qcreate = classmethod(native_modules.QLayerNorm.qcreate.__func__)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def quantize_module(
    module: nn.Module,
    weights: str | qtype | None = None,
    activations: str | qtype | None = None,
    optimizer: Optimizer | None = None,
) -> Any:
    """Returns the quantized counterpart of a module, which shares its parameters; None if there is none."""
    found = registry.find(module)
    if found is None:
        return None
    return found.from_module(module, weights=weights, activations=activations, optimizer=optimizer)
