"""In-place `add_` and `sub_` on a quantized weight, and views of a weight whose low-rank term is trained.

`add_` and `sub_` store a change of low rank exactly, as a low-rank term; any other raises (`requanto.tensor.lowrank`).

A trained term (PEFT's ``target_parameters``) has factors that require gradients. Views of such a weight are implemented as
torch functions, since the aten operators run below autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from requanto.tensor.aten import aten, map_parts
from requanto.tensor.dispatch import ATEN, NeedsValues, implements_aten, implements_function
from requanto.tensor.lowrank import add_dense
from requanto.tensor.qtensor import QTensor


@implements_aten(aten.add_.Tensor, aten.sub_.Tensor)
def _add_(func: Any, args: tuple, kwargs: dict) -> QTensor:
    weight, delta = args
    if not isinstance(weight, QTensor):
        raise NeedsValues("a quantized weight is added into a float tensor")
    if not isinstance(delta, torch.Tensor) or isinstance(delta, QTensor):
        raise NotImplementedError("only a float tensor can be added to a quantized weight")
    sign = kwargs.get("alpha", 1) * (1 if func is aten.add_.Tensor else -1)
    add_dense(weight, delta, float(sign))
    return weight


@implements_function(torch.isfinite, torch.Tensor.isfinite)
def _isfinite(self: QTensor) -> torch.Tensor:
    """isfinite of the dequantized weight; PEFT's ``safe_merge`` calls it."""
    return torch.isfinite(self.dequantize(torch.float32))


def _has_trained_term(tensor: Any) -> bool:
    return (
        isinstance(tensor, QTensor)
        and tensor.up is not None
        and (
            tensor.up.requires_grad or tensor.down.requires_grad  # type: ignore[union-attr]
        )
    )


def _register(function: Any, differentiable: Callable[..., Any]) -> None:
    """Registers ``differentiable(tensor, *args)`` for weights with a trained term; other weights use the aten operator."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if _has_trained_term(args[0]):
            return differentiable(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    implements_function(function)(run)


def _swap(tensor: QTensor, one: int = -1, two: int = -2) -> QTensor:
    last = {tensor.dim() - 1, tensor.dim() - 2}
    if {one % tensor.dim(), two % tensor.dim()} != last:
        raise NotImplementedError(f"only the last two axes of a quantized weight can be swapped, found {one} and {two}")
    return tensor.view_of_storage(transposed=not tensor.transposed)


def _getitem(tensor: QTensor, index: Any) -> Any:
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype != torch.bool:
        index = int(index)
    if isinstance(index, int) and tensor.axis == 1:
        return map_parts(tensor, lambda t: t[index], keep=tensor.shared_along(0), shape=tensor.shape[1:], axis=0)
    if isinstance(index, torch.Tensor) and index.dim() == 1 and tensor.axis == 1:
        plain = ATEN[aten.index.Tensor](aten.index.Tensor, (tensor.without_lowrank(), [index]), {})
        return plain.with_inner({**plain.inner_tensors(), "up": tensor.up[index], "down": tensor.down[index]})  # type: ignore[index]
    raise NotImplementedError(
        f"a quantized weight of shape {tuple(tensor.shape)} whose adapter is trained can be indexed by one expert or "
        f"a 1D tensor of experts only, found {index!r}"
    )


_register(torch.Tensor.__getitem__, _getitem)
_register(torch.Tensor.select, lambda tensor, dim, index: _getitem(tensor, index) if dim == 0 else _refuse("select"))
_register(torch.Tensor.unbind, lambda tensor, dim=0: tuple(_getitem(tensor, i) for i in range(tensor.shape[0])))
_register(torch.Tensor.transpose, _swap)
_register(torch.transpose, _swap)
_register(torch.Tensor.t, _swap)
_register(torch.t, _swap)
_register(torch.Tensor.T.__get__, _swap)  # type: ignore[attr-defined]
_register(torch.Tensor.mT.__get__, _swap)  # type: ignore[attr-defined]
_register(torch.Tensor.contiguous, lambda tensor: tensor)


def _refuse(what: str) -> Any:
    raise NotImplementedError(f"{what} of a quantized weight whose adapter is trained")
