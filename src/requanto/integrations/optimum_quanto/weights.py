"""WeightQBytesTensor, WeightQBitsTensor, quantize_weight: optimum-quanto's weights, its codes and attributes.

They hold what it holds, in its layout; products go through `requanto.linear` where the codes need no rearranging.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
import torch.nn.functional as F

from requanto.integrations.optimum_quanto.base import PackedTensor, QBitsTensor, QBytesTensor, qfallback
from requanto.integrations.optimum_quanto.library import quantize_affine, quantize_symmetric
from requanto.linear import linear
from requanto.nn.activation import QActivation
from requanto.qtensor import QTensor as NativeQTensor
from requanto.qtypes import qint2, qint4, qtype, qtypes
from requanto.scales.quanto import grouped_shape, ungroup

aten = torch.ops.aten


class _Linear(torch.autograd.Function):
    """``x @ W.T + b``; the gradient of W is that of the float weight it was rounded from."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        if isinstance(x, QActivation):
            x = x.dequantize()
        native = weight.as_native() if isinstance(weight, WeightQBytesTensor) else None
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


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base: torch.Tensor, make: Any) -> torch.Tensor:  # type: ignore[override]
        return make(base)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        return grad, None


class _Weight:
    """What both kinds of weight do alike."""

    def dequantize(self) -> torch.Tensor:
        """The float values; the gradient passes straight through."""
        return _Dequantize.apply(self)

    def optimize(self) -> Any:
        """This tensor: what a device wants is made when a product runs, not kept in its place."""
        return self

    def __deepcopy__(self, memo: dict) -> Any:
        if id(self) not in memo:
            copy = self._each(torch.clone)
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        names, meta = self.__tensor_flatten__()
        return _rebuild, (type(self).__name__, {name: getattr(self, name) for name in names}, meta)

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
            return args[0]._each(op)
        if op in (aten._to_copy, aten.to):
            return args[0]._moved(**kwargs)
        if op is aten.t and isinstance(args[0], WeightQBytesTensor):
            return args[0]._transposed()
        if op is aten.copy_ and isinstance(args[0], cls) and isinstance(args[1], cls):
            for name in args[0].__tensor_flatten__()[0]:
                setattr(args[0], name, getattr(args[1], name).to(args[0].device))
            return args[0]
        return qfallback(func, *args, **kwargs)


def _linear(input: torch.Tensor, weight: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, _Weight):
        return F.linear(input.dequantize(), weight, bias)
    return _Linear.apply(input, weight, bias)


