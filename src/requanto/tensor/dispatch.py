"""Registries of the operators on QTensor (filled by `requanto.tensor.ops`), and the dispatch to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class NeedsValues(NotImplementedError):
    """Raised by the implementation of an operator where it is not possible on the codes, only on the values."""


ATEN: dict[Any, Callable] = {}
FUNCTIONS: dict[Any, Callable] = {}

#: runs torch functions instead of `torch_function` while code reads weights as floats (`requanto.tensor.reading`)
reader: Callable[[Any, tuple, dict], Any] | None = None


def implements_aten(*operators: Any) -> Callable[[Callable], Callable]:
    """Registers ``implementation(func, args, kwargs)`` for aten operator overloads."""

    def register(implementation: Callable) -> Callable:
        for operator in operators:
            ATEN[operator] = implementation
        return implementation

    return register


def implements_function(*functions: Any) -> Callable[[Callable], Callable]:
    """Registers ``implementation(*args, **kwargs)`` for torch functions."""

    def register(implementation: Callable) -> Callable:
        for function in functions:
            FUNCTIONS[function] = implementation
        return implementation

    return register


def torch_function(func: Any, types: Any, args: tuple, kwargs: dict | None) -> Any:
    """Runs a torch function with a QTensor among its arguments."""
    if reader is not None:
        return reader(func, args, kwargs or {})
    implementation = FUNCTIONS.get(func)  # as `run_function`, without its call: this runs before every GEMM
    if implementation is not None and not kwargs:
        return implementation(*args)
    return run_function(func, args, kwargs or {})


def run_function(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs a torch function by its registered implementation, or by the aten operators that it calls."""
    implementation = FUNCTIONS.get(func)
    if implementation is not None:
        return implementation(*args, **kwargs) if kwargs else implementation(*args)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def torch_dispatch(func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an aten operator with a QTensor among its arguments.

    An operator without an implementation on the codes runs on the dequantized weight (`requanto.tensor.values`).

    Raises:
        NotImplementedError: the operator would write float values into the codes.
    """
    # In inference mode composite operators arrive undecomposed; autograd decomposes them otherwise.
    if func not in ATEN and func._can_decompose():
        return func.decompose(*args, **kwargs)
    if torch.is_inference_mode_enabled() and is_view(func) and not args[0].is_inference():
        # A view of a normal tensor must share its version counter; tensors made in inference mode have none.
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs)
    return _run(func, args, kwargs)


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    implementation = ATEN.get(func)
    if implementation is not None:
        try:
            return implementation(func, args, kwargs)
        except NeedsValues:
            pass
    from requanto.tensor.values import on_values  # which imports QTensor

    return on_values(func, args, kwargs)


@functools.cache
def is_view(operator: Any) -> bool:
    """True for operators that return a view of an argument and write to none."""
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
