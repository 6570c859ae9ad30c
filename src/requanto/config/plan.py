"""Which parameters of a model are quantized, and how: the same answer for both libraries and the command line."""

from __future__ import annotations

import difflib
import fnmatch
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from requanto.config.config import LayerOptions, QuantoConfig
from requanto.scales.search import ScaleSearch
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

# Expert modules whose weights are [experts, in, out] and that do not say so themselves.
_TRANSPOSED_EXPERTS = frozenset({"Llama4TextExperts"})

_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class PlannedWeight:
    """One parameter to quantize.

    Attributes:
        options: its type and group.
        axis: see QTensor.
        transposed: quantized along its last-but-one axis (GPT-2's Conv1D, experts stored [E, K, N]).
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's), ``"experts"``, ``"embedding"`` or ``"convolution"``.
    """

    options: LayerOptions
    axis: int
    transposed: bool
    kind: str

    def quantize(self, weight: torch.Tensor, name: str, search: str | ScaleSearch | None = None) -> QTensor:
        """The quantized weight; ``search`` stands above the options' method."""
        if self.options.auto:
            raise ValueError(f"{name}: its type is still to be chosen within a budget (requanto.budget)")
        tensor = QTensor.quantize(
            weight,
            self.options.qtype,
            group_size=self.options.group_size,
            symmetric=self.options.symmetric,
            scale_bits=self.options.scale_bits,
            rotation=self.options.rotation,
            low_rank=self.options.low_rank,
            axis=self.axis,
            transposed=self.transposed,
            search=search or self.options.method,
            name=name,
        )
        tensor.activation = self.options.activations
        return tensor


def is_glob(pattern: str) -> bool:
    """True if the pattern holds a wildcard."""
    return any(character in _GLOB for character in pattern)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names the module ``name``, one of its parents, its leaf, or, as a glob, either."""
    if is_glob(pattern):
        parts = name.split(".")
        return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))
    return f".{pattern}." in f".{name}."


def check_patterns(patterns: Iterable[str], names: Iterable[str], where: str, shared: bool = False) -> None:
    """Refuses a pattern that matches no module; warns of it where the config is shared by several models.

    Raises:
        ValueError: it names the pattern and the nearest module names.
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
        logger.warning("%s It may name one of another component, which this config is for as well.", message)


def weight_kind(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[str, int, bool] | None:
    """(kind, axis, transposed) of a parameter that can be quantized, or None."""
    if name == "weight":
        if isinstance(module, nn.Linear):
            return "linear", 0, False
        if isinstance(module, nn.Embedding):
            return "embedding", 0, False
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "convolution", 0, False
        if type(module).__name__ == "Conv1D" and parameter.dim() == 2:  # Transformers' own, weight [in, out]
            return "conv1d", 0, True
    # Fused experts keep [experts, out, in] (or [experts, in, out]) parameters on the module itself.
    if parameter.dim() == 3 and "Experts" in type(module).__name__:
        transposed = bool(getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED_EXPERTS))
        return "experts", 1, transposed
    return None


def is_router(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether a module chooses experts: a gate or router beside them. Its errors change which weights are used at all."""
    parent, _, leaf = name.rpartition(".")
    beside = modules[parent].named_children() if parent in modules else ()
    return ("router" in leaf or leaf.endswith("gate")) and any(
        "expert" in child for child, _ in beside if child != leaf
    )


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
        config: what was asked for.
        default_skips: module names the library leaves float unless told otherwise, or a function that says of a module's
            full name whether it is one.
        output_embeddings: the lm_head, quantized only where ``config.lm_head`` or its full name says so.
        always_float: module names that stay float whatever the config says (the library needs them in float32).
        tied: parameter -> the parameter it shares its tensor with; only the latter is in a checkpoint.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to quantize.
    """
    modules = dict(model.named_modules())
    names = [name for name in modules if name]
    check_patterns(config.modules_to_not_convert or (), names, "modules_to_not_convert", config.shared)
    check_patterns(config.modules, names, "modules", config.shared)
    listed = () if callable(default_skips) else list(default_skips)

    def skipped(name: str) -> bool:
        if not config.default_skips:
            return False
        by_library = default_skips(name) if callable(default_skips) else any(matches(p, name) for p in listed)
        return by_library or is_router(modules, name)

    embedding_ids = {id(m) for m in modules.values() if isinstance(m, nn.Embedding)}
    output_id = id(output_embeddings) if output_embeddings is not None else None

    planned: dict[str, PlannedWeight] = {}
    for module_name, module in modules.items():
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
            planned[full] = PlannedWeight(config.choice_for(pattern), axis, transposed, kind)
    for target, source in (tied or {}).items():
        if target in planned and source not in planned:
            # One tensor under two names: asking for the head means asking for the table it shares.
            logger.info("%s is tied to %s: both are quantized, as the one tensor they are", target, source)
            planned[source] = planned[target]
        planned.pop(target, None)
    if not planned:
        kinds = sorted({type(m).__name__ for m in modules.values() if not list(m.children())})
        raise ValueError(
            f"nothing to quantize: {type(model).__name__} has no Linear, Conv1D or expert weight that the config leaves "
            f"to quantize (its layers: {', '.join(kinds[:12])}). Convolutions and embeddings are asked for with "
            f"convolutions=True, embeddings=True; modules_to_not_convert={config.modules_to_not_convert}."
        )
    return planned


def parameter_holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each parameter sits, by the parameter's id."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, leaf))
    return holders
