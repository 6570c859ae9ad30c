"""Base of optimum-quanto's two weight classes: matmul, gradients, copies.

They hold the same tensors as in optimum-quanto, in the same layout. Matmuls use `requanto.linear` if the codes can be used
in that layout, else the dequantized weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from requanto.integrations.optimum_quanto.base import qfallback
from requanto.linear import linear
from requanto.nn.activation import QActivation
from requanto.tensor.qtensor import QTensor as NativeQTensor

aten = torch.ops.aten


class _Linear(torch.autograd.Function):
    """``x @ W.T + b``; the gradient of W is that of the float weight it was rounded from."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        if isinstance(x, QActivation):
            x = x.dequantize()
        native = weight.as_native()
        if native is not None and x.dtype == weight.dtype:
            return linear(x, native, bias)
        out = torch.matmul(x, weight.dequantize().to(x.dtype).t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, weight.dequantize().to(grad.dtype))
        if ctx.needs_input_grad[1]:
            values = x.dequantize() if isinstance(x, QActivation) else x
            grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ values.reshape(-1, values.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Any) -> torch.Tensor:  # type: ignore[override]
        return tensor._values()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base: torch.Tensor, make: Any) -> torch.Tensor:  # type: ignore[override]
        return make(base)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        return grad, None


class Weight:
    """Base of the weight classes, which define ``_values``, ``_map_inner`` and ``_converted``."""

    #: method that returns the transposed weight; None for classes whose codes cannot be transposed
    _transposed: Any = None

    def as_native(self) -> NativeQTensor | None:
        """Returns a requanto.QTensor that shares the codes' memory; None if the codes are in another order."""
        return None

    def dequantize(self) -> torch.Tensor:
        """Returns the float values; the gradient is passed through unchanged."""
        return _Dequantize.apply(self)

    def optimize(self) -> Any:
        """Returns this tensor: there is no device-specific layout."""
        return self

    def __deepcopy__(self, memo: dict) -> Any:
        if id(self) not in memo:
            copy = self._map_inner(torch.clone)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        names, meta = self.__tensor_flatten__()
        return _rebuild, (type(self), {name: getattr(self, name) for name in names}, meta)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({self._data}, scale={self._scale}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is torch.equal:
            return args[0].equal(args[1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket
        if op is aten.clone and kwargs.get("memory_format") is torch.contiguous_format and not args[0].is_contiguous():
            return qfallback(func, *args, **kwargs)
        if op in (aten.detach, aten.alias, aten.clone):
            return args[0]._map_inner(op)
        if op in (aten._to_copy, aten.to):
            return args[0]._converted(**kwargs)
        if op is aten.t and args[0]._transposed is not None:
            return args[0]._transposed()
        if op is aten.copy_ and isinstance(args[0], cls) and isinstance(args[1], cls):
            for name in args[0].__tensor_flatten__()[0]:
                setattr(args[0], name, getattr(args[1], name).to(args[0].device))
            return args[0]
        return qfallback(func, *args, **kwargs)


def _linear(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, Weight):
        return F.linear(input.dequantize(), weight, bias)
    return _Linear.apply(input, weight, bias)


def _rebuild(cls: Any, inner: dict[str, torch.Tensor], meta: dict[str, str]) -> Any:
    return cls.__tensor_unflatten__(inner, meta, None, None)
