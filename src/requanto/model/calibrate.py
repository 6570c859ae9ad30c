"""Calibration: run samples through a model once, and its activations get static scales.

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

from requanto.nn.activation import QActivation
from requanto.nn.mixin import QModuleMixin
from requanto.nn.swap import quantize_in_place
from requanto.scales.observers import Observer, find_observer
from requanto.tensor.qtensor import QTensor

_SOURCES = "_requanto_sources"


class Calibration(TorchFunctionMode):
    """Finds input and output scales of the quantized modules that run inside it. Any eager model; no tracing.

    A model that was loaded with ``QuantoConfig(activations=...)``, or quantized so, is calibrated alike.

    Every batch moves a scale: ``momentum * old + (1 - momentum) * observed``; the first one sets it. With ``streamline``,
    modules whose output no quantized module reads (directly, or by way of operators that keep codes: views, relu, a
    product with a number ...) stop quantizing it when the context ends.

    Args:
        momentum: share of the old scale, 0 .. 1.
        streamline: drop output quantization where only float operators consume it.
        debug: print what each module got, when the context ends.
        observer: ``"absmax"``, ``"percentile"``, ``"mse"``, or a function ``(values, qtype) -> scale``.

    Raises:
        ValueError: (when the context ends) no module with quantized activations ran inside it; or a batch held NaN or Inf.
    """

    #: it is an error that nothing could be calibrated
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
        self._seen: dict[QModuleMixin, None] = {}
        self._read: set[QModuleMixin] = set()
        self._inside: set[nn.Module] = set()
        self._hooks: list[Any] = []

    # ------------------------------------------------------------------ the context

    def __enter__(self) -> Calibration:
        super().__enter__()
        self._seen, self._read, self._inside = {}, set(), set()
        self._hooks = [
            register_module_forward_pre_hook(self.calibrate_input),
            register_module_forward_hook(self.calibrate_output),
        ]
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        for hook in self._hooks:
            hook.remove()
        for module in self._seen:
            module.reuse_quantized(False)
        if exc_type is not None:
            return
        if not self._seen and self.needs_modules:
            raise ValueError(
                "nothing was calibrated: no module with quantized activations ran. Ask for them before freezing, "
                "quantize(model, weights=..., activations='int8'), and run the model inside the context."
            )
        if self.streamline:
            for module in self._seen:
                # A module that ran on its own, in no model, has a user who reads its output.
                if module not in self._read and module in self._inside:
                    module.disable_output_quantization()
        for module in self._seen:
            module.sync_activation()
            if self.debug:
                self._print(module)

    def _print(self, module: QModuleMixin) -> None:
        output = float(module.output_scale) if module.quantizes_output else "float"
        name = getattr(module, "name", "") or type(module).__name__
        kind = module.activation_qtype.name if module.activation_qtype is not None else "float"
        print(f"{name} ({type(module).__name__}): {kind} input {float(module.input_scale):.4g}, output {output}")

    # ------------------------------------------------------------------ who reads what

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.streamline:
            inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, QActivation)]
            sources = {source for t in inputs for source in getattr(t, _SOURCES, ())}
            if sources:
                kept = [t for t in pytree.tree_leaves(output) if isinstance(t, QActivation)]
                for tensor in kept:
                    setattr(tensor, _SOURCES, sources)
                if not kept and len(inputs) > 1 and func in _PRODUCTS:
                    self._read |= sources  # both sides in codes: the product runs on integers
        return output

    # ------------------------------------------------------------------ scales

    def calibrate_input(self, module: nn.Module, args: tuple) -> None:
        """Moves a module's input scale; a hook that runs before the module's own."""
        if not isinstance(module, QModuleMixin):
            _make_room(module)
        if not isinstance(module, QModuleMixin) or module.activation_qtype is None or not args:
            return
        self._seen[module] = None
        module.reuse_quantized(True)
        value = args[0]
        if isinstance(value, QActivation):
            self._read |= set(getattr(value, _SOURCES, ()))
            module.input_scale = value._scale.detach().clone()
            module.calibrated = True
        elif torch.is_tensor(value) and value.is_floating_point() and value.numel():
            module.input_scale = self._moved(module, module.input_scale, value, "input")
            module.calibrated = True

    def calibrate_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Moves a module's output scale, and quantizes the output; a hook that runs before the module's own."""
        if not isinstance(module, QModuleMixin):
            self._inside.update(module.children())
            return None
        if module.activation_qtype is None:
            return None
        if not torch.is_tensor(output) or not output.is_floating_point() or not output.numel():
            return None
        if isinstance(output, QActivation) or not module.quantizes_output:
            return None
        module.output_scale = self._moved(module, module.output_scale, output, "output")
        module.calibrated = True
        quantized = module.quantize_output(output)
        if self.streamline and isinstance(quantized, QActivation):
            setattr(quantized, _SOURCES, {module})
        return quantized

    def _moved(self, module: QModuleMixin, old: torch.Tensor, values: torch.Tensor, side: str) -> torch.Tensor:
        found = self.observer(values.detach(), module.activation_qtype).detach()
        if not bool(torch.isfinite(found).all()):
            name = getattr(module, "name", "") or type(module).__name__
            raise ValueError(f"the {side} of {name} holds NaN or Inf: calibrate on samples that run without")
        if not bool(found > 0):  # a batch of zeros says nothing about the scale
            return old
        found = found.reshape(())  # in the dtype of the values, which is what a quantized activation stands for
        if bool(old == 1):
            return found
        return (self.momentum * old + (1.0 - self.momentum) * found).to(found.dtype)


def _make_room(module: nn.Module) -> None:
    """A layer whose weight says that its inputs are quantized on the fly (as `QuantoConfig` loads them) becomes one that can
    hold scales."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, QTensor) or weight.activation is None:
        return
    if "forward" in module.__dict__:  # the new class would not be asked
        raise ValueError(
            f"a {type(module).__name__} has a forward of its own (device_map and offloading do that): calibrate a model "
            f"that was loaded whole, save it, and load that with a device_map"
        )
    quantize_in_place(module, weight.qtype, weight.activation, None, weight.group_size, weight.shift is None, "")


_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
