"""Folds rotations and column scales into a float model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from requanto.transforms.columns import Scale, fold_columns
from requanto.transforms.inputs import trial_inputs
from requanto.transforms.rotation import rotate_stream, rotate_values
from requanto.transforms.twin import Inexact, Twin, check_float

logger = logging.getLogger(__name__)

#: attribute of a model's config, and key of its config.json, that names what was folded into the float weights
RECORD = "requanto_folded"


@dataclass
class Folded:
    """What was folded into a model.

    Attributes:
        done: ``"rotation"`` (residual stream), ``"value_rotation"`` and ``"column_scale"``, those that were done.
        columns: names of the weights whose column scales were folded.
        left: names of the weights for which no fold is exact.
        reasons: why something was left out.
        untied: names of parameters that shared a tensor with another and no longer do.
    """

    done: list[str] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)
    untied: set[str] = field(default_factory=set)


@torch.no_grad()
def fold_model(
    model: nn.Module,
    *,
    rotation: bool = False,
    column_scale: Scale | None = None,
    names: Iterable[str] = (),
    inputs: Any = None,
    seed: int = 0,
) -> Folded:
    """Folds rotations, then column scales, into a float model in place; its output stays the same to rounding.

    The work is done on a copy in float32 (small models: float64). The model is changed at the end, or not at all.

    Args:
        model: a float model, all in memory.
        rotation: rotate the residual stream and the values of attention.
        column_scale: computes the scale of each column of a matrix; None: no column scales are folded.
        names: full names of the weights that will be quantized, whose columns are scaled.
        inputs: inputs for trials (`requanto.transforms.inputs`).
        seed: of the rotations.

    Raises:
        ValueError: the model cannot be run, or no rotation is exact; the model is as before.
    """
    check_float(model)
    arguments = trial_inputs(model, inputs)
    found = Folded()
    try:
        twin = Twin(model, arguments)
        if rotation:
            twin = _rotated(model, arguments, twin, found, seed)
        if column_scale is not None:
            found.columns, found.left = fold_columns(twin, set(names), column_scale)
            if found.columns:
                found.done.append("column_scale")
            if found.left:
                logger.warning(
                    "column scales of %d of %d weights are folded; the others (e.g. %s) have no norm or layer before them "
                    "that takes the inverse exactly",
                    *(len(found.columns), len(found.columns) + len(found.left), min(found.left)),
                )
        twin.write_back()
    except Inexact as error:
        raise ValueError(f"{type(model).__name__} was left as it was: {error}") from None
    found.untied = twin.untied
    _record(model, twin.untied, found)
    return found


def _rotated(model: nn.Module, arguments: Any, twin: Twin, found: Folded, seed: int) -> Twin:
    """Rotates a copy; returns the copy, or a new one if the residual stream could not be rotated."""
    try:
        logger.info("residual stream rotated: %s", rotate_stream(twin, seed))
        found.done.append("rotation")
    except Inexact as error:
        found.reasons.append(str(error))
        twin = Twin(model, arguments)
    values = rotate_values(twin, seed)
    if values:
        logger.info("values of attention rotated: %d layers", len(values))
        found.done.append("value_rotation")
    if not found.done:
        raise Inexact(
            f"rotation='fold' found no exact rotation: {found.reasons[0]}; no layer reads rotated values either"
        )
    if found.reasons:
        logger.warning("the residual stream is not rotated, only the values of attention: %s", found.reasons[0])
    return twin


def _record(model: nn.Module, untied: set[str], found: Folded) -> None:
    """Writes what was folded into the model's config, and that weights are no longer tied."""
    config = getattr(model, "config", None)
    if untied:
        size = sum(model.get_parameter(name).nbytes for name in untied)
        logger.warning(
            "%s had one tensor with the embedding table and now has its own, since the last norm's weight is multiplied "
            "into it: %.1f MB more, unless it is quantized too",
            *(", ".join(sorted(untied)), size / 1e6),
        )
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        for one in (config, text):
            if getattr(one, "tie_word_embeddings", False):
                one.tie_word_embeddings = False
        for name, module in model.named_modules():
            tied = vars(module).get("all_tied_weights_keys")
            if isinstance(tied, dict):
                prefix = f"{name}." if name else ""
                for key in [key for key in tied if f"{prefix}{key}" in untied]:
                    del tied[key]
    if found.done and config is not None and hasattr(config, "to_dict") and not isinstance(config, dict):
        earlier = list(getattr(config, RECORD, None) or [])
        setattr(config, RECORD, [*earlier, *(one for one in found.done if one not in earlier)])
