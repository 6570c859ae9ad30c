"""Selects the modules that `requanto.quantize` quantizes, by patterns on dotted names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn

from requanto.config.config import LayerOptions
from requanto.config.plan import PlannedWeight, weight_kind
from requanto.dtypes.qtypes import qtype
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules as registry
from requanto.nn.swap import restore_float_class
from requanto.tensor.qtensor import QTensor


def chosen_modules(
    model: nn.Module,
    named: list[tuple[str, nn.Module]],
    kind: qtype | None,
    special: Mapping[str, qtype | None],
    include: list[str] | None,
    exclude: list[str] | None,
) -> Iterator[tuple[str, nn.Module, qtype | None]]:
    """(name, module, type) of every module that the patterns select."""
    for name, module in named:
        pattern = next((p for p in special if fnmatch(name, p)), None)
        if pattern is None:
            if include is not None and not any(fnmatch(name, p) for p in include):
                continue
            if exclude is not None and any(fnmatch(name, p) for p in exclude):
                continue
            if isinstance(module, nn.Embedding) and module is not model:
                continue
        asked = kind if pattern is None else special[pattern]
        if pattern is None or asked is not None:
            yield name, module, asked


def foldable_names(chosen: Iterable[tuple[str, nn.Module, qtype | None]]) -> set[str]:
    """Names of the chosen weights that a matmul multiplies with, whose column scales can be folded."""
    found = set()
    for name, module, kind in chosen:
        weight = module._parameters.get("weight")
        if weight is None or kind is None or isinstance(module, nn.Embedding):
            continue
        if weight_kind(module, "weight", weight) is not None:
            found.add(f"{name}.weight" if name else "weight")
    return found


def planned_weights(
    chosen: Iterable[tuple[str, nn.Module, qtype | None]],
    activation: qtype | None,
    group_size: int | str | None,
    symmetric: bool | None,
    more: Mapping[str, Any],
) -> dict[str, PlannedWeight]:
    """The chosen modules that have a weight to quantize, by parameter name, for methods that use samples.

    ``more`` has further keywords of `QTensor.quantize`, without ``search``, which needs no samples.
    """
    more = {key: value for key, value in more.items() if key != "search"}
    planned: dict[str, PlannedWeight] = {}
    for name, module, kind in chosen:
        weight = module._parameters.get("weight")
        found = None if weight is None or kind is None else weight_kind(module, "weight", weight)
        if found is None or (registry.find(module, name) is None and not isinstance(module, QModuleMixin)):
            continue
        if isinstance(weight, QTensor):
            raise ValueError(
                f"{name or type(module).__name__} is already quantized; methods on samples need a float weight"
            )
        if isinstance(module, QModuleMixin):
            restore_or_refuse(module, name)
        options = LayerOptions(kind.name, symmetric=symmetric, **more)
        options.group_size, options.activations = group_size, activation
        planned[f"{name}.weight" if name else "weight"] = PlannedWeight(options, found[1], found[2], found[0])
    return planned


def nothing_chosen(
    model: nn.Module, named: list[tuple[str, nn.Module]], include: list[str] | None, exclude: list[str] | None
) -> ValueError:
    kinds = sorted({type(module).__name__ for _, module in named if not list(module.children())})
    return ValueError(
        f"nothing to quantize in {type(model).__name__} (its layers: {', '.join(kinds[:12])}; include={include}, "
        f"exclude={exclude}). Linear, convolution and Conv1D layers are quantized, embeddings where modules= names "
        f"them; register a class of your own with requanto.register_qmodule."
    )


def listed(value: str | Iterable[str] | None) -> list[str] | None:
    if value is None:
        return None
    return [value] if isinstance(value, str) else list(value)


def check_patterns(patterns: Mapping[str, list[str] | None], names: list[str]) -> None:
    for argument, listed in patterns.items():
        for pattern in listed or ():
            if not any(fnmatch(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
                hint = f" Close names: {', '.join(near)}." if near else ""
                raise ValueError(
                    f"{argument}={pattern!r} matches no module (patterns are compared with full dotted names).{hint}"
                )


def restore_or_refuse(module: QModuleMixin, label: str) -> None:
    """Gives a quantized module with a float weight its float class back.

    Raises:
        ValueError: it was constructed as a quantized module, so it has no float class.
    """
    if not restore_float_class(module):
        raise ValueError(
            f"{label} was constructed as a {type(module).__name__}; quantize() changes float modules only. Set its "
            f"weight_qtype and activation_qtype in its constructor."
        )
