"""Operators that read the values of a quantized weight and have no implementation on its codes.

A model's own code may do anything with a weight that a layer's forward does not: add a table of positions, standardize a
kernel, cut a matrix into heads. Such an operator runs on the dequantized weight. This is logged once for each weight, since
it takes time and memory at every call.

Only reads are served. An operator that writes into a quantized weight raises, and what looks like a view of one (``view``,
a slice between groups) is a copy that nobody can write into: the change would be lost.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from requanto.runtime.tracing import is_tracing
from requanto.tensor.dispatch import is_view
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)
#: Where `values_of` notes its readers instead of logging them; see `reads_of_values`.
_noted: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("reads", default=None)


@contextlib.contextmanager
def reads_of_values() -> Iterator[list[str]]:
    """Notes which operators read the values of quantized weights, in place of logging them."""
    found: list[str] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


class ReadOnlyValues(torch.Tensor):
    """Values of a quantized weight where torch would return a view of it: reading works, and writing raises.

    An operator on it returns an ordinary tensor, or `ReadOnlyValues` if the result is a view.
    """

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        written = [value for value in _written(func, args, kwargs) if isinstance(value, ReadOnlyValues)]
        if written:
            raise NotImplementedError(
                f"{func} writes into values of shape {tuple(written[0].shape)} that were read from a quantized weight: the "
                f"weight would not change. Call .dequantize() on the weight, and replace it by what you change."
            )
        args, kwargs = pytree.tree_map_only(ReadOnlyValues, _plain, (args, kwargs))
        out = func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, read_only, out) if is_view(func) else out

    # Python's own dispatch would only turn results into this class.
    __torch_function__ = torch._C._disabled_torch_function_impl


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.Tensor._make_subclass(torch.Tensor, tensor)


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as `ReadOnlyValues`; unchanged while a compiler traces, whose graph holds no views of weights."""
    if is_tracing() or type(tensor) is not torch.Tensor:
        return tensor
    return torch.Tensor._make_subclass(ReadOnlyValues, tensor)


def values_of(weight: QTensor, reader: str) -> torch.Tensor:
    """The dequantized weight, for an operator that needs its values. Logged once for each weight.

    Args:
        reader: name of the operator.

    Raises:
        NotImplementedError: an adapter of the weight is trained, whose gradient would be lost.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight.up, weight.down)):
        raise NotImplementedError(
            f"{reader} reads the values of a quantized weight of shape {tuple(weight.shape)} whose adapter is trained: the "
            f"adapter would get no gradient. Leave this layer float (modules_to_not_convert), or out of target_parameters."
        )
    noted = _noted.get()
    if noted is not None:
        noted.append(reader)
        return weight.dequantize()
    storage = weight._storage
    while storage.base is not None:  # of a slice
        storage = storage.base
    if not storage.read_logged:
        storage.read_logged = True
        name = f"{storage.name}, " if storage.name else ""
        logger.warning(
            "%s reads the values of a quantized weight (%s%s %s): it is dequantized at each such call. To leave the layer "
            "float, name it in modules_to_not_convert or exclude.",
            reader,
            name,
            weight.qtype.name.removeprefix("q"),
            "x".join(map(str, weight.shape)),
        )
    return weight.dequantize()


def on_values(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an aten operator on the dequantized weights among its arguments.

    Raises:
        NotImplementedError: the operator writes into a quantized weight.
    """
    if any(isinstance(value, QTensor) for value in _written(func, args, kwargs)):
        raise NotImplementedError(
            f"{func} is not defined on a quantized weight (QTensor): it would write float values into the codes. Call "
            f".dequantize() on the weight, or model.dequantize() on the model, to change the float values."
        )
    args, kwargs = pytree.tree_map_only(QTensor, lambda weight: values_of(weight, str(func)), (args, kwargs))
    out = func(*args, **kwargs)
    return pytree.tree_map_only(torch.Tensor, read_only, out) if is_view(func) else out


def _written(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """The arguments that an operator writes into."""
    found: list[Any] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or index >= len(args) else args[index]
            found += pytree.tree_leaves(value)
    return found


def run_on_values(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a torch function on the dequantized weights among its arguments."""
    reader = getattr(function, "__name__", "") or str(function)
    args, kwargs = pytree.tree_map_only(QTensor, lambda weight: values_of(weight, reader), (args, kwargs))
    return function(*args, **kwargs)
