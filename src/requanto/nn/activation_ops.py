"""aten operators that return a quantized activation; all others run through :func:`in_float`."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from requanto.nn.activation import QActivation

aten = torch.ops.aten

#: operator packet -> implementation(op, *args, **kwargs)
OPS: dict[Any, Callable] = {}


def implements(*operators: Any) -> Callable[[Callable], Callable]:
    """Registers ``implementation(op, *args, **kwargs)`` for aten operator packets."""

    def add(implementation: Callable) -> Callable:
        for operator in operators:
            OPS[operator] = implementation
        return implementation

    return add


def in_float(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator on the dequantized arguments."""
    args, kwargs = pytree.tree_map_only(QActivation, lambda t: t.dequantize(), (args, kwargs))
    return op(*args, **kwargs)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (type(value) is torch.Tensor and value.dim() == 0)


def _alike(one: Any, two: Any) -> bool:
    """True for two activations of one type and scale, whose codes can be compared or concatenated."""
    both = isinstance(one, QActivation) and isinstance(two, QActivation)
    return both and one.qtype == two.qtype and torch.equal(one._scale, two._scale)


@implements(aten._to_copy, aten.to)
def _to_copy(op: Any, t: QActivation, dtype: torch.dtype | None = None, **kwargs: Any) -> QActivation:
    """A dtype changes that of the scale, not that of the codes."""
    data = op(t._data, dtype=t._data.dtype, **kwargs)
    kwargs.pop("memory_format", None)
    return t.with_data(data, op(t._scale, dtype=dtype or t._scale.dtype, **kwargs))


@implements(aten.detach, aten.alias)
def _detach(op: Any, t: QActivation) -> QActivation:
    return t.with_data(op(t._data), op(t._scale))


@implements(aten.clone)
def _clone(op: Any, t: QActivation, memory_format: Any = torch.preserve_format) -> QActivation:
    return t.with_data(op(t._data, memory_format=memory_format), t._scale.clone())


@implements(aten.copy_)
def _copy_(op: Any, target: QActivation, source: Any, *rest: Any) -> QActivation:
    if not isinstance(source, QActivation) or source.qtype != target.qtype:
        raise NotImplementedError("copy_ into a quantized activation needs another one of the same type")
    op(target._data, source._data)
    op(target._scale, source._scale)
    return target


@implements(aten.cat, aten.stack)
def _join(op: Any, tensors: list[Any], dim: int = 0) -> Any:
    first = tensors[0]
    if all(_alike(first, t) for t in tensors) and not first.qtype.is_floating_point:
        return first.with_data(op([t._data for t in tensors], dim))
    return in_float(op, tensors, dim)


@implements(aten.lt, aten.gt, aten.le, aten.ge)
def _compare(op: Any, one: Any, two: Any) -> torch.Tensor:
    if _alike(one, two) and not one.qtype.is_floating_point:
        return op(one._data, two._data)
    return in_float(op, one, two)


@implements(aten.mul)
def _mul(op: Any, one: Any, two: Any) -> Any:
    if isinstance(two, QActivation) and _is_number(one):
        return two.with_data(two._data, one * two._scale)
    if isinstance(one, QActivation) and _is_number(two):
        return one.with_data(one._data, two * one._scale)
    return in_float(op, one, two)


@implements(aten.div)
def _div(op: Any, one: Any, two: Any, **kwargs: Any) -> Any:
    if isinstance(one, QActivation) and _is_number(two) and not kwargs:
        return one.with_data(one._data, op(one._scale, two))
    return in_float(op, one, two, **kwargs)


@implements(aten.neg)
def _neg(op: Any, t: QActivation) -> Any:
    # -(-128) overflows int8.
    if t.qtype.is_floating_point or bool((t._data == -128).any()):
        return in_float(op, t)
    return t.with_data(op(t._data))


@implements(aten.relu)
def _relu(op: Any, t: QActivation) -> Any:
    return in_float(op, t) if t.qtype.is_floating_point else t.with_data(op(t._data))


@implements(
    aten.expand, aten.permute, aten.select, aten.slice, aten.unsqueeze, aten.squeeze,
    aten.transpose, aten.t, aten.view, aten._unsafe_view,
)  # fmt: skip
def _moved(op: Any, t: QActivation, *args: Any, **kwargs: Any) -> QActivation:
    return t.with_data(op(t._data, *args, **kwargs))


@implements(aten.split, aten.split_with_sizes)
def _split(op: Any, t: QActivation, *args: Any, **kwargs: Any) -> list[QActivation]:
    return [t.with_data(part) for part in op(t._data, *args, **kwargs)]


@implements(aten.is_same_size)
def _is_same_size(op: Any, one: Any, two: Any) -> bool:
    return op(*[t._data if isinstance(t, QActivation) else t for t in (one, two)])


@implements(aten._softmax)
def _softmax(op: Any, t: QActivation, dim: int, half_to_float: bool) -> QActivation:
    # Probabilities are in 0 .. 1: map 1 to the largest code.
    scale = torch.tensor(1 / t.qtype.qmax, dtype=t._scale.dtype, device=t.device)
    return type(t).quantize(op(t.dequantize(), dim, half_to_float), t.qtype, scale)


@implements(aten.bmm)
def _bmm(op: Any, one: Any, two: Any) -> torch.Tensor:
    both = isinstance(one, QActivation) and isinstance(two, QActivation)
    if not both or one.qtype.is_floating_point or two.qtype.is_floating_point:
        return in_float(op, one, two)
    # Sums of products of int8 codes are exact in float32 for all usual head sizes.
    out = op(one._data.float(), two._data.float())
    return (out * (one._scale.float() * two._scale.float())).to(one.dtype)


@implements(aten.where)
def _where(op: Any, condition: Any, one: Any, two: Any) -> Any:
    if not isinstance(one, QActivation) or isinstance(condition, QActivation) or isinstance(two, QActivation):
        return in_float(op, condition, one, two)
    return type(one).quantize(op(condition, one.dequantize(), two), one.qtype, one._scale)
