"""Finds the routers of experts among a model's layers, by what they feed: a choice of the largest scores, one per expert.

A router stays float by default, since its rounding errors change which experts run. Its name says little (``gate``,
``router.classifier``, ``proj``, ``gate.wg`` ...), so the blocks that contain one are tried on the meta device, where nothing
is computed: each tensor carries the layers whose weights it was multiplied with, and a router is a layer whose output
reaches ``topk``, ``argmax`` or another choice without another product in between.

Only blocks are tried whose code makes such a choice and that have to do with experts, once for each kind of block. A dense
model has none, so its layers only cost a look at its classes. Where a trial ends in an error before any choice, layers with
one output per expert count as routers: a small layer too many in float costs little.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from requanto.config.trial import Choice, choices_of

logger = logging.getLogger(__name__)

#: Names of torch functions that choose by score, as a forward's code mentions them.
_CHOICES = frozenset({"topk", "argmax", "argsort", "sort", "max", "kthvalue", "multinomial", "gumbel_softmax"})
#: Parts of names that tell of experts.
_WORDS = ("expert", "router", "routing", "moe", "mixture")
#: Number of modules around a layer that are considered: the router itself, the block of experts, the decoder layer.
_LEVELS = 3


class Routers:
    """The routers of one model; each kind of block is tried once."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.root = model
        self._tried: dict[Any, tuple[frozenset[str], bool]] = {}
        self._sizes: dict[str, set[int]] = {}

    def has(self, name: str, module: nn.Module) -> bool:
        """True if the layer of this full name is a router."""
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) or weight.dim() < 2:
            return False
        if self._named_so(name, _outputs(module, weight)):
            return True
        parts = name.split(".")
        blocks = [len(parts)] if type(module).forward is not nn.Linear.forward else []
        blocks += range(len(parts) - 1, max(-1, len(parts) - 1 - _LEVELS), -1)
        for length in blocks:
            block = self.modules.get(".".join(parts[:length]))
            if block is None or (block is self.root and length == 0 and len(parts) > 1) or not _chooses(type(block)):
                continue
            around, inside = ".".join(parts[:length]), ".".join(parts[length:])
            if not self._about_experts(around, block, parts[length:], weight):
                continue
            found, sure = self._try(around, block)
            if inside in found:
                return True
            if sure or "expert" in inside:
                continue
            if _outputs(module, weight) in self._numbers(around, block):
                return True
        return False

    def _named_so(self, name: str, outputs: int) -> bool:
        """True for a gate or router with experts among its siblings, also where nothing is chosen (a shared expert's)."""
        parent, _, leaf = name.rpartition(".")
        if not ("router" in leaf or leaf.endswith("gate")) or parent not in self.modules:
            return False
        block = self.modules[parent]
        if not any("expert" in child for child in block._modules if child != leaf):
            return False
        return "router" in leaf or "expert" in leaf or outputs == 1 or outputs in self._numbers(parent, block)

    def _about_experts(self, around: str, block: nn.Module, inside: list[str], weight: torch.Tensor) -> bool:
        """True if the names or the structure of a block tell of experts."""
        parent = self.modules.get(around.rpartition(".")[0])
        names = [
            around.rpartition(".")[2],
            *inside,
            type(block).__name__,
            *vars(block),
            *block._modules,
            *block._parameters,
        ]
        if parent is not None:
            names += [type(parent).__name__] if "." in around else []
            names += [n for n in parent._modules if "expert" in n.lower()]
        if any(word in name.lower() for name in names for word in _WORDS):
            return True
        return bool(self._lengths(around, block) & {size for size in weight.shape if size > 1})

    def _lengths(self, around: str, block: nn.Module) -> set[int]:
        """Numbers of like modules in a list, and first sizes of 3D parameters, in a block and next to it."""
        if around not in self._sizes:
            found: set[int] = set()
            for place in (block, self.modules.get(around.rpartition(".")[0]) if "." in around else None):
                for part in (place, *place.children()) if place is not None else ():
                    if isinstance(part, nn.ModuleList) and len({type(m) for m in part}) == 1 and len(part) > 1:
                        found.add(len(part))
                    found |= {p.shape[0] for p in part.parameters(recurse=False) if _dims(p) == 3 and p.shape[0] > 1}
            self._sizes[around] = found
        return self._sizes[around]

    def _numbers(self, around: str, block: nn.Module) -> set[int]:
        """What may be the number of experts in a block."""
        found = set(self._lengths(around, block))
        holders = [block]
        if any("expert" in name for name in block._modules):
            holders.append(getattr(block, "config", None))  # of the whole model: it says little about other blocks
        for holder in holders:
            for name, value in vars(holder).items() if holder is not None else ():
                if "expert" in name and isinstance(value, int) and value > 1:
                    found.add(value)
        return found

    def _try(self, around: str, block: nn.Module) -> tuple[frozenset[str], bool]:
        """(names inside the block of its routers, whether the trial came to a choice)."""
        layers = {
            name: module for name, module in block.named_modules() if name.count(".") < _LEVELS and _is_layer(module)
        }
        kind = (type(block), tuple((name, tuple(module.weight.shape)) for name, module in layers.items()))
        if kind not in self._tried:
            self._tried[kind] = _routers_of(block, layers)
            found, sure = self._tried[kind]
            if found or not sure:
                logger.info(
                    "%s (%s): %s",
                    around or "the model",
                    type(block).__name__,
                    f"its {', '.join(sorted(found)) or 'weight'} chooses experts and stays float"
                    if found
                    else "not clear which layer chooses experts; those with one output per expert stay float",
                )
        return self._tried[kind]


