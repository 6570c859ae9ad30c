"""Routers of experts stay float in every family of the installed Transformers, judged by what a float model computes.

The judge knows no names: a float model runs with gradients, and from each input of `topk`, `argmax` or another choice the
autograd graph is followed back to the first product. The weight of that product is a router's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.quantizers.base import get_keys_to_not_convert

from requanto import QuantoConfig
from requanto.config.plan import plan

CHOICES = {"topk", "argmax", "max", "sort", "argsort", "multinomial", "kthvalue"}
PRODUCTS = ("MmBackward0", "AddmmBackward0", "BmmBackward0", "LinearBackward0", "ConvolutionBackward0")
# Of a family named so, a class holds experts; others may too, by the names of their modules.
EXPERTS = ("expert", "moe", "router")


class Chosen(TorchFunctionMode):
    """Collects the inputs of choices by score, with the size of the axis."""

    def __init__(self):
        super().__init__()
        self.scores: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in CHOICES and args and isinstance(args[0], torch.Tensor):
            scores = args[0]
            if scores.grad_fn is not None and scores.dim():
                position = 2 if func.__name__ in ("topk", "kthvalue") else 1
                dim = kwargs.get("dim", args[position] if len(args) > position else -1)
                if isinstance(dim, int) and scores.shape[dim] > 1:
                    self.scores.append((scores, scores.shape[dim]))
        return func(*args, **kwargs)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients everywhere, also where a model switches them off."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.no_grad, "__enter__", lambda self: None)
    patch.setattr(torch.no_grad, "__exit__", lambda self, *args: None)
    try:
        with torch.enable_grad():
            yield
    finally:
        patch.undo()


def first_products(node: Any, seen: set[Any]) -> Iterator[Any]:
    """The products nearest to a node of the autograd graph."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in PRODUCTS:
            yield node
        else:
            waiting += [following for following, _ in node.next_functions]


def parameters_of(product: Any) -> Iterator[torch.Tensor]:
    """The parameters that a product multiplies with, directly or as a view or a cast."""
    for node, _ in product.next_functions:
        while node is not None and node.name() != "torch::autograd::AccumulateGrad" and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        if node is not None and node.name() == "torch::autograd::AccumulateGrad" and node.variable.dim() > 1:
            yield node.variable


def routers_of(model: nn.Module, arguments: dict[str, torch.Tensor]) -> set[str]:
    """Names of the layers whose scores a float model chooses experts by."""
    mode = Chosen()
    with with_gradients(), mode:
        model(**arguments)
    names = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = set()
    for scores, size in mode.scores:
        for product in first_products(scores.grad_fn, set()):
            for weight in parameters_of(product):
                name = names.get(id(weight))
                if name is not None and weight.shape[0] % size == 0:
                    found.add(name)
    return {name for name in found if about_experts(model, name)}


def about_experts(model: nn.Module, name: str) -> bool:
    """True if the layer or a module around it, up to the decoder layer, has a name that tells of experts."""
    parts = name.split(".")
    for length in range(max(1, len(parts) - 3), len(parts)):
        block = model.get_submodule(".".join(parts[:length]))
        words = [type(block).__name__, *(child for child, _ in block.named_children()), *parts[length:]]
        if any(word in text.lower() for text in words for word in EXPERTS):
            return True
    return False


def planned(model: nn.Module, **options: Any) -> set[str]:
    found = plan(
        model,
        QuantoConfig(weights="int4", **options),
        default_skips=get_keys_to_not_convert(model),
        output_embeddings=model.get_output_embeddings(),
    )
    return {name.removesuffix(".weight") for name in found}
