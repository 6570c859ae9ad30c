"""QActivation: an activation quantized per tensor, which one module passes to the next.

It consists of codes and one scale. Operators that only move values (views, slices, concatenations of one scale), and some
that keep or change the scale (multiplication by a number, relu, softmax), return a QActivation. GEMMs with a quantized
weight use the codes. All other operators compute in float on the dequantized values. (Operators as in optimum-quanto 0.2.7.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from requanto.dtypes.qtypes import qtype, qtypes
from requanto.scales.quanto import symmetric_codes
from requanto.tensor.qtensor import QTensor


class QActivation(torch.Tensor):
    """A quantized activation; :func:`quantize_activation` creates one. Its dtype is that of the scale."""

    _data: torch.Tensor
    _scale: torch.Tensor
    _qtype: qtype

    @staticmethod
    def __new__(
        cls,
        qtype: qtype,
        size: torch.Size,
        stride: tuple[int, ...],
        data: torch.Tensor,
        scale: torch.Tensor,
        requires_grad: bool = False,
    ) -> QActivation:
        if data.device != scale.device:
            raise ValueError(f"codes are on {data.device}, their scale on {scale.device}")
        return torch.Tensor._make_wrapper_subclass(
            cls, size, strides=stride, dtype=scale.dtype, device=data.device, requires_grad=requires_grad
        )

    def __init__(
        self,
        qtype: qtype,
        size: torch.Size,
        stride: tuple[int, ...],
        data: torch.Tensor,
        scale: torch.Tensor,
        requires_grad: bool = False,
    ) -> None:
        self._qtype, self._data, self._scale = qtype, data, scale

    @property
    def qtype(self) -> qtype:
        return self._qtype

    @property
    def axis(self) -> None:
        """Always None: one scale for the whole tensor."""
        return None

    @classmethod
    def quantize(cls, base: torch.Tensor, qtype: qtype, scale: torch.Tensor) -> QActivation:
        """``base`` quantized with a scalar scale; straight-through gradient."""
        return _Quantize.apply(cls, base, qtype, scale)

    def dequantize(self) -> torch.Tensor:
        """The float values; straight-through gradient."""
        return _Dequantize.apply(self)

    def numpy(self) -> Any:
        return self.dequantize().cpu().numpy()

    def with_data(self, data: torch.Tensor, scale: torch.Tensor | None = None) -> QActivation:
        """A QActivation of the same type with other codes and, if given, another scale."""
        return type(self)(self._qtype, data.size(), data.stride(), data, self._scale if scale is None else scale)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({self._data}, scale={self._scale}, dtype={self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["_data", "_scale"], {
            "qtype": self._qtype.name,
            "size": str(list(self.size())),
            "stride": str(list(self.stride())),
        }

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], meta: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> QActivation:
        data = inner["_data"]
        return cls(qtypes[meta["qtype"]], data.size(), data.stride(), data, inner["_scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, QTensor) for kind in types):
            # GEMMs with a quantized weight take float inputs; only `QLinear` passes the static scale.
            args, kwargs = pytree.tree_map_only(QActivation, lambda t: t.dequantize(), (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from requanto.nn.activation_ops import OPS, in_float

        packet = func.overloadpacket
        implementation = OPS.get(packet)
        if implementation is not None:
            return implementation(packet, *args, **(kwargs or {}))
        return in_float(packet, *args, **(kwargs or {}))


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cls: type, base: torch.Tensor, kind: qtype, scale: torch.Tensor) -> QActivation:  # type: ignore[override]
        if kind.bits != 8:
            raise ValueError(f"activations are quantized to 8 bits, found {kind.name}")
        if scale.dim() > 0:
            raise ValueError(f"an activation has one scalar scale, found shape {tuple(scale.shape)}")
        data = symmetric_codes(base, kind.dtype, scale)
        return cls(kind, base.size(), base.stride(), data, scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        return None, grad, None, None


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: QActivation) -> torch.Tensor:  # type: ignore[override]
        return tensor._scale * tensor._data.to(tensor._scale.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


def quantize_activation(t: torch.Tensor, qtype: qtype, scale: torch.Tensor) -> QActivation:
    """``t`` quantized to 8 bits with one scale.

    Args:
        t: float tensor.
        qtype: int8 or float8.
        scale: tensor with one element; codes are ``round(t / scale)``.
    """
    if scale.numel() != 1:
        raise ValueError(f"activations have one scale for the tensor, found {scale.numel()} scales")
    return QActivation.quantize(t, qtype, scale)
