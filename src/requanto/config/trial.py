"""Runs a module on the meta device, where shapes are computed and no values, to see what becomes of its weights."""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)
aten = torch.ops.aten

#: Operators that choose by score along an axis: position of the argument `dim`, and its default.
_CHOICES = {
    aten.topk.default: (2, -1),
    aten.argmax.default: (1, None),
    aten.argmin.default: (1, None),
    aten.sort.default: (1, -1),
    aten.sort.stable: (2, -1),
    aten.argsort.default: (1, -1),
    aten.argsort.stable: (2, -1),
    aten.max.dim: (1, -1),
    aten.min.dim: (1, -1),
    aten.kthvalue.default: (2, -1),
    aten.multinomial.default: (9, -1),
}
_PRODUCTS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.linear.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.convolution.default: (0, 1),
}
#: A trial ends after so many operators: whatever comes later is no router.
_MOST_OPERATORS = 4000


class _Enough(Exception):
    """Ends a trial."""


@dataclass(frozen=True)
class Choice:
    """A choice by score.

    Attributes:
        last: layers whose output the scores are, with no other product in between.
        before: layers whose output those layers got.
        size: number of candidates.
        shape: shape of the scores.
    """

    last: frozenset[str]
    before: frozenset[str]
    size: int
    shape: tuple[int, ...]


class Tensors(TorchDispatchMode):
    """Follows the weights of some layers through a run.

    Attributes:
        chosen: each choice by score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Choice] = []
        # id -> (made of weights only, layers it was multiplied with last, layers before those); kept alive by `_all`.
        self._of: dict[int, tuple[bool, frozenset[str], frozenset[str]]] = {}
        self._all: list[Any] = []
        self._count = 0

    def follow(self, tensor: torch.Tensor, weight: bool, layers: frozenset[str] = frozenset()) -> None:
        """Starts to follow a tensor: a weight, of these layers, or an input."""
        self._of[id(tensor)] = (weight, layers, frozenset())
        self._all.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._count += 1
        if self._count > _MOST_OPERATORS:
            raise _Enough
        kwargs = kwargs or {}
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [self._of.get(id(t), (False, frozenset(), frozenset())) for t in given]
        if func in _CHOICES and isinstance(args[0], torch.Tensor):
            weight, last, before = self._of.get(id(args[0]), (True, frozenset(), frozenset()))
            where, default = _CHOICES[func]
            dim = args[where] if len(args) > where else kwargs.get("dim", default)
            size = args[0].numel() if dim is None or args[0].dim() == 0 else args[0].shape[dim]
            if not weight:
                self.chosen.append(Choice(last, before, size, tuple(args[0].shape)))
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            one, two = (self._of.get(id(args[i]), (False, frozenset(), frozenset())) for i in _PRODUCTS[func])
            if one[0] == two[0]:
                state = (one[0], one[1] | two[1], one[2] | two[2]) if one[0] else (False, frozenset(), frozenset())
            else:
                weight, other = (one, two) if one[0] else (two, one)
                state = (False, weight[1], weight[2] | other[1] | other[2])
        else:
            union = [frozenset().union(*(k[i] for k in known)) for i in (1, 2)]
            state = (bool(known) and all(k[0] for k in known), union[0], union[1])
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._all.append(tensor)
                if tensor.is_floating_point():
                    self._of[id(tensor)] = state
        return out


def choices_of(block: nn.Module, layers: dict[str, nn.Module], shape: tuple[int, ...]) -> tuple[list[Choice], bool]:
    """What is chosen by score when a module runs on an input of this shape.

    Args:
        layers: the layers to follow, by their name in the module.

    Returns:
        `Tensors.chosen`, and whether the module ran to its end.
    """
    tensors = Tensors()
    owners = {id(layer.weight): name for name, layer in layers.items()}
    replaced = {}
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if not isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            replaced[name] = copy = on_meta(tensor)
            owner = owners.get(id(tensor))
            tensors.follow(copy, True, frozenset() if owner is None else frozenset({owner}))
    x = torch.empty(shape, dtype=dtype_of(block), device="meta")
    tensors.follow(x, False)
    return tensors.chosen, runs(block, replaced, x, tensors)


def runs(
    module: nn.Module, tensors: dict[str, torch.Tensor], x: torch.Tensor, mode: contextlib.AbstractContextManager
) -> bool:
    """Runs a module on the meta device, inside a mode; returns False if an error ended the run.

    Args:
        tensors: what replaces the parameters and buffers of the module.
        x: input, for each argument without a default.
    """
    names = inspect.signature(type(module).forward).parameters
    required = [p for p in list(names.values())[1:] if p.default is p.empty]
    required = [p for p in required if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    arguments = tuple(x for p in required if p.kind is not p.KEYWORD_ONLY)
    keywords = {p.name: x for p in required if p.kind is p.KEYWORD_ONLY}
    try:
        with (
            _unchanged(module),
            _eager(),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.device("meta"),
            mode,
        ):
            torch.func.functional_call(module, tensors, arguments or (x,), keywords)
    except Exception as error:
        # The module wants other inputs, or asks for values, which the meta device does not have.
        logger.debug("%s on the meta device: %s: %s", type(module).__name__, type(error).__name__, error)
        return False
    return True


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape and dtype without memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first float parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Gives a module and its submodules their attributes back: some keep what they have computed."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Nothing is compiled for a trial, and nothing is imported for that."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
