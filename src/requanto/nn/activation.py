"""QActivation: an activation quantized per tensor, on its way from one module to the next.

Codes and one scale. Operators that only move values (views, slices, concatenations of one scale), and those that leave a
scale meaningful (a product with a number, relu, softmax), give a QActivation again; a product with a quantized weight takes
it as it is; every other operator computes in float on the values it stands for. (Operators after optimum-quanto 0.2.7.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from requanto.dtypes.qtypes import qtype, qtypes
from requanto.scales.quanto import symmetric_codes
from requanto.tensor.qtensor import QTensor


class QActivation(torch.Tensor):
    """An activation under quantization; make one with :func:`quantize_activation`.

    Its dtype is the scale's: the float dtype it stands for.
    """

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
        """``base`` under a scalar scale; its gradient passes straight through."""
        return _Quantize.apply(cls, base, qtype, scale)

    def dequantize(self) -> torch.Tensor:
        """The float values, with the gradient passing straight through."""
        return _Dequantize.apply(self)

    def numpy(self) -> Any:
        return self.dequantize().cpu().numpy()

    def with_data(self, data: torch.Tensor, scale: torch.Tensor | None = None) -> QActivation:
        """Other codes of the same type and (unless given) scale."""
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
            # Products with a quantized weight take float inputs; only `QLinear` hands codes on.
            args, kwargs = pytree.tree_map_only(QActivation, lambda t: t.dequantize(), (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from requanto.nn.activation_ops import OPS, in_float

        packet = func.overloadpacket
        kept = OPS.get(packet)
        if kept is not None:
            return kept(packet, *args, **(kwargs or {}))
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
    """``t`` quantized to 8 bits under one scale.

    Args:
        t: float tensor.
        qtype: int8 or float8.
        scale: one number, as a tensor; codes are ``round(t / scale)``.
    """
    if scale.numel() != 1:
        raise ValueError(f"activations have one scale for the tensor, found {scale.numel()} scales")
    return QActivation.quantize(t, qtype, scale)
