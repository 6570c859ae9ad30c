"""All or nothing: a model as it was before a merge, an unmerge or a new adapter that failed half-way.

PEFT works layer by layer. If the seventh layer is refused (or holds NaN, or the user presses Ctrl-C), six layers are changed
and PEFT does not go back. `all_or_nothing` restores the whole model, bit for bit: modules, parameters, lists such as
``merged_adapters``, quantized weights, and the float weights of layers that have adapters.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from requanto.tensor.lowrank import State
from requanto.tensor.qtensor import QTensor

_CONTAINERS = (dict, list, set, OrderedDict)
#: models that a block is open for: the outermost one restores
_open: list[int] = []


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, values: bool) -> Iterator[None]:
    """If the block raises, the model is as before it.

    Args:
        model: a model; one without quantized weights is left alone.
        values: the block may write into the float weights of layers with adapters. They are copied for that time.
    """
    if id(model) in _open or not any(isinstance(p, QTensor) for p in model.parameters()):
        yield
        return
    before = _Before(model, values)
    _open.append(id(model))
    try:
        yield
    except BaseException:
        before.restore()
        raise
    finally:
        _open.remove(id(model))


class _Before:
    """What a module tree consisted of."""

    def __init__(self, model: nn.Module, values: bool) -> None:
        self.modules = [(module, dict(module.__dict__), _copies(module)) for module in model.modules()]
        self.tensors: list[tuple[torch.Tensor, torch.Tensor, bool]] = []
        self.quantized: list[tuple[QTensor, Any, Any, State]] = []
        self.values: list[tuple[torch.Tensor, torch.Tensor]] = []
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            if isinstance(tensor, QTensor):
                self.quantized.append((tensor, tensor._spec, tensor._storage, State.of(tensor)))
            else:
                self.tensors.append((tensor, tensor.data, tensor.requires_grad))
        if values:
            written = {id(t): t for module in model.modules() if hasattr(module, "base_layer") for t in _floats(module)}
            self.values = [(tensor.data, tensor.detach().clone()) for tensor in written.values()]

    def restore(self) -> None:
        for module, attributes, copies in self.modules:
            for name, copy in copies.items():
                held = attributes[name]
                if isinstance(held, list):
                    held[:] = copy
                else:
                    held.clear()
                    held.update(copy)
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for tensor, data, requires_grad in self.tensors:
            tensor.data = data
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
        for data, copy in self.values:
            data.copy_(copy)
        for weight, spec, storage, state in self.quantized:
            weight._spec, weight._storage = spec, storage
            state.restore(weight)


def _copies(module: nn.Module) -> dict[str, Any]:
    """Copies of the containers among a module's attributes, one level deep."""
    return {name: value.copy() for name, value in module.__dict__.items() if type(value) in _CONTAINERS}


def _floats(layer: Any) -> list[torch.Tensor]:
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    return [t for t in base.parameters() if not isinstance(t, QTensor) and not t.is_meta]
