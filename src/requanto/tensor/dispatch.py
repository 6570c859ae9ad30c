"""Registries of the operators on QTensor (filled by `requanto.tensor.ops`), and the dispatch to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

ATEN: dict[Any, Callable] = {}
FUNCTIONS: dict[Any, Callable] = {}


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
    implementation = FUNCTIONS.get(func)
    if implementation is not None:
        return implementation(*args, **kwargs) if kwargs else implementation(*args)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))


def torch_dispatch(func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an aten operator with a QTensor among its arguments.

    Raises:
        NotImplementedError: the operator is not registered.
    """
    implementation = ATEN.get(func)
    if implementation is None:
        # In inference mode composite operators arrive undecomposed; autograd decomposes them otherwise.
        if func._can_decompose():
            return func.decompose(*args, **kwargs)
        raise NotImplementedError(
            f"{func} is not defined on a quantized weight (QTensor). If the float values are what you want, call "
            f".dequantize() on the weight, or model.dequantize() on the model; nothing is dequantized silently."
        )
    if torch.is_inference_mode_enabled() and is_view(func) and not args[0].is_inference():
        # A view of a normal tensor must share its version counter; tensors made in inference mode have none.
        with torch.inference_mode(False), torch.no_grad():
            return implementation(func, args, kwargs)
    return implementation(func, args, kwargs)


@functools.cache
def is_view(operator: Any) -> bool:
    """True for operators that return a view of an argument and write to none."""
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)
