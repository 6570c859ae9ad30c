"""Which weight of a Transformers model each tensor of a GGUF file is, and in which order its rows are.

llama.cpp renames tensors when it converts a model, and permutes, splits or joins some. Transformers undoes that on float
values, by rules for each architecture. The same rules are run here on the numbers of the rows instead of values: what comes
out says where each row goes, so packed rows can go there. A rule that does something else with values shows too, since what
comes out is no permutation; such a weight is dequantized.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint
from requanto.checkpoint.foreign.gguf import (
    Rows,
    dequantized,
    described,
    float_of,
    floats_of,
    reason_of,
    weight_of,
)
from requanto.checkpoint.foreign.gguf_source import GgufSource
from requanto.config.own_forward import reason_for_float
from requanto.config.plan import weight_kind


class Rules(Protocol):
    """Transformers' rules for one architecture."""

    def targets(self, name: str, numbers: torch.Tensor) -> list[str]:
        """Names in the model of what a stored tensor becomes, or a part of; ``numbers`` stand for its values."""

    def run(self, target: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What a weight of the model becomes, of the values of all stored tensors that it is made of."""


class ProcessorRules(Rules):
    """Those of ``modeling_gguf_pytorch_utils``: one processor for each architecture, which gets arrays of numpy."""

    def __init__(self, model: Any, architecture: str) -> None:
        from transformers import modeling_gguf_pytorch_utils as library

        kind = library.TENSOR_PROCESSORS.get(architecture, library.TensorProcessor)
        self.processor = kind(config=model.config.to_dict())
        self.names = library.get_gguf_hf_weights_map(model, self.processor)

    def targets(self, name: str, numbers: torch.Tensor) -> list[str]:
        try:
            return list(self._process({name: numbers}))
        except Exception:  # a rule that wants the real shape
            return [self.names[name]] if name in self.names else []

    def run(self, target: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self._process(values)[target]

    def _process(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made: dict[str, Any] = {"tensors": {}}
        for name, value in values.items():
            with np.errstate(all="ignore"):
                found = self.processor.process(
                    weights=value.numpy(), name=name, tensor_key_mapping=self.names, parsed_parameters=made
                )
            if found.name in self.names:
                made["tensors"][self.names[found.name]] = torch.from_numpy(np.ascontiguousarray(found.weights))
        return made["tensors"]


class ConversionRules(Rules):
    """Those of ``integrations.gguf``: renamings and converters, as for any other checkpoint."""

    def __init__(self, model: Any, architecture: str) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.integrations.gguf.utils import get_gguf_conversion_mapping

        mapping = get_gguf_conversion_mapping(architecture, model.config)
        self.model = model
        self.renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        self.converters = [one for one in mapping if isinstance(one, WeightConverter)]
        self._found: dict[str, tuple[str, str | None]] = {}

    def targets(self, name: str, numbers: torch.Tensor) -> list[str]:
        return [self._target(name)[0]]

    def _target(self, name: str) -> tuple[str, str | None]:
        """Name in the model, and the pattern of the converter."""
        from transformers.core_model_loading import rename_source_key

        if name not in self._found:
            names = self.model.state_dict()
            prefix = self.model.base_model_prefix
            self._found[name] = rename_source_key(name, self.renamings, self.converters, prefix, names)
        return self._found[name]

    def run(self, target: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from transformers.core_model_loading import dot_natural_key

        names = sorted(values, key=dot_natural_key)
        pattern = self._target(names[0])[1]
        if pattern is None:
            return values[names[0]]
        converter = copy.deepcopy(next(one for one in self.converters if pattern in one.source_patterns))
        for name in names:
            converter.add_tensor(target, name, self._target(name)[1], lambda value=values[name]: value)
        made = converter.convert(target, model=self.model, config=self.model.config)[target]
        return made[0] if isinstance(made, list) else made


def rules_for(model: Any, architecture: str) -> Rules:
    """The rules that Transformers itself would use."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    return (ConversionRules if is_gguf_arch_supported(architecture) else ProcessorRules)(model, architecture)


# ---------------------------------------------------------------------- where rows go


def _numbers(source: GgufSource, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """For each tensor the numbers of its rows ``[*leading axes, 1]``, counted through all of them from 1 on."""
    found, begin = {}, 1
    for name in names:
        info = source.info(name)
        numbers = torch.arange(begin, begin + info.rows, dtype=torch.int64, device="cpu")
        found[name] = numbers.view(*info.shape[:-1], 1)
        begin += info.rows
    return found


def place(rules: Rules, target: str, names: tuple[str, ...], source: GgufSource) -> Rows | None:
    """Which rows of the stored tensors a weight is made of; None if it is made of their values in another way."""
    length = source.info(names[0]).shape[-1]
    if any(source.info(name).shape[-1] != length for name in names):
        return None
    total = sum(source.info(name).rows for name in names)
    found = _tried(rules, target, _numbers(source, names))
    if found is None:
        return _ordered(rules, target, names, source)
    if found.shape[-1:] == (1,):
        lead, transposed = found.shape[:-1], False
    elif found.dim() > 1 and found.shape[-2] == 1:
        lead, transposed = torch.Size([*found.shape[:-2], found.shape[-1]]), True
    else:
        return None
    index = found.flatten() - 1
    seen = index.unique()
    if seen.numel() != index.numel() or int(seen[0]) < 0 or int(seen[-1]) >= total:
        return None
    same = index.numel() == total and bool((index[1:] > index[:-1]).all())
    return Rows(names, torch.Size([*lead, length]), None if same else index, transposed)


def _ordered(rules: Rules, target: str, names: tuple[str, ...], source: GgufSource) -> Rows | None:
    """A weight whose columns are permuted, and nothing else."""
    info = source.info(names[0])
    if len(names) > 1 or len(info.shape) != 2:
        return None
    columns = torch.arange(info.shape[1], dtype=torch.int64, device="cpu").view(1, -1)
    found = _tried(rules, target, {names[0]: columns})
    if found is None or found.shape != columns.shape or not torch.equal(found.sort(-1).values, columns):
        return None
    return Rows(names, info.shape, order=found.view(-1).argsort().to(torch.int32))


def _tried(rules: Rules, target: str, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    try:
        found = rules.run(target, numbers)
    except Exception:  # a rule that wants the real shape
        return None
    return found if found.dtype == torch.int64 else None


# ---------------------------------------------------------------------- the model's weights


def scan_for(model: Any, source: GgufSource) -> ForeignCheckpoint:
    """What is in a GGUF file, under the names of a model.

    Args:
        model: a model of Transformers, on the meta device.
    """
    sources: dict[str, list[str]] = {}
    found = ForeignCheckpoint(described(source))
    with torch.device("cpu"):  # models are built on the meta device, where the rules' own tensors must not be
        rules = rules_for(model, source.architecture)
        expected = model.state_dict()
        for name in source:
            targets = [t for t in rules.targets(name, _numbers(source, [name])[name]) if t in expected]
            for target in targets:
                sources.setdefault(target, []).append(name)
            if not targets:
                found.dropped.add(name)
        for target, names in sources.items():
            _add(found, model, rules, target, tuple(names), source, expected[target].shape)
    return found


def _add(
    found: ForeignCheckpoint,
    model: Any,
    rules: Rules,
    target: str,
    names: tuple[str, ...],
    source: GgufSource,
    shape: torch.Size,
) -> None:
    rows = place(rules, target, names, source)
    dtypes = {source.info(name).type.dtype for name in names}
    reason = ""
    if None not in dtypes:
        if rows is not None and rows.order is None and len(dtypes) == 1:
            found.floats[target] = floats_of(source, rows, shape)
            return
    else:
        reason = reason_of(source, names) or _reason(model, rules, target, rows)
        if not reason and rows is not None:
            found.weights[target] = weight_of(source, rows)
            return

    def build() -> torch.Tensor:
        return rules.run(target, {name: float_of(source, name).float() for name in names})

    found.floats[target] = dequantized(names, shape, build, reason)


def _reason(model: Any, rules: Rules, target: str, rows: Rows | None) -> str:
    """Why a stored weight cannot stay quantized in a model; empty if it can."""
    if rows is None:
        kind = type(getattr(rules, "processor", rules)).__name__
        return f"Transformers computes it from the values of stored tensors ({kind})"
    owner, _, leaf = target.rpartition(".")
    module = model.get_submodule(owner)
    weight = module._parameters.get(leaf)
    kind = None if weight is None else weight_kind(module, leaf, weight)
    if kind is None or kind[1:] != (len(rows.shape) - 2, rows.transposed):
        return f"the {leaf} of {type(module).__name__} is not one that can be quantized"
    if kind[0] == "experts":
        return ""
    return reason_for_float(module, weight, *kind[1:]) or ""