class WeightQBytesTensor(_Weight, QBytesTensor):
    """A weight of 8-bit codes: ``scale * data``."""

    @staticmethod
    def __new__(cls, qtype, axis, size, stride, data, scale, activation_qtype=None, requires_grad=False):  # type: ignore[no-untyped-def]
        if data.device != scale.device:
            raise ValueError(f"codes are on {data.device}, their scale on {scale.device}")
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=scale.dtype, device=data.device, requires_grad=requires_grad
        )

    def __init__(self, qtype, axis, size, stride, data, scale, activation_qtype=None, requires_grad=False):  # type: ignore[no-untyped-def]
        self._qtype, self._axis, self._data, self._scale = qtype, axis, data, scale
        self.activation_qtype = activation_qtype

    @classmethod
    def create(cls, qtype, axis, size, stride, data, scale, activation_qtype=None, requires_grad=False):  # type: ignore[no-untyped-def]
        """The tensor; there is one class for every device."""
        return cls(qtype, axis, size, stride, data, scale, activation_qtype, requires_grad)

    @classmethod
    def quantize(
        cls,
        base: torch.Tensor,
        qtype: qtype,
        axis: int | None,
        scale: torch.Tensor,
        activation_qtype: qtype | None = None,
        optimized: bool = True,
    ) -> WeightQBytesTensor:
        """``base`` under a scale along ``axis``."""
        if qtype.bits != 8:
            raise ValueError(f"WeightQBytesTensor holds 8-bit codes, found {qtype.name}")

        def make(weight: torch.Tensor) -> WeightQBytesTensor:
            data = quantize_symmetric(weight, qtype.dtype, axis, scale)
            return cls(qtype, axis, weight.size(), weight.stride(), data, scale, activation_qtype)

        return _Quantize.apply(base, make)

    @classmethod
    def load_from_state_dict(cls, state_dict, prefix, qtype, axis, size, stride, activation_qtype, missing_keys):  # type: ignore[no-untyped-def]
        """Takes a weight out of a state dict; None, and the missing keys, where it is not whole."""
        absent = [prefix + name for name in ("_data", "_scale") if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return None
        data, scale = state_dict.pop(prefix + "_data"), state_dict.pop(prefix + "_scale")
        return cls(qtype, axis if scale.dim() else None, size, stride, data, scale, activation_qtype)

    def weight_qbytes_tensor(self) -> WeightQBytesTensor:
        """This tensor: it has no other form."""
        return self

    def as_native(self) -> NativeQTensor | None:
        """The same codes as a Requanto tensor, sharing memory; None where rows do not have their own scale."""
        if self.dim() != 2 or self._axis == -1 or self._data.shape != self.shape or not self._data.is_contiguous():
            return None
        scale = self._scale.reshape(-1, 1).expand(self.shape[0], 1).contiguous()
        return NativeQTensor(self._data, scale, None, qtype=self._qtype, shape=self.shape, dtype=self.dtype)

    def _values(self) -> torch.Tensor:
        return self._scale * self._data.to(self._scale.dtype)

    def _each(self, change: Any) -> WeightQBytesTensor:
        data, scale = change(self._data), change(self._scale)
        return type(self)(self._qtype, self._axis, self.size(), self.stride(), data, scale, self.activation_qtype)

    def _moved(self, dtype: torch.dtype | None = None, **kwargs: Any) -> WeightQBytesTensor:
        kwargs.pop("memory_format", None)
        data = aten._to_copy(self._data, **kwargs)
        scale = aten._to_copy(self._scale, dtype=dtype or self.dtype, **kwargs)
        return type(self)(self._qtype, self._axis, self.size(), self.stride(), data, scale, self.activation_qtype)

    def _transposed(self) -> WeightQBytesTensor:
        axis = None if self._axis is None else (0 if self._axis == -1 else -1)
        scale = self._scale if self._axis is None else self._scale.t()
        size, stride = self.size()[::-1], self.stride()[::-1]
        return type(self)(self._qtype, axis, size, stride, self._data.t(), scale, self.activation_qtype)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["_data", "_scale"], {
            "qtype": self._qtype.name,
            "axis": str(self._axis),
            "size": str(list(self.size())),
            "stride": str(list(self.stride())),
            "activation_qtype": "none" if self.activation_qtype is None else self.activation_qtype.name,
        }

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):  # type: ignore[no-untyped-def]
        activation = None if meta["activation_qtype"] == "none" else qtypes[meta["activation_qtype"]]
        axis, size, stride = (ast.literal_eval(meta[key]) for key in ("axis", "size", "stride"))
        return cls(qtypes[meta["qtype"]], axis, size, stride, inner["_data"], inner["_scale"], activation)


