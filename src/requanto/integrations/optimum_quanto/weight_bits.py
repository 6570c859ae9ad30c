"""WeightQBitsTensor: optimum-quanto's weight of 2- and 4-bit codes."""

from __future__ import annotations

import ast
from typing import Any

import torch

from requanto.dtypes.qtypes import qint2, qint4, qtype, qtypes
from requanto.integrations.optimum_quanto.base import PackedTensor, QBitsTensor
from requanto.integrations.optimum_quanto.library import quantize_affine
from requanto.integrations.optimum_quanto.weight_base import Quantize, Weight
from requanto.scales.quanto import grouped_shape, ungroup

aten = torch.ops.aten


class WeightQBitsTensor(Weight, QBitsTensor):
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
        """Returns a new tensor; there are no device-specific classes."""
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
        """Quantizes ``base`` with scales and shifts along ``axis``, or of its groups."""
        if qtype not in (qint2, qint4):
            raise ValueError(f"WeightQBitsTensor holds qint2 or qint4 codes, found {qtype.name}")

        def make(weight: torch.Tensor) -> WeightQBitsTensor:
            data = quantize_affine(weight, qtype.bits, axis, group_size, scale, shift)
            return cls(qtype, axis, group_size, weight.size(), weight.stride(), data, scale, shift)

        return Quantize.apply(base, make)

    @classmethod
    def load_from_state_dict(cls, state_dict, prefix, qtype, axis, group_size, size, stride, missing_keys):  # type: ignore[no-untyped-def]
        """Builds the tensor from its parts, popped from the state dict; None if parts are missing (see missing_keys)."""
        names = ("_data._data", "_scale", "_shift")
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return None
        shape = torch.Size(size) if group_size is None else torch.Size(grouped_shape(size, axis, group_size))
        strides = torch.empty(shape, dtype=torch.uint8, device="meta").stride()
        packed = PackedTensor.load_from_state_dict(
            state_dict, prefix + "_data.", qtype.bits, shape, strides, missing_keys
        )
        scale, shift = state_dict.pop(prefix + "_scale"), state_dict.pop(prefix + "_shift")
        return cls(qtype, axis, group_size, size, stride, packed, scale, shift)

    def weight_qbits_tensor(self) -> WeightQBitsTensor:
        """Returns this tensor: there is no device-specific layout."""
        return self

    def _values(self) -> torch.Tensor:
        data = self._data.unpack() if isinstance(self._data, PackedTensor) else self._data
        if self._shift.dtype.is_floating_point:
            values = self._scale * data - self._shift
        else:
            values = self._scale * (data.to(torch.int8) - self._shift.to(torch.int8))
        return values if self._axis is None else ungroup(values, self._axis, self.shape)

    def _map_inner(self, change: Any) -> WeightQBitsTensor:
        inner = [change(t) for t in (self._data, self._scale, self._shift)]
        return type(self)(self._qtype, self._axis, self._group_size, self.size(), self.stride(), *inner)

    def _converted(self, dtype: torch.dtype | None = None, **kwargs: Any) -> WeightQBitsTensor:
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
