"""What happens where a quantized weight is copied into a float tensor, as when a library builds one module from another.

By default that raises: it would dequantize without a word. Code that knows what the float tensor is for says so with one of
two context managers, `dequantize_copies` and `record_copies`. `assign_frozen` is for ``load_state_dict(assign=True)``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from requanto.tensor.qtensor import QTensor

_REFUSED = (
    "copy_ of a quantized weight into a float tensor: call .dequantize() on the source, nothing is dequantized silently. "
    "To load a quantized state dict into a float model, use load_state_dict(..., assign=True), which makes its weights "
    "quantized ones."
)


class Copies:
    """What happened within `dequantize_copies` or `record_copies`."""

    def __init__(self, dequantize: bool) -> None:
        self.dequantize = dequantize
        #: float target and source of each copy, by the id of the target
        self.found: dict[int, tuple[torch.Tensor, QTensor]] = {}

    def assign(self, model: nn.Module, *, clone: bool) -> int:
        """Replaces every parameter of a model that was the target of a copy by the source.

        Args:
            clone: the model gets copies of the sources.

        Returns:
            Number of parameters replaced.
        """
        done: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                target, source = self.found.get(id(parameter), (None, None))
                if source is None or target is not parameter:
                    continue
                if id(parameter) not in done:  # ties are kept
                    source = source.detach()
                    done[id(parameter)] = nn.Parameter(source.clone() if clone else source, requires_grad=False)
                module._parameters[name] = done[id(parameter)]
        return len(done)


_copies: ContextVar[Copies | None] = ContextVar("requanto_copies", default=None)
_assigning: ContextVar[bool] = ContextVar("requanto_assigning", default=False)


def copy_into_float(target: torch.Tensor, source: QTensor) -> torch.Tensor:
    """``target.copy_(source)`` of a quantized weight into a float tensor, as the innermost context manager says.

    Raises:
        NotImplementedError: outside of both.
    """
    copies = _copies.get()
    if copies is None:
        raise NotImplementedError(_REFUSED)
    if target.shape != source.shape:
        raise RuntimeError(f"copy_ into a tensor of shape {tuple(target.shape)} from shape {tuple(source.shape)}")
    copies.found[id(target)] = target, source
    return target.copy_(source.dequantize(target.dtype)) if copies.dequantize else target


@contextlib.contextmanager
def _collect(dequantize: bool) -> Iterator[Copies]:
    copies = Copies(dequantize)
    token = _copies.set(copies)
    try:
        yield copies
    finally:
        _copies.reset(token)


def dequantize_copies() -> contextlib.AbstractContextManager[Copies]:
    """Within the block, copying a quantized weight into a float tensor copies its values."""
    return _collect(dequantize=True)


def record_copies() -> contextlib.AbstractContextManager[Copies]:
    """Within the block, copying a quantized weight into a float parameter is only recorded, for `Copies.assign`."""
    return _collect(dequantize=False)


def assigning() -> bool:
    """True within `assign_frozen`."""
    return _assigning.get()


@contextlib.contextmanager
def assign_frozen() -> Iterator[None]:
    """Within the block, a quantized weight that is asked to require a gradient stays frozen instead of raising.

    ``nn.Module.load_state_dict(assign=True)`` gives each new parameter the ``requires_grad`` of the old one.
    """
    token = _assigning.set(True)
    try:
        yield
    finally:
        _assigning.reset(token)
