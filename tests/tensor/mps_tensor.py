"""A stand-in for a tensor on MPS: its data is on the CPU, its device says "mps", and it refuses what MPS refuses.

Torch on MPS (`aten/src/ATen/native/mps`) has no float64, and of float8 tensors only views, and copies without conversion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
#: What MPS does with float8 tensors: nothing that reads a value.
ON_BYTES = {
    aten.view.dtype, aten.view.default, aten._unsafe_view.default, aten.detach.default, aten.alias.default,
    aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.as_strided.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.split.Tensor, aten.empty.memory_format, aten.new_empty.default,
    aten.empty_like.default, aten.clone.default, aten.copy_.default,
}  # fmt: skip


class MpsTensor(torch.Tensor):
    """Wraps a CPU tensor; every result of an operator is wrapped too."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> MpsTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cpu",
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # only as Python sees it: torch built without MPS has no device guard for it
        return torch.device("mps")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        target = (kwargs or {}).get("device")
        given = tree_map(lambda t: t.inner if isinstance(t, MpsTensor) else t, (args, kwargs or {}))
        out = func(*given[0], **given[1])
        leaves = [t for t in (*tree_leaves(given), *tree_leaves(out)) if isinstance(t, torch.Tensor)]
        dtypes = {t.dtype for t in leaves}
        if torch.float64 in dtypes:
            raise TypeError(f"{func}: MPS has no float64")
        conversion = func is aten.copy_.default and len(dtypes) > 1
        if dtypes & set(FLOAT8) and (func not in ON_BYTES or conversion):
            raise TypeError(f"{func}: trying to convert float8 to the MPS backend, which has no such dtype")
        if target is not None and torch.device(target).type == "cpu":
            return out
        return tree_map(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, out)


#: Functions with an argument that may be a device.
MOVES = ("tensor", "empty", "zeros", "ones", "full", "arange", "linspace")


def install(monkeypatch: Any) -> None:
    """While the test runs, a device "mps" makes such tensors: of torch's factories, and of ``Tensor.to``."""
    for owner, name in (*((torch, name) for name in MOVES), (torch.Tensor, "to")):
        monkeypatch.setattr(owner, name, _moving(getattr(owner, name)))


def _moving(func: Any) -> Any:
    def moving(*args: Any, **kwargs: Any) -> Any:
        is_mps = [isinstance(value, torch.device) and value.type == "mps" for value in (*args, *kwargs.values())]
        if not any(is_mps):
            return func(*args, **kwargs)
        given = tree_map(
            lambda value: torch.device("cpu") if isinstance(value, torch.device) else value, (args, kwargs)
        )
        given = tree_map(lambda t: t.inner if isinstance(t, MpsTensor) else t, given)
        return MpsTensor(func(*given[0], **given[1]))

    return moving


def on_mps(tensor: torch.Tensor | None) -> MpsTensor | None:
    return None if tensor is None else MpsTensor(tensor)