class WeightQBitsTensor(_Weight, QBitsTensor):
    """A weight of 2- or 4-bit codes: ``scale * data - shift``, or ``scale * (data - shift)`` for an integer shift."""

    @staticmethod
    def __new__(cls, qtype, axis, group_size, size, stride, data, scale, shift, requires_grad=False):  # type: ignore[no-untyped-def]
        if data.device != scale.device or data.device != shift.device:
            raise ValueError(f"codes, scale and shift are on {data.device}, {scale.device} and {shift.device}")
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=scale.dtype, device=data.device, requires_grad=requires_grad
        )

    def __init__(self, qtype, axis, group_size, size, stride, data, scale, shift, requires_grad=False):  # type: ignore[no-untyped-def]
        if type(data) is torch.Tensor:
            data = PackedTensor.pack(data, qtype.bits)
        self._qtype, self._axis, self._group_size = qtype, axis, group_size
        self._data, self._scale, self._shift = data, scale, shift

    @classmethod
    def create(cls, qtype, axis, group_size, size, stride, data, scale, shift, requires_grad=False):  # type: ignore[no-untyped-def]
        """The tensor; there is one class for every device."""
        return cls(qtype, axis, group_size, size, stride, data, scale, shift, requires_grad)

    @classmethod
    def quantize(
        cls,
        base: torch.Tensor,
        qtype: qtype,
        axis: int,
        group_size: int | None,
        scale: torch.Tensor,
        shift: torch.Tensor,
        optimized: bool = True,
    ) -> WeightQBitsTensor:
        """``base`` under scales and shifts along ``axis``, or of its groups."""
        if qtype not in (qint2, qint4):
            raise ValueError(f"WeightQBitsTensor holds qint2 or qint4 codes, found {qtype.name}")

        def make(weight: torch.Tensor) -> WeightQBitsTensor:
            data = quantize_affine(weight, qtype.bits, axis, group_size, scale, shift)
            return cls(qtype, axis, group_size, weight.size(), weight.stride(), data, scale, shift)

        return _Quantize.apply(base, make)

    @classmethod
    def load_from_state_dict(cls, state_dict, prefix, qtype, axis, group_size, size, stride, missing_keys):  # type: ignore[no-untyped-def]
        """Takes a weight out of a state dict; None, and the missing keys, where it is not whole."""
        names = ("_data._data", "_scale", "_shift")
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return None
        shape = torch.Size(size) if group_size is None else torch.Size(grouped_shape(size, axis, group_size))
        strides = torch.empty(shape, device="meta").stride()
        packed = PackedTensor.load_from_state_dict(
            state_dict, prefix + "_data.", qtype.bits, shape, strides, missing_keys
        )
        scale, shift = state_dict.pop(prefix + "_scale"), state_dict.pop(prefix + "_shift")
        return cls(qtype, axis, group_size, size, stride, packed, scale, shift)

    def weight_qbits_tensor(self) -> WeightQBitsTensor:
        """This tensor: it has no other form."""
        return self

    def _values(self) -> torch.Tensor:
        data = self._data.unpack() if isinstance(self._data, PackedTensor) else self._data
        if self._shift.dtype.is_floating_point:
            values = self._scale * data - self._shift
        else:
            values = self._scale * (data.to(torch.int8) - self._shift.to(torch.int8))
        return values if self._axis is None else ungroup(values, self._axis, self.shape)

    def _each(self, change: Any) -> WeightQBitsTensor:
        inner = [change(t) for t in (self._data, self._scale, self._shift)]
        return type(self)(self._qtype, self._axis, self._group_size, self.size(), self.stride(), *inner)

    def _moved(self, dtype: torch.dtype | None = None, **kwargs: Any) -> WeightQBitsTensor:
        kwargs.pop("memory_format", None)
        data = aten._to_copy(self._data, **kwargs)
        scale = aten._to_copy(self._scale, dtype=dtype or self.dtype, **kwargs)
        integer = not self._shift.dtype.is_floating_point
        shift = aten._to_copy(self._shift, dtype=self._shift.dtype if integer else scale.dtype, **kwargs)
        return type(self)(self._qtype, self._axis, self._group_size, self.size(), self.stride(), data, scale, shift)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["_data", "_scale", "_shift"], {
            "qtype": self._qtype.name,
            "axis": str(self._axis),
            "group_size": str(self._group_size),
            "size": str(list(self.size())),
            "stride": str(list(self.stride())),
        }

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):  # type: ignore[no-untyped-def]
        axis, group, size, stride = (ast.literal_eval(meta[k]) for k in ("axis", "group_size", "size", "stride"))
        parts = (inner["_data"], inner["_scale"], inner["_shift"])
        return cls(qtypes[meta["qtype"]], axis, group, size, stride, *parts)


def _rebuild(name: str, inner: dict[str, torch.Tensor], meta: dict[str, str]) -> Any:
    kinds = {"WeightQBytesTensor": WeightQBytesTensor, "WeightQBitsTensor": WeightQBitsTensor}
    return kinds[name].__tensor_unflatten__(inner, meta, None, None)


def quantize_weight(
    t: torch.Tensor,
    qtype: qtype,
    axis: int,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    group_size: int | None = None,
    activation_qtype: qtype | None = None,
    optimized: bool = True,
) -> WeightQBytesTensor | WeightQBitsTensor:
    """A weight quantized along an axis.

    Args:
        t: float tensor.
        qtype: type of the codes; 8 bits take a scale alone, fewer a shift too.
        axis: 0 or -1.
        scale, shift: what an optimizer found.
        group_size: weights that share a scale; below 8 bits only.
        activation_qtype: kept with the tensor.
        optimized: there is one form for every device; accepted and without effect.
    """
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 (first axis) or -1 (last axis), found {axis!r}")
    if qtype.bits == 8:
        if shift is not None:
            raise ValueError("shift cannot be specified for 8-bit qtypes")
        if group_size is not None:
            raise ValueError("group_size cannot be specified for 8-bit qtypes")
        one = None if t.shape[axis] == 1 else axis
        return WeightQBytesTensor.quantize(t, qtype, one, scale, activation_qtype, optimized)
    if shift is None:
        raise ValueError("shift must be specified for qtypes lower than 8-bit")
    return WeightQBitsTensor.quantize(t, qtype, axis, group_size, scale, shift, optimized)
