"""Selects which parameters of a model are quantized and how, for both libraries and the command line."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from requanto.config.config import LayerOptions, QuantoConfig
from requanto.config.own_forward import BASES, reason_for_float, unusual
from requanto.config.routers import Routers
from requanto.scales.search import ScaleSearch
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

# Expert modules with weights [experts, in, out] that have no attribute `is_transposed`.
_TRANSPOSED_EXPERTS = frozenset({"Llama4TextExperts"})

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class PlannedWeight:
    """One parameter to quantize.

    Attributes:
        options: its type, group size and further options.
        axis: see QTensor.
        transposed: quantized along the second-to-last axis (GPT-2's Conv1D, experts stored [E, K, N]).
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's), ``"experts"``, ``"embedding"`` or ``"convolution"``.
    """

    options: LayerOptions
    axis: int
    transposed: bool
    kind: str

    def quantize(self, weight: torch.Tensor, name: str, search: str | ScaleSearch | None = None) -> QTensor:
        """The quantized weight; ``search`` overrides the method of the options."""
        if self.options.auto:
            raise ValueError(f"{name}: no type was chosen yet; choose one within a budget first (requanto.budget)")
        tensor = QTensor.quantize(
            weight,
            self.options.qtype,
            group_size=self.options.group_size,
            symmetric=self.options.symmetric,
            scale_bits=self.options.scale_bits,
            rotation=self.options.rotation,
            low_rank=self.options.low_rank,
            column_scale="default" if self.options.column_scale is None else self.options.column_scale,
            zero_point=self.options.zero_point,
            axis=self.axis,
            transposed=self.transposed,
            search=search or self.options.method,
            name=name,
        )
        tensor.activation = self.options.activations
        tensor._storage.name = name
        return tensor


def is_glob(pattern: str) -> bool:
    """True if the pattern contains a wildcard."""
    return any(character in _GLOB for character in pattern)


def matches(pattern: str, name: str) -> bool:
    """True if a pattern matches the module name, a parent's name or, without wildcards, a run of its dotted parts."""
    if is_glob(pattern):
        parts = name.split(".")
        return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))
    return f".{pattern}." in f".{name}."


def check_patterns(patterns: Iterable[str], names: Iterable[str], where: str, shared: bool = False) -> None:
    """Checks that each pattern matches a module; only warns where several models share the config.

    Raises:
        ValueError: a pattern matches no module; the message names the nearest module names.
    """
    names = list(names)
    for pattern in patterns:
        if any(matches(pattern, name) for name in names):
            continue
        leaves = {part for name in names for part in (name, name.rpartition(".")[2])}
        near = difflib.get_close_matches(pattern, leaves, n=3, cutoff=0.4)
        hint = f" Close names: {', '.join(near)}." if near else ""
        message = f"{where}: {pattern!r} matches no module of the model.{hint}"
        if not shared:
            raise ValueError(message)
        logger.warning("%s It may match in another component, since several components share this config.", message)


def weight_kind(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[str, int, bool] | None:
    """(kind, axis, transposed) of a parameter that can be quantized, or None."""
    if isinstance(parameter, nn.parameter.UninitializedTensorMixin):
        return None
    if name == "weight":
        if isinstance(module, nn.Linear):
            return "linear", 0, False
        if isinstance(module, nn.Embedding):
            return "embedding", 0, False
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "convolution", 0, False
        if type(module).__name__ == "Conv1D" and parameter.dim() == 2:  # Transformers' own, weight [in, out]
            return "conv1d", 0, True
    # Fused experts have [experts, out, in] (or [experts, in, out]) parameters on the module itself.
    if parameter.dim() == 3 and "Experts" in type(module).__name__:
        transposed = bool(getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED_EXPERTS))
        return "experts", 1, transposed
    return None


