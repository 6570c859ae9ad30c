"""What `QuantoConfig` and `requanto.quantize` ask to fold, and folding it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from requanto.config.config import QuantoConfig
from requanto.config.plan import PlannedWeight
from requanto.scales.columns import DEFAULT_KIND, best_column_scale, check_column_scale, column_scale
from requanto.scales.rotation import FOLD
from requanto.transforms.fold import Folded, fold_model
from requanto.transforms.weights import float_weights


def fold_asked(
    model: nn.Module,
    names: Iterable[str],
    *,
    rotation: bool,
    columns: bool,
    kind: bool | str | None = None,
    best: Iterable[str] = (),
    inputs: Any = None,
) -> Folded:
    """Folds rotations, column scales or both into a float model in place.

    Args:
        model: a float model.
        names: full names of the parameters that will be quantized.
        rotation, columns: what is folded.
        kind: of the column scale, as in `QuantoConfig`; None and True: the best one of the weights.
        best: the best kinds of the weights (`best_column_scale`); if they differ, it is `DEFAULT_KIND`.
        inputs: see `requanto.transforms.inputs`.

    Raises:
        ValueError: ``kind`` is False, the model cannot be run, or no rotation is exact.
    """
    found = check_column_scale(kind)
    if columns and found is False:
        raise ValueError(
            "fold=True folds column scales, and column_scale=False asks for none: leave one of the two out"
        )
    asked = set(names)
    if columns and not asked:
        raise ValueError("fold=True folds the column scales of weights that are quantized, and none is: set weights=")
    if not isinstance(found, str):
        kinds = set(best)
        found = kinds.pop() if len(kinds) == 1 else DEFAULT_KIND
    scale = functools.partial(column_scale, kind=found) if columns else None
    return fold_model(model, rotation=rotation, column_scale=scale, names=asked, inputs=inputs)


def asks_for_fold(config: QuantoConfig) -> bool:
    """Whether a config asks for a transformation of the whole float model."""
    return bool(config.fold) or config.rotation == FOLD


@torch.no_grad()
def fold_planned(
    model: nn.Module, config: QuantoConfig, planned: dict[str, PlannedWeight], inputs: Any = None
) -> Folded | None:
    """Does what a config asks for before the planned weights are quantized; None if it asks for nothing.

    The config then no longer asks: the checkpoint's weights are as any others. Weights whose column scales were folded get
    none of their own.

    Args:
        model: the float model.
        config: the user's config.
        planned: full parameter name -> how it is quantized; a head that no longer shares its weight is added.
        inputs: see `requanto.transforms.inputs`.

    Raises:
        ValueError: as `fold_asked`.
    """
    if not asks_for_fold(config):
        return None
    kinds = {w.name for w in float_weights(model) if w.kind != "embedding"}
    names = {n for n, one in planned.items() if one.options.column_scale is not False and n in kinds}
    shared = {id(model.get_parameter(name)): name for name in planned}
    tied = {n: shared[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in shared}
    options = [planned[name].options for name in names]
    found = fold_asked(
        model,
        names,
        rotation=config.rotation == FOLD,
        columns=bool(config.fold),
        kind=config.column_scale,
        best={best_column_scale(o.qtype, o.scale_bits) for o in options if not o.auto},
        inputs=inputs,
    )
    for name in found.untied:
        if name in tied and name not in planned:
            planned[name] = planned[tied[name]]
    for name in found.columns:
        planned[name].options.column_scale = False
    config.fold, config.rotation = None, None if config.rotation == FOLD else config.rotation
    return found
