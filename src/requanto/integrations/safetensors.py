"""safetensors' own functions on state dicts with quantized weights: ``save_file``, ``save_model``, ``load_file`` ...

A quantized weight is written as its parts and a description (`requanto.checkpoint.state_dict`), and read as a QTensor. The
functions that write are patched in what they call, so that references to them from before ``import requanto`` work too.
A reference to ``load_file`` from before returns the parts, which ``load_state_dict`` joins.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from requanto.checkpoint.state_dict import flatten_described, join_described
from requanto.tensor.qtensor import QTensor


def register() -> None:
    """Patches ``safetensors.torch``; called after it is imported."""
    import safetensors.torch as library

    if hasattr(library._find_shared_tensors, "_requanto"):
        return
    for name in ("_flatten_as_ptr", "_flatten"):  # newer, older versions
        if hasattr(library, name):
            setattr(library, name, _wrap_flatten(getattr(library, name)))
    for name in ("_find_shared_tensors", "_remove_duplicate_names"):
        _replace(library, name, _wrap_shared)
    for name in ("load_file", "load"):
        _replace(library, name, _wrap_load)


def _replace(library: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replaces a function in its module and in all modules that imported it, under whatever name."""
    original = getattr(library, name)
    new = make(original)
    new._requanto = True  # type: ignore[attr-defined]
    setattr(library, name, new)
    for module in list(sys.modules.values()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, attribute, new)


def _wrap_flatten(original: Callable) -> Callable:
    @functools.wraps(original)
    def flatten(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensors, dict) and any(isinstance(value, QTensor) for value in tensors.values()):
            tensors = flatten_described(tensors)
        return original(tensors, *args, **kwargs)

    return flatten


def _wrap_shared(original: Callable) -> Callable:
    """Functions that find tensors in the same memory: a quantized weight has that of its codes."""

    @functools.wraps(original)
    def run(state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return original({name: _memory(tensor) for name, tensor in state_dict.items()}, *args, **kwargs)

    return run


def _memory(tensor: Any) -> Any:
    return tensor._storage.parts["qdata"] if isinstance(tensor, QTensor) else tensor


def _wrap_load(original: Callable) -> Callable:
    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return join_described(original(*args, **kwargs))

    return load
