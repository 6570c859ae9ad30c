"""Changing a quantized weight in place, and reading a weight whose low-rank term is in training.

`add_` and `sub_` keep a change of low rank exactly, beside the codes; any other is refused (`requanto.tensor.lowrank`).

A term in training (PEFT's ``target_parameters``) has factors that need gradients. Views of such a weight are taken here,
at the level of torch functions: below it, in the aten table, autograd has already been left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from requanto.tensor.aten import aten, each
from requanto.tensor.dispatch import ATEN, implements_aten, implements_function
from requanto.tensor.lowrank import add_dense
from requanto.tensor.qtensor import QTensor


@implements_aten(aten.add_.Tensor, aten.sub_.Tensor)
def _add_(func: Any, args: tuple, kwargs: dict) -> QTensor:
    weight, delta = args
    if not isinstance(weight, QTensor):
        raise NotImplementedError("adding a quantized weight into a float tensor: call .dequantize() on it first")
    if not isinstance(delta, torch.Tensor) or isinstance(delta, QTensor):
        raise NotImplementedError("only a float tensor can be added to a quantized weight")
    sign = kwargs.get("alpha", 1) * (1 if func is aten.add_.Tensor else -1)
    add_dense(weight, delta, float(sign))
    return weight


@implements_function(torch.isfinite, torch.Tensor.isfinite)
def _isfinite(self: QTensor) -> torch.Tensor:
    """PEFT's ``safe_merge`` asks for it."""
    return torch.isfinite(self.dequantize(torch.float32))


def _trains(tensor: Any) -> bool:
    return (
        isinstance(tensor, QTensor)
        and tensor.up is not None
        and (
            tensor.up.requires_grad or tensor.down.requires_grad  # type: ignore[union-attr]
        )
    )


def _view(function: Any, direct: Callable[..., Any]) -> None:
    """Registers ``direct(tensor, *args)`` for weights in training; others go their usual way."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if _trains(args[0]):
            return direct(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    implements_function(function)(run)


def _swap(tensor: QTensor, one: int = -1, two: int = -2) -> QTensor:
    last = {tensor.dim() - 1, tensor.dim() - 2}
    if {one % tensor.dim(), two % tensor.dim()} != last:
        raise NotImplementedError(f"only the last two axes of a quantized weight can be swapped, found {one} and {two}")
    return tensor.over_same_storage(transposed=not tensor.transposed)


def _getitem(tensor: QTensor, index: Any) -> Any:
    if isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype != torch.bool:
        index = int(index)
    if isinstance(index, int) and tensor.axis == 1:
        return each(tensor, lambda t: t[index], keep=tensor.shared_along(0), shape=tensor.shape[1:], axis=0)
    if isinstance(index, torch.Tensor) and index.dim() == 1 and tensor.axis == 1:
        plain = ATEN[aten.index.Tensor](aten.index.Tensor, (tensor.without_lowrank(), [index]), {})
        return plain.with_inner({**plain.inner_tensors(), "up": tensor.up[index], "down": tensor.down[index]})  # type: ignore[index]
    raise NotImplementedError(
        f"a quantized weight of shape {tuple(tensor.shape)} whose adapter is in training can be indexed by one expert or "
        f"a 1D tensor of experts only, found {index!r}"
    )


_view(torch.Tensor.__getitem__, _getitem)
_view(torch.Tensor.select, lambda tensor, dim, index: _getitem(tensor, index) if dim == 0 else _refuse("select"))
_view(torch.Tensor.unbind, lambda tensor, dim=0: tuple(_getitem(tensor, i) for i in range(tensor.shape[0])))
_view(torch.Tensor.transpose, _swap)
_view(torch.transpose, _swap)
_view(torch.Tensor.t, _swap)
_view(torch.t, _swap)
_view(torch.Tensor.T.__get__, _swap)  # type: ignore[attr-defined]
_view(torch.Tensor.mT.__get__, _swap)  # type: ignore[attr-defined]
_view(torch.Tensor.contiguous, lambda tensor: tensor)


def _refuse(what: str) -> Any:
    raise NotImplementedError(f"{what} of a quantized weight whose adapter is in training")
