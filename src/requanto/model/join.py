"""`join_layers`: layers that read one tensor, such as queries, keys and values, are computed together.

Which layers do is found by running the model once: hooks note the tensor that each layer gets. Nothing about the
model changes but the class of these layers (`requanto.nn.joined`): parameters, names, hooks and files stay as they
are.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from requanto.linear.gpu.many import MOST
from requanto.linear.joint import why_unlike
from requanto.nn.joined import JOINED, JoinedSet, _Joined
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


class _Call(NamedTuple):
    """One call of a layer in the trial."""

    layer: nn.Module
    x: torch.Tensor
    version: int


def join_layers(model: nn.Module, *inputs: Any, **named_inputs: Any) -> list[tuple[str, ...]]:
    """Makes quantized linear layers that read one tensor run together: queries, keys and values; gate and up projections.

    On a GPU and with few rows (tokens), one launch then computes a whole set (`requanto.linear.linear_many`);
    elsewhere layers run one by one, with the same results as before. Under torch.compile a set is one operator. **Not
    measured on a GPU yet.**

    The model runs once, without gradients, to see which layers read one tensor. Weights stay separate parameters, so
    saving, adapters, offloading and hooks are not affected; copies and pickles of the model are joined too. A layer
    that is replaced later, or results that are not used, end a set with a line in the log.

    Args:
        model: a model with quantized weights.
        inputs, named_inputs: arguments of its forward; none: ``model.dummy_inputs``, which models of Transformers have.

    Returns:
        Names of the layers of each set, in the order in which they are called.

    Raises:
        ValueError: there are no inputs.
    """
    separate_layers(model)
    if not inputs and not named_inputs:
        named_inputs = _example(model)
    names = {module: name for name, module in model.named_modules()}
    calls = _run(model, [m for m in names if _why_not(m) is None], inputs, named_inputs)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), QTensor):
            reason = _why_not(module)
            if reason is not None:
                logger.info("%s is not joined with other layers: %s", name, reason)
    found = []
    for layers in _sets(calls, names):
        joined = JoinedSet(len(layers), ", ".join(names[layer] for layer in layers))
        for place, layer in enumerate(layers):
            _enter(layer, joined, place)
        joined.checked()
        found.append(tuple(names[layer] for layer in layers))
    logger.info("%d layers run in %d sets that read one tensor each", sum(map(len, found)), len(found))
    return found


def separate_layers(model: nn.Module) -> list[str]:
    """Undoes `join_layers`.

    Returns:
        Names of the layers that were in a set.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _Joined):
            own = next(cls for cls, joined in JOINED.items() if joined is type(module))
            module.__dict__.pop("_joined", None)
            module.__dict__.pop("_place", None)
            module.__class__ = own
            _renew_wrapped(module, own)
            found.append(name)
    return found


def _enter(layer: Any, joined: JoinedSet, place: int) -> None:
    layer.__class__ = JOINED[type(layer)]
    layer._joined, layer._place = joined, place
    joined.enter(place, layer)
    _renew_wrapped(layer, type(layer))


def _renew_wrapped(layer: Any, cls: type) -> None:
    """Points the forward that Accelerate's hooks wrap to that of the layer's class."""
    wrapped = layer.__dict__.get("_old_forward")
    if isinstance(wrapped, types.MethodType):
        layer._old_forward = types.MethodType(cls.forward, layer)  # type: ignore[attr-defined]


def _why_not(module: nn.Module) -> str | None:
    """Why a layer cannot be in a set, or None."""
    if not isinstance(module._parameters.get("weight"), QTensor):
        return "its weight is not quantized"
    cls = type(module)
    if cls not in JOINED:
        return f"it is a {cls.__name__}"
    if getattr(module, "activation_qtype", None) is not None:
        return "it quantizes activations"
    if "forward" in module.__dict__:
        wrapped = module.__dict__.get("_old_forward")
        if getattr(wrapped, "__func__", None) is not cls.forward or wrapped.__self__ is not module:
            return "its forward was replaced"
    return None


def _example(model: nn.Module) -> dict[str, Any]:
    found = getattr(model, "dummy_inputs", None)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(
            f"join_layers: {type(model).__name__} has no dummy_inputs to run it with; pass arguments of its forward: "
            f"join_layers(model, input_ids=...)"
        )
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return pytree.tree_map(moved, dict(found))


def _run(model: nn.Module, layers: list[nn.Module], inputs: tuple, named_inputs: dict[str, Any]) -> list[_Call]:
    """Runs the model once; the calls of the layers, with their inputs."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, torch.Tensor):
            calls.append(_Call(module, x, x._version))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with _evaluated(model), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*inputs, **named_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _sets(calls: list[_Call], names: Mapping[nn.Module, str]) -> list[list[nn.Module]]:
    """The sets of layers that one launch can compute: called one after the other with one tensor, in every call alike."""
    runs: list[list[_Call]] = []
    for call in calls:
        last = runs[-1][-1] if runs else None
        if last is not None and last.x is call.x and last.version == call.version:
            runs[-1].append(call)
        else:
            runs.append([call])
    sets_of: dict[nn.Module, set[tuple[nn.Module, ...]]] = {}
    for run in runs:
        layers = tuple(call.layer for call in run)
        for layer in layers:
            sets_of.setdefault(layer, set()).add(layers)
    found, seen = [], set()
    for run in runs:
        layers = tuple(call.layer for call in run)
        if layers in seen or len(layers) < 2:
            continue
        seen.add(layers)
        told = ", ".join(names[layer] for layer in layers)
        if len(set(layers)) < len(layers) or any(len(sets_of[layer]) > 1 for layer in layers):
            logger.info("%s read one tensor, but not in every call; they are not joined", told)
            continue
        found += _alike(list(layers), told)
    return found


def _alike(layers: list[Any], told: str) -> list[list[nn.Module]]:
    """Parts of a set whose weights one launch can read, at most `MOST` each."""
    parts: list[list[Any]] = []
    for layer in layers:
        for part in parts:
            same_device = part[0].weight.device == layer.weight.device
            if len(part) < MOST and same_device and why_unlike([*(one.weight for one in part), layer.weight]) is None:
                part.append(layer)
                break
        else:
            parts.append([layer])
    alone = [part[0] for part in parts if len(part) == 1]
    if alone:
        logger.info(
            "%s read one tensor; %d of them run alone: %s",
            told, len(alone), why_unlike([one.weight for one in layers]) or "on another device, or too many",
        )  # fmt: skip
    return [part for part in parts if len(part) > 1]
