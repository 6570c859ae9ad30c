"""Second moments of the inputs of layers, accumulated while a model runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from requanto.methods.inputs import weight_inputs
from requanto.methods.samples import Stop
from requanto.runtime.tracing import without_autocast


class Moments:
    """Sums over all inputs ``x`` of one layer.

    Attributes:
        hessian: ``sum x x^T``, ``[K, K]``; None if ``full`` is False.
        square: ``sum x^2``, ``[K]``.
        absolute: ``sum |x|``, ``[K]``.
        peak: ``max |x|``, ``[K]``.
        cross: ``sum (y - x) x^T``, where y is the float model's input corresponding to x; None if ``paired`` is False or x
            and y differ in shape.
        rows: number of inputs.
    """

    def __init__(self, columns: int, device: torch.device, full: bool, paired: bool) -> None:
        self.hessian = torch.zeros(columns, columns, dtype=torch.float32, device=device) if full else None
        self.cross = torch.zeros(columns, columns, dtype=torch.float32, device=device) if full and paired else None
        self.square, self.absolute, self.peak = (
            torch.zeros(columns, dtype=torch.float32, device=device) for _ in range(3)
        )
        self.rows = 0

    def add(self, inputs: torch.Tensor, float_inputs: torch.Tensor | None = None) -> None:
        """Adds inputs ``[..., K]``."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if not len(rows):
            return
        self.rows += len(rows)
        self.square += rows.square().sum(0)
        magnitude = rows.abs()
        self.absolute += magnitude.sum(0)
        self.peak = torch.maximum(self.peak, magnitude.amax(0))
        if self.hessian is None:
            return
        with without_autocast(rows.device):
            self.hessian.addmm_(rows.t(), rows)
        if self.cross is not None:
            if float_inputs is None or float_inputs.shape != inputs.shape:
                self.cross = None
            else:
                wanted = float_inputs.detach().reshape(rows.shape).float()
                with without_autocast(rows.device):
                    self.cross.addmm_((wanted - rows).t(), rows)

    def add_inputs(self, module: nn.Module, given: torch.Tensor, float_given: torch.Tensor | None = None) -> None:
        """Adds the input of a module; of a convolution, its patches (`requanto.methods.inputs`)."""
        if float_given is not None and float_given.shape == given.shape:
            for rows, wanted in zip(weight_inputs(module, given), weight_inputs(module, float_given), strict=True):
                self.add(rows, wanted)
        else:
            for rows in weight_inputs(module, given):
                self.add(rows)

    def mixed(self, other: Moments, rows: float) -> Moments:
        """Returns the moments with ``rows`` more inputs that have the mean moments of ``other``."""
        found = self.without_cross()
        share = rows / max(1, other.rows)
        found.rows = self.rows + (rows if other.rows else 0)  # type: ignore[assignment]
        for name in ("hessian", "square", "absolute"):
            own, more = getattr(self, name), getattr(other, name)
            setattr(found, name, None if own is None else own + share * more)
        found.peak = self.peak if self.rows else other.peak
        return found

    def without_cross(self) -> Moments:
        """Returns the same moments with ``cross`` None."""
        other = copy.copy(self)
        other.cross = None
        return other

    def scaled(self, scales: torch.Tensor) -> Moments:
        """Returns the moments of ``x / scales``."""
        other = copy.copy(self)
        other.square, other.absolute, other.peak = self.square / scales**2, self.absolute / scales, self.peak / scales
        for name in ("hessian", "cross"):
            value = getattr(self, name)
            if value is not None:
                setattr(other, name, value / scales / scales[:, None])
        return other


class InputHooks:
    """Context manager with hooks that pass the inputs of modules to a function.

    Args:
        modules: the modules.
        take: called with (module, input).
        stop: end the forward pass when every module has run once; only for modules that run once per pass.
    """

    def __init__(self, modules: Iterable[nn.Module], take: Any, stop: bool = False) -> None:
        self.modules, self.take, self.stop = list(modules), take, stop
        self._left: set[nn.Module] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> InputHooks:
        self.restart()
        # prepend: run before the module's own hooks. with_kwargs: some models call their layers with input=.
        self._hooks = [m.register_forward_pre_hook(self._hook, with_kwargs=True, prepend=True) for m in self.modules]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def restart(self) -> None:
        """Resets the set of modules that have not run yet; called before a new forward pass."""
        self._left = set(self.modules)

    def _hook(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if isinstance(given, torch.Tensor):
            self.take(module, given)
        self._left.discard(module)
        if self.stop and not self._left:
            raise Stop