def _dims(parameter: torch.Tensor) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedParameter) else parameter.dim()


def _is_layer(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    plain = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"
    return plain and weight is not None and _dims(weight) >= 2


def _outputs(module: nn.Module, weight: torch.Tensor) -> int:
    return weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]


def _routers_of(block: nn.Module, layers: dict[str, nn.Module]) -> tuple[frozenset[str], bool]:
    """Runs a block on the meta device, for inputs as wide as its layers want them, until a choice is seen."""
    widths: dict[int, None] = {}
    for module in layers.values():
        widths[module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]] = None
    sure, found = False, set()
    for width in list(widths)[:4]:
        for shape in ((3, 7, width), (21, width)):
            chosen, finished = choices_of(block, layers, shape)
            sure = sure or finished
            for choice in chosen:
                direct = {n for n in choice.last if _per_expert(_outputs(layers[n], layers[n].weight), choice)}
                found |= direct
                # A router of several layers: all of them, if no other weight is in their module.
                for holder in {n.rpartition(".")[0] for n in direct}:
                    inside = {n for n in direct | choice.before if n.rpartition(".")[0] == holder}
                    weights = [p for p in block.get_submodule(holder).parameters() if _dims(p) != 1]
                    if {id(p) for p in weights} <= {id(layers[n].weight) for n in inside}:
                        found |= inside
            if found:
                return frozenset(found), True
    return frozenset(found), sure


def _per_expert(outputs: int, choice: Choice) -> bool:
    """True if a layer's outputs are what is chosen among, all or in equal parts, or what each of which chooses tokens."""
    return (choice.size > 1 and outputs % choice.size == 0) or outputs in choice.shape


@functools.cache
def _chooses(cls: type) -> bool:
    """True if the code of a class mentions a choice by score, in its methods or in functions of its module they call."""
    if cls.__module__.startswith("torch."):
        return False
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            break
        for value in vars(base).values():
            if any(_CHOICES & set(code.co_names) for code in _codes(value, cls.__module__)):
                return True
    return False


def _codes(value: Any, module: str, depth: int = 0) -> Iterator[types.CodeType]:
    """The code of a function, of what it wraps and contains, and of the functions of its module that it calls."""
    value = getattr(value, "__func__", value)
    seen: set[int] = set()
    while hasattr(value, "__wrapped__") and id(value) not in seen:
        seen.add(id(value))
        value = value.__wrapped__
    if not isinstance(value, types.FunctionType):
        return
    for cell in value.__closure__ or ():
        try:
            inner = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(inner, types.FunctionType) and depth < 3:
            yield from _codes(inner, module, depth + 1)
    names: set[str] = set()
    for code in _nested(value.__code__):
        yield code
        names |= set(code.co_names)
    if depth < 2:
        for name in names:
            called = value.__globals__.get(name)
            if isinstance(called, types.FunctionType) and called.__module__ == module:
                yield from _codes(called, module, depth + 1)


def _nested(code: types.CodeType) -> Iterable[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
