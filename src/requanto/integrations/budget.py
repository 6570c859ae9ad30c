"""``weights="auto"`` in from_pretrained: measures the weights in the checkpoint's files and chooses types before loading."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from requanto.budget.models import resolve
from requanto.config.config import QuantoConfig
from requanto.config.plan import PlannedWeight


class StoredPieces:
    """Callable: parameter name -> the stored tensors that make up the parameter, read one at a time.

    Args:
        files: safetensors files of the checkpoint.
        target: maps the name of a stored tensor to the parameter that it becomes, or becomes a part of.
    """

    def __init__(self, files: Sequence[str | os.PathLike], target: Callable[[str], str]) -> None:
        self._where: dict[str, list[tuple[str, str]]] = {}
        for file in files:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    self._where.setdefault(target(key), []).append((str(file), key))

    def __call__(self, name: str) -> list[torch.Tensor]:
        """Returns the stored tensors of a parameter, memory-mapped."""
        found = []
        for file, key in self._where.get(name, ()):
            with safe_open(file, framework="pt") as opened:
                found.append(opened.get_tensor(key))
        return found


def resolve_from_files(
    model: nn.Module,
    config: QuantoConfig,
    planned: dict[str, PlannedWeight],
    files: Sequence[str | os.PathLike] | None,
    target: Callable[[str], str] = str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, PlannedWeight]:
    """Returns the plan with a type chosen for every layer, and records the choices in ``config``.

    Args:
        model: on the meta device, in the dtype that it is loaded in.
        config, planned: see `requanto.budget.resolve`.
        files: the checkpoint's files.
        target: see :class:`StoredPieces`.
        state: the weights by name, if they are in memory rather than in files.

    Raises:
        ValueError: no safetensors files, or the budget is too small.
    """
    if not any(choice.options.auto for choice in planned.values()):
        return planned
    if state is not None:
        chosen = resolve(model, config, planned, lambda name: [state[name]] if name in state else [])
        return planned if chosen is None else chosen.planned
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(
            f"weights='auto' measures the weights in the checkpoint's .safetensors files, but the checkpoint has other "
            f"files or none ({', '.join(map(str, files or ())) or 'a state dict'}). Load the float model, then call "
            f"requanto.quantize(model, weights='auto', ...) and requanto.freeze(model)"
        )
    chosen = resolve(model, config, planned, StoredPieces(files, target))
    return planned if chosen is None else chosen.planned


def resolve_for_transformers(
    model: Any, config: QuantoConfig, planned: dict[str, PlannedWeight], files: Sequence[str | os.PathLike] | None
) -> dict[str, PlannedWeight]:
    """Does :func:`resolve_from_files` with the names that Transformers gives to stored weights."""
    if not any(choice.options.auto for choice in planned.values()):
        return planned
    return resolve_from_files(model, config, planned, files, transformers_names(model))


def transformers_names(model: Any) -> Callable[[str], str]:
    """Returns a function from stored name to parameter name, as Transformers renames and merges weights on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model, None, None) or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    shapes: Mapping[str, torch.Tensor] = model.state_dict()

    def target(key: str) -> str:
        return rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)[0]

    return target
