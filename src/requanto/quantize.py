"""quantize, freeze and quantization_map: optimum-quanto's three steps, in place on any torch model.

    model = ...                                            # float
    requanto.quantize(model, weights="int8")               # weights still float, every forward rounds them: train here
    requanto.freeze(model)                                 # weights become QTensor

Loading back what was saved: `requanto.requantize`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, TypeVar

from torch import nn
from tqdm import tqdm

from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules as qmodules
from requanto.nn.swap import quantize_in_place, restore_float_class
from requanto.optimizers import Optimizer, check_optimizer
from requanto.qtensor import QTensor
from requanto.qtypes import qtype, resolve_qtype

Module = TypeVar("Module", bound=nn.Module)

#: A progress bar appears from this many weights on: below, the work takes less than a second or two.
PROGRESS_FROM = 100_000_000


def quantize(
    model: Module,
    weights: str | qtype | None = None,
    activations: str | qtype | None = None,
    optimizer: Optimizer | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    group_size: int | str | None = "default",
    symmetric: bool | None = None,
    modules: Mapping[str, str | qtype | None] | None = None,
) -> Module:
    """Puts a model's modules under quantization, in place.

    Linear layers, convolutions and GPT-2's Conv1D are quantized; LayerNorm where ``activations`` are; Embedding only
    where ``modules`` names it or it is the root. Weights stay float until :func:`freeze`: each forward rounds them, with
    a straight-through gradient.

    Modules change their class and keep their identity, so the root itself may be a single ``nn.Linear``.

    Args:
        model: any module, also on the meta device.
        weights: ``"int2"``, ``"int4"``, ``"int8"``, ``"float8"`` ..., a qtype, or None: weights stay float.
        activations: ``"int8"``, ``"float8"``, or None. On the fly per token, until `Calibration` finds static scales.
        optimizer: how scales are found, e.g. `HqqOptimizer()`; None: minimum and maximum, in float32.
        include, exclude: shell patterns on full dotted names; a module must match one of ``include`` where given, and
            none of ``exclude``.
        group_size: weights of a row that share a scale (below 8 bits); None: one scale a row. See `QTensor.quantize`.
        symmetric: codes around zero, without a shift; None: below 8 bits affine, else symmetric.
        modules: other types for some modules, ``{"*.mlp.*": "int4", "lm_head": None}``; the first pattern that fits
            counts, before include and exclude.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a type is unknown; a pattern matches no module; nothing is left to quantize; a weight is quantized
            already, to another type.
    """
    kind = None if weights is None else resolve_qtype(weights)
    activation = None if activations is None else resolve_qtype(activations)
    special = {p: None if v is None else resolve_qtype(v) for p, v in (modules or {}).items()}
    if kind is None and activation is None and not any(special.values()):
        raise ValueError("nothing to do: give weights=, activations= or modules= a type, e.g. weights='int8'")
    if activation is not None and activation.bits != 8:
        raise ValueError(f"activations are quantized to int8 or float8, found {activation.name}")
    if optimizer is not None:
        for asked in {kind, *special.values()} - {None}:
            check_optimizer(optimizer, asked)
    include, exclude = _patterns(include), _patterns(exclude)
    named = list(model.named_modules())
    _check_patterns({"include": include, "exclude": exclude, "modules": list(special)}, [name for name, _ in named])

    touched = 0
    for name, module in named:
        chosen = next((p for p in special if fnmatch(name, p)), None)
        if chosen is None:
            if include is not None and not any(fnmatch(name, pattern) for pattern in include):
                continue
            if exclude is not None and any(fnmatch(name, pattern) for pattern in exclude):
                continue
            if isinstance(module, nn.Embedding) and module is not model:
                continue
        asked = kind if chosen is None else special[chosen]
        if chosen is not None and asked is None:
            continue
        if _quantize_module(module, name, asked, activation, optimizer, group_size, symmetric):
            touched += 1
    if not touched:
        kinds = sorted({type(module).__name__ for _, module in named if not list(module.children())})
        raise ValueError(
            f"nothing to quantize in {type(model).__name__} (its layers: {', '.join(kinds[:12])}; include={include}, "
            f"exclude={exclude}). Linear, convolution and Conv1D layers are quantized, embeddings where modules= names "
            f"them; register a class of your own with requanto.register_qmodule."
        )
    return model


def _quantize_module(
    module: nn.Module,
    name: str,
    kind: qtype | None,
    activation: qtype | None,
    optimizer: Optimizer | None,
    group_size: int | str | None,
    symmetric: bool | None,
) -> bool:
    weight = module._parameters.get("weight")
    label = name or type(module).__name__
    if isinstance(weight, QTensor):
        if kind is None or weight.qtype == kind:
            if activation is None or getattr(module, "activation_qtype", weight.activation) == activation:
                return True
            raise ValueError(
                f"{label} is frozen already; ask for activations={activation.name} before freeze(), in the same call "
                f"of quantize() as the weights"
            )
        raise ValueError(
            f"{label} is quantized to {weight.qtype.name} already and cannot become {kind.name}: the float weights are "
            f"gone. Load the float model again and quantize that."
        )
    if isinstance(module, QModuleMixin):  # still float inside: the new choice replaces the old one
        restore_or_refuse(module, label)
    return quantize_in_place(module, kind, activation, optimizer, group_size, symmetric, name)


def restore_or_refuse(module: QModuleMixin, label: str) -> None:
    """Takes a quantized module that is still float back to its float class.

    Raises:
        ValueError: it was built as a quantized module and has no float class to return to.
    """
    if not restore_float_class(module):
        raise ValueError(
            f"{label} was made as a {type(module).__name__}; quantize() changes float modules. Set its weight_qtype and "
            f"activation_qtype where it is made."
        )


def _patterns(value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) else list(value)


def _check_patterns(patterns: Mapping[str, list[str] | None], names: list[str]) -> None:
    for argument, listed in patterns.items():
        for pattern in listed or ():
            if not any(fnmatch(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                hint = f" Close names: {', '.join(near)}." if near else ""
                raise ValueError(
                    f"{argument}={pattern!r} matches no module (patterns are compared with full dotted names).{hint}"
                )


def freeze(model: nn.Module) -> None:
    """Replaces the float weights under quantization by quantized ones, one at a time, in place.

    A weight that several modules share is quantized once and stays shared. A module that needs no state of its own, that
    is one without quantized activations, becomes a plain module of its first class again.

    Raises:
        ValueError: a shared weight is asked for in two types, or a weight holds NaN or Inf.
    """
    holders = parameter_holders(model)
    pending = [m for m in model.modules() if isinstance(m, QModuleMixin) and m.weight_qtype is not None]
    pending = [m for m in pending if m.weight is not None and not m.frozen]
    done: dict[int, tuple[QModuleMixin, nn.Parameter]] = {}
    keep: list[Any] = []  # an id means something only while its object lives
    for module in progress(pending, "freezing", sum(m.weight.numel() for m in pending)):
        weight = module.weight
        if id(weight) in done:
            first, frozen = done[id(weight)]
            if _choice(first) != _choice(module):
                raise ValueError(
                    f"one weight is shared by {first.name!r} ({_choice(first)}) and {module.name!r} ({_choice(module)}): "
                    f"quantize both alike, or exclude one"
                )
            module.weight = frozen
        else:
            module.freeze()
            if not isinstance(module.weight, QTensor):
                raise TypeError(f"{type(module).__name__}.freeze left {module.name!r} float")
            others = [(m, leaf) for m, leaf in holders.get(id(weight), ()) if m is not module]
            for other, leaf in others:
                if not isinstance(other, QModuleMixin):
                    other._parameters[leaf] = module.weight
            if others:
                done[id(weight)] = (module, module.weight)
                keep.append(weight)
    for module in model.modules():
        if isinstance(module, QModuleMixin) and module.activation_qtype is None and module.weight_qtype is not None:
            restore_float_class(module)


def _choice(module: QModuleMixin) -> tuple:
    kind = None if module.weight_qtype is None else module.weight_qtype.name
    return kind, module.weight_group_size, module.weight_symmetric


def parameter_holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each parameter sits, by the parameter's id."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, leaf))
    return holders


def quantization_map(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What is quantized to what, by module name: what :func:`requantize` needs beside the tensors. Plain JSON.

    Each entry has ``weights`` and ``activations`` (a type's name or ``"none"``), as optimum-quanto's; ``group_size`` and
    ``symmetric`` as well where they matter. A quantized parameter not called ``weight`` stands under its own full name.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin):
            found[name] = _entry(module.weight, module.weight_qtype, module.activation_qtype)
            if module.weight_qtype is not None and not module.frozen and module.weight_qtype.bits < 8:
                found[name] |= {"group_size": module.weight_group_size, "symmetric": module.weight_symmetric}
            continue
        for leaf, parameter in module._parameters.items():
            if isinstance(parameter, QTensor):
                key = name if leaf == "weight" else f"{name}.{leaf}".lstrip(".")
                found[key] = _entry(parameter, parameter.qtype, parameter.activation)
    return found


def _entry(weight: Any, kind: qtype | None, activation: qtype | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "weights": "none" if kind is None else kind.name,
        "activations": "none" if activation is None else activation.name,
    }
    if isinstance(weight, QTensor) and weight.qtype.bits < 8:
        entry |= {"group_size": weight.group_size, "symmetric": weight.shift is None}
    return entry


def quantize_module(
    module: nn.Module,
    weights: str | qtype | None = None,
    activations: str | qtype | None = None,
    optimizer: Optimizer | None = None,
) -> Any:
    """The quantized counterpart of one module, sharing its parameters; None where its class has none."""
    qmodule_cls = qmodules.find(module)
    if qmodule_cls is None:
        return None
    return qmodule_cls.from_module(module, weights=weights, activations=activations, optimizer=optimizer)


def progress(items: list, what: str, size: int) -> Iterator[Any]:
    """Iterates with a progress bar where ``size`` weights are enough to make one wait."""
    return iter(tqdm(items, desc=what, unit="layer", disable=size < PROGRESS_FROM))
