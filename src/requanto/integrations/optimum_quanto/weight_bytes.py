"""WeightQBytesTensor: optimum-quanto's weight of 8-bit codes."""

from __future__ import annotations

import ast
from typing import Any

import torch

from requanto.dtypes.qtypes import qtype, qtypes
from requanto.integrations.optimum_quanto.base import QBytesTensor
from requanto.integrations.optimum_quanto.library import quantize_symmetric
from requanto.integrations.optimum_quanto.weight_base import Quantize, Weight
from requanto.tensor.qtensor import QTensor as NativeQTensor

aten = torch.ops.aten


class WeightQBytesTensor(Weight, QBytesTensor):
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
        """Returns a new tensor; there are no device-specific classes."""
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
        """Quantizes ``base`` with scales along ``axis``."""
        if qtype.bits != 8:
            raise ValueError(f"WeightQBytesTensor holds 8-bit codes, found {qtype.name}")

        def make(weight: torch.Tensor) -> WeightQBytesTensor:
            data = quantize_symmetric(weight, qtype.dtype, axis, scale)
            return cls(qtype, axis, weight.size(), weight.stride(), data, scale, activation_qtype)

        return Quantize.apply(base, make)

    @classmethod
    def load_from_state_dict(cls, state_dict, prefix, qtype, axis, size, stride, activation_qtype, missing_keys):  # type: ignore[no-untyped-def]
        """Builds the tensor from its parts, popped from the state dict; None if parts are missing (see missing_keys)."""
        absent = [prefix + name for name in ("_data", "_scale") if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return None
        data, scale = state_dict.pop(prefix + "_data"), state_dict.pop(prefix + "_scale")
        return cls(qtype, axis if scale.dim() else None, size, stride, data, scale, activation_qtype)

    def weight_qbytes_tensor(self) -> WeightQBytesTensor:
        """Returns this tensor: there is no device-specific layout."""
        return self

    def as_native(self) -> NativeQTensor | None:
        """Returns a requanto.QTensor that shares the codes' memory; None if scales are not per row."""
        if self.dim() != 2 or self._axis == -1 or self._data.shape != self.shape or not self._data.is_contiguous():
            return None
        scale = self._scale.reshape(-1, 1).expand(self.shape[0], 1).contiguous()
        return NativeQTensor(self._data, scale, None, qtype=self._qtype, shape=self.shape, dtype=self.dtype)

    def _values(self) -> torch.Tensor:
        return self._scale * self._data.to(self._scale.dtype)

    def _map_inner(self, change: Any) -> WeightQBytesTensor:
        data, scale = change(self._data), change(self._scale)
        return type(self)(self._qtype, self._axis, self.size(), self.stride(), data, scale, self.activation_qtype)

    def _converted(self, dtype: torch.dtype | None = None, **kwargs: Any) -> WeightQBytesTensor:
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
