"""Calibration: static activation scales from running samples through a model.

requanto.quantize(model, weights="int8", activations="int8")
with requanto.Calibration():
    model(samples)
requanto.freeze(model)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from requanto.dtypes.qtypes import qtype
from requanto.nn.activation import QActivation
from requanto.nn.mixin import QModuleMixin
from requanto.nn.swap import quantize_in_place
from requanto.scales.observers import Observer, find_observer
from requanto.tensor.qtensor import QTensor

_SOURCES = "_requanto_sources"


class Calibration(TorchFunctionMode):
    """Context that measures input and output scales of the quantized modules that run in it. Eager models only, no tracing.

    It also calibrates models that were loaded or quantized with ``QuantoConfig(activations=...)``.

    The first batch sets a scale, each further one updates it to ``momentum * old + (1 - momentum) * observed``. With
    ``streamline``, modules stop quantizing their output at the end of the context if no quantized module consumes it,
    directly or through operators that keep it quantized (views, relu, multiplication by a number ...).

    Args:
        momentum: share of the old scale, 0 .. 1.
        streamline: stop output quantization where only float operators consume the output.
        debug: print the scales of each module at the end of the context.
        observer: ``"absmax"``, ``"percentile"``, ``"mse"``, or a function ``(values, qtype) -> scale``.

    Raises:
        ValueError: no module with quantized activations ran in the context (at its end), or a batch contains NaN or Inf.
    """

    #: raise if no module was calibrated
    needs_modules = True

    def __init__(
        self,
        *,
        momentum: float = 0.9,
        streamline: bool = True,
        debug: bool = False,
        observer: str | Observer = "absmax",
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in 0 .. 1 (1 excluded: no batch would count), found {momentum}")
        self.momentum, self.streamline, self.debug = momentum, streamline, debug
        self.observer = find_observer(observer)
        self._modules: dict[QModuleMixin, None] = {}  # modules that ran, in order
        self._consumed: set[QModuleMixin] = set()  # modules whose quantized output was used as such
        self._submodules: set[nn.Module] = set()  # children of modules that ran
        self._hooks: list[Any] = []

    # ------------------------------------------------------------------ the context

    def __enter__(self) -> Calibration:
        super().__enter__()
        self._modules, self._consumed, self._submodules = {}, set(), set()
        self._hooks = [
            register_module_forward_pre_hook(self.calibrate_input),
            register_module_forward_hook(self.calibrate_output),
        ]
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            module.reuse_quantized(False)
        if exc_type is not None:
            return
        if not self._modules and self.needs_modules:
            raise ValueError(
                "nothing was calibrated: no module with quantized activations ran. Quantize activations before freezing, "
                "quantize(model, weights=..., activations='int8'), and run the model inside the context."
            )
        if self.streamline:
            for module in self._modules:
                # The output of a root module is returned to the user and stays quantized.
                if module not in self._consumed and module in self._submodules:
                    module.disable_output_quantization()
        for module in self._modules:
            module.sync_activation()
            if self.debug:
                self._print(module)

    def _print(self, module: QModuleMixin) -> None:
        output = float(module.output_scale) if module.quantizes_output else "float"
        name = getattr(module, "name", "") or type(module).__name__
        kind = module.activation_qtype.name if module.activation_qtype is not None else "float"
        print(f"{name} ({type(module).__name__}): {kind} input {float(module.input_scale):.4g}, output {output}")

    # ------------------------------------------------------------------ which outputs are consumed quantized

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.streamline:
            inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, QActivation)]
            sources = {source for t in inputs for source in getattr(t, _SOURCES, ())}
            if sources:
                outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, QActivation)]
                for tensor in outputs:
                    setattr(tensor, _SOURCES, sources)
                if not outputs and len(inputs) > 1 and func in _MATMULS:
                    self._consumed |= sources  # both operands are quantized: an integer matmul
        return output

    # ------------------------------------------------------------------ scales

    def calibrate_input(self, module: nn.Module, args: tuple) -> None:
        """Updates a module's input scale; a hook that runs before the module's own."""
        weight = module._parameters.get("weight")
        kind = getattr(module, "activation_qtype", weight.activation if isinstance(weight, QTensor) else None)
        if isinstance(kind, qtype) and kind.blocks is not None:
            raise ValueError(
                f"{getattr(module, 'name', '') or type(module).__name__}: {kind.name} activations have a scale for each "
                f"block, computed on the fly, and nothing to calibrate; static scales are for int8 and float8 activations"
            )
        if not isinstance(module, QModuleMixin):
            _make_qmodule(module)
        if not isinstance(module, QModuleMixin) or module.activation_qtype is None or not args:
            return
        self._modules[module] = None
        module.reuse_quantized(True)
        value, column = args[0], module.input_column
        if column is not None and torch.is_tensor(value) and value.is_floating_point():
            # The scale is that of what is quantized. A quantized input is of no use here: its values are quantized anew.
            value = value.dequantize() if isinstance(value, QActivation) else value
            value = value * column.to(value.dtype)
        if isinstance(value, QActivation):
            self._consumed |= set(getattr(value, _SOURCES, ()))
            module.input_scale = value._scale.detach().clone()
            module.calibrated = True
        elif torch.is_tensor(value) and value.is_floating_point() and value.numel():
            module.input_scale = self._updated(module, module.input_scale, value, "input")
            module.calibrated = True

    def calibrate_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Updates a module's output scale, and quantizes the output; a hook that runs before the module's own."""
        if not isinstance(module, QModuleMixin):
            self._submodules.update(module.children())
            return None
        if module.activation_qtype is None:
            return None
        if not torch.is_tensor(output) or not output.is_floating_point() or not output.numel():
            return None
        if isinstance(output, QActivation) or not module.quantizes_output:
            return None
        module.output_scale = self._updated(module, module.output_scale, output, "output")
        module.calibrated = True
        quantized = module.quantize_output(output)
        if self.streamline and isinstance(quantized, QActivation):
            setattr(quantized, _SOURCES, {module})
        return quantized

    def _updated(self, module: QModuleMixin, old: torch.Tensor, values: torch.Tensor, side: str) -> torch.Tensor:
        found = self.observer(values.detach(), module.activation_qtype).detach()
        if not bool(torch.isfinite(found).all()):
            name = getattr(module, "name", "") or type(module).__name__
            raise ValueError(f"the {side} of {name} contains NaN or Inf: calibrate on samples without")
        if not bool(found > 0):  # a batch of zeros
            return old
        found = found.reshape(())  # in the dtype of the values: a quantized activation has the dtype of its scale
        if bool(old == 1):
            return found
        return (self.momentum * old + (1.0 - self.momentum) * found).to(found.dtype)


def _make_qmodule(module: nn.Module) -> None:
    """Turns a layer whose QTensor quantizes inputs on the fly (from `QuantoConfig`) into a module with scale buffers."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, QTensor) or weight.activation is None:
        return
    if "forward" in module.__dict__:  # it would override the forward of the new class
        raise ValueError(
            f"a {type(module).__name__} has a patched forward (device_map and offloading do that): load the model without "
            f"device_map, calibrate and save it, and load the result with a device_map"
        )
    quantize_in_place(module, weight.qtype, weight.activation, None, weight.group_size, weight.shift is None, "")


_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
