"""Base classes of optimum-quanto's quantized tensors, and PackedTensor."""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch.utils import _pytree as pytree

from requanto.dtypes.qtypes import qtype
from requanto.scales.quanto import pack_split, unpack_split

aten = torch.ops.aten

#: optimum-quanto's name of the function
pack_weights = pack_split


def qfallback(callable: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function with every quantized tensor among its arguments dequantized."""
    args, kwargs = pytree.tree_map_only(QTensor, lambda t: t.dequantize(), (args, kwargs))
    return callable(*args, **kwargs)


class QTensor(torch.Tensor):
    """Base of optimum-quanto's quantized tensors."""

    _qtype: qtype
    _axis: int | None

    @property
    def qtype(self) -> qtype:
        return self._qtype

    @property
    def axis(self) -> int | None:
        return self._axis

    def dequantize(self) -> torch.Tensor:
        """Returns the float values."""
        raise NotImplementedError(f"{type(self).__name__} must define dequantize()")

    def numpy(self) -> Any:
        return self.dequantize().detach().cpu().numpy()

    def save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Adds the inner tensors to a state dict, packed ones under their own ``_data``."""
        _save_inner(self, destination, prefix, keep_vars)

    def equal(self, other: Any) -> bool:
        """Whether class, attributes, codes and scales are equal."""
        if type(self) is not type(other):
            return False
        names, meta = self.__tensor_flatten__()
        if meta != other.__tensor_flatten__()[1]:
            return False
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)


def _save_inner(tensor: Any, destination: dict, prefix: str, keep_vars: bool) -> None:
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if type(inner) is torch.Tensor:
            destination[prefix + name] = inner if keep_vars else inner.detach()
        else:
            _save_inner(inner, destination, f"{prefix}{name}.", keep_vars)


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    if isinstance(one, PackedTensor):
        one, two = one._data, two._data
    if one.is_floating_point() and one.element_size() == 1:  # float8 has no equal()
        one, two = one.view(torch.uint8), two.view(torch.uint8)
    return torch.equal(one, two)


class QBytesTensor(QTensor):
    """8-bit codes and their scale."""


class QBitsTensor(QTensor):
    """2- or 4-bit codes, packed, with scale and shift."""


class PackedTensor(torch.Tensor):
    """Codes of 2 or 4 bits, seen as uint8, bit-packed along the first axis (`scales.quanto.pack_split`)."""

    @staticmethod
    def __new__(
        cls, data: torch.Tensor, bits: int, size: Any, stride: Any, requires_grad: bool = False
    ) -> PackedTensor:
        if data.dtype != torch.uint8:
            raise TypeError(f"packed codes must be uint8, found {data.dtype}")
        if requires_grad:
            raise ValueError("packed codes cannot require a gradient")
        return torch.Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=torch.uint8, device=data.device)

    def __init__(self, data: torch.Tensor, bits: int, size: Any, stride: Any, requires_grad: bool = False) -> None:
        self._bits, self._data = bits, data

    @classmethod
    def pack(cls, t: torch.Tensor, bits: int = 4) -> PackedTensor:
        """Packs unsigned codes; uint8, each below ``2 ** bits``."""
        if bits not in (2, 4):
            raise ValueError(f"bits must be 2 or 4, found {bits}")
        if t.dtype != torch.uint8:
            raise TypeError(f"codes to pack must be uint8, found {t.dtype}")
        return cls(pack_split(t, bits), bits, t.size(), t.stride())

    def unpack(self) -> torch.Tensor:
        """Returns the codes, uint8, in the tensor's own shape."""
        return unpack_split(self._data, self._bits)[: self.shape[0]]

    @property
    def bits(self) -> int:
        return self._bits

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def numpy(self) -> Any:
        return self.unpack().cpu().numpy()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedTensor({self._data}, bits={self._bits}, public_dtype={self.dtype})"

    @staticmethod
    def load_from_state_dict(
        state_dict: dict, prefix: str, bits: int, size: Any, stride: Any, missing_keys: list[str]
    ) -> PackedTensor | None:
        """Builds the tensor from ``<prefix>_data``, popped from the state dict; None if missing (added to missing_keys)."""
        if prefix + "_data" not in state_dict:
            missing_keys.append(prefix + "_data")
            return None
        return PackedTensor(state_dict.pop(prefix + "_data"), bits, torch.Size(size), tuple(stride))

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["_data"], {"bits": str(self._bits), "size": str(list(self.size())), "stride": str(self.stride())}

    @staticmethod
    def __tensor_unflatten__(inner: dict, meta: dict[str, str], outer_size: Any, outer_stride: Any) -> PackedTensor:
        size, stride = ast.literal_eval(meta["size"]), ast.literal_eval(meta["stride"])
        return PackedTensor(inner["_data"], ast.literal_eval(meta["bits"]), size, stride)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket
        if op in (aten.detach, aten.clone, aten.alias):
            t = args[0]
            return cls(op(t._data), t._bits, t.size(), t.stride())
        if op in (aten._to_copy, aten.to):
            t = args[0]
            if kwargs.get("dtype", torch.uint8) != torch.uint8:
                raise ValueError(f"packed codes are uint8 and cannot become {kwargs['dtype']}; unpack() them first")
            kwargs.pop("memory_format", None)
            return cls(op(t._data, **kwargs), t._bits, t.size(), t.stride())
        args, kwargs = pytree.tree_map_only(PackedTensor, lambda t: t.unpack(), (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> PackedTensor:
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return PackedTensor, (self._data, self._bits, tuple(self.size()), tuple(self.stride()))