def plan(
    model: nn.Module,
    config: QuantoConfig,
    *,
    default_skips: Iterable[str] | Callable[[str], bool] = (),
    output_embeddings: nn.Module | None = None,
    always_float: Iterable[str] = (),
    tied: dict[str, str] | None = None,
) -> dict[str, PlannedWeight]:
    """Every parameter to quantize, by its full name.

    Args:
        model: any model, also on the meta device.
        config: the user's configuration.
        default_skips: module names that the library leaves float by default, or a predicate on a module's full name.
        output_embeddings: the lm_head, quantized only with ``config.lm_head`` or if ``config.modules`` has its full name.
        always_float: module names that stay float whatever the config says (the library needs them in float32).
        tied: parameter -> the parameter it shares its tensor with; only the latter is in a checkpoint.

    Raises:
        ValueError: a pattern matches no module, or no parameter is left to quantize.
    """
    modules = dict(model.named_modules())
    names = [name for name in modules if name]
    check_patterns(config.modules_to_not_convert or (), names, "modules_to_not_convert", config.shared)
    check_patterns(config.modules, names, "modules", config.shared)
    listed = () if callable(default_skips) else list(default_skips)
    routers = Routers(model, modules)

    def skipped(name: str) -> bool:
        if not config.default_skips:
            return False
        by_library = default_skips(name) if callable(default_skips) else any(matches(p, name) for p in listed)
        return by_library or routers.has(name, modules[name])

    embedding_ids = {id(m) for m in modules.values() if isinstance(m, nn.Embedding)}
    output_id = id(output_embeddings) if output_embeddings is not None else None

    float_layers = _FloatLayers()
    planned: dict[str, PlannedWeight] = {}
    for module_name, module in modules.items():
        float_layers.note_computed(module_name, module, config)
        for leaf, parameter in module.named_parameters(recurse=False):
            found = weight_kind(module, leaf, parameter)
            full = f"{module_name}.{leaf}" if module_name else leaf
            if found is None or isinstance(parameter, QTensor) or not parameter.is_floating_point():
                continue
            kind, axis, transposed = found
            pattern = next((p for p in config.modules if matches(p, module_name)), None)
            named = pattern is not None and not is_glob(pattern)
            if pattern is not None and config.modules[pattern] is None:
                continue
            if any(matches(p, module_name) for p in config.modules_to_not_convert or ()):
                continue
            if any(matches(p, module_name) for p in always_float):
                continue
            if not named:
                if kind == "convolution" and not config.convolutions:
                    continue
                if id(module) in embedding_ids and not config.embeddings:
                    continue
                if id(module) == output_id:
                    if not config.lm_head:
                        continue
                elif id(module) not in embedding_ids and skipped(module_name):
                    continue
                reason = None if kind == "experts" else float_layers.reason(module_name, module, axis, transposed)
                if reason is not None:
                    continue
            planned[full] = PlannedWeight(config.choice_for(pattern), axis, transposed, kind)
    float_layers.log()
    for target, source in (tied or {}).items():
        if target in planned and source not in planned:
            # One tensor under two names: quantizing the head quantizes the embedding table too.
            logger.info("%s is tied to %s: they share one tensor, so both are quantized", target, source)
            planned[source] = planned[target]
        planned.pop(target, None)
    if not planned:
        kinds = sorted({type(m).__name__ for m in modules.values() if not list(m.children())})
        raise ValueError(
            f"nothing to quantize: {type(model).__name__} has no Linear, Conv1D or expert weight that the config selects "
            f"(its layers: {', '.join(kinds[:12])}). Convolutions and embeddings are quantized with "
            f"convolutions=True, embeddings=True; modules_to_not_convert={config.modules_to_not_convert}."
        )
    return planned


class _FloatLayers:
    """Layers that stay float since their forward is not the one of their kind, found once for each class."""

    def __init__(self) -> None:
        self._of: dict[tuple[Any, ...], str | None] = {}
        self._names: dict[tuple[str, str], list[str]] = {}

    def reason(self, name: str, module: nn.Module, axis: int, transposed: bool) -> str | None:
        """Why a layer stays float; None if it is quantized."""
        weight = module._parameters["weight"]
        kind = (type(module), getattr(module, "max_norm", None), type(weight))
        if kind not in self._of:
            self._of[kind] = reason_for_float(module, weight, axis, transposed)
        reason = self._of[kind]
        if reason is not None:
            self._names.setdefault((type(module).__name__, reason), []).append(name)
        return reason

    def note_computed(self, name: str, module: nn.Module, config: QuantoConfig) -> None:
        """Notes a layer without a weight of its own to quantize, which is computed from other parameters."""
        weight = module._parameters.get("weight")
        known = isinstance(module, nn.Linear) or (config.convolutions and isinstance(module, BASES[2:]))
        if known and (weight is None or isinstance(weight, nn.parameter.UninitializedTensorMixin)):
            reason = unusual(module, weight)
            if reason is not None:
                self._names.setdefault((type(module).__name__, reason), []).append(name)

    def log(self) -> None:
        """Logs a line for each class and reason."""
        for (kind, reason), names in self._names.items():
            logger.warning(
                "%s stays float (%d in all, class %s): %s",
                names[0] or "the model",
                len(names),
                kind,
                reason,
            )


def parameter_holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """(module, attribute) of every place that holds each parameter, by the parameter's id."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, leaf))
    return holders
