"""torch's own ``load_state_dict`` and ``AveragedModel`` with quantized weights."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import swa_utils

from requanto.checkpoint.state_dict import check_joined, join_described
from requanto.tensor.aten import copy_
from requanto.tensor.float_targets import assign_frozen
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


def register() -> None:
    """Patches ``nn.Module`` and ``AveragedModel``; models without quantized weights are not affected."""
    if not hasattr(nn.Module.load_state_dict, "_requanto"):
        nn.Module.load_state_dict = _wrap_load_state_dict(nn.Module.load_state_dict)  # type: ignore[method-assign]
    averaged = swa_utils.AveragedModel
    if not hasattr(averaged.update_parameters, "_requanto"):
        averaged.update_parameters = _wrap_update_parameters(averaged.update_parameters)  # type: ignore[method-assign]


# ---------------------------------------------------------------------- load_state_dict


def _wrap_load_state_dict(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_state_dict(
        self: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        if not isinstance(state_dict, Mapping):
            return original(self, state_dict, strict=strict, assign=assign)
        joined = _joined(self, state_dict)
        quantized = [name for name, value in joined.items() if isinstance(value, QTensor)]
        if not assign or not quantized:
            return original(self, joined, strict=strict, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        with assign_frozen():
            result = original(self, joined, strict=strict, assign=assign)
        frozen = [name for name in quantized if name in trained]
        if frozen:
            logger.info(
                "load_state_dict(assign=True): %d parameters that required gradients are quantized weights now and do not "
                "train, e.g. %s",
                len(frozen),
                frozen[0],
            )
        return result

    load_state_dict._requanto = True  # type: ignore[attr-defined]
    return load_state_dict


def _joined(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict with the parts of each described weight joined; the same object if there are none.

    Raises:
        CheckpointError: it holds parts of one of the model's parameters without their description. With strict=False they
            would be ignored, and the parameter would keep its old values.
    """
    found: Mapping[str, Any] = state_dict
    if any(isinstance(key, str) and key.endswith("_spec") for key in state_dict):
        found = OrderedDict(join_described(state_dict))
        if hasattr(state_dict, "_metadata"):
            found._metadata = state_dict._metadata  # type: ignore[attr-defined]
    check_joined(found, model)
    return found


# ---------------------------------------------------------------------- AveragedModel


def _wrap_update_parameters(original: Callable) -> Callable:
    """Averages the float parameters only: a quantized weight is frozen, and the average of equal weights is that weight."""

    @functools.wraps(original)
    def update_parameters(self: Any, model: nn.Module) -> None:
        pairs = list(zip(self.module.named_parameters(), model.parameters()))
        quantized = [(name, mine, theirs) for (name, mine), theirs in pairs if isinstance(theirs, QTensor)]
        if not quantized:
            original(self, model)
            return
        first = bool(self.n_averaged == 0)
        for name, mine, theirs in quantized:
            _check_average(name, mine, theirs, first)
        for _, mine, theirs in quantized:
            if first:
                with torch.no_grad():
                    copy_(mine, theirs)
        with _only_float(self), _only_float(self.module), _only_float(model):
            original(self, model)

    update_parameters._requanto = True  # type: ignore[attr-defined]
    return update_parameters


def _check_average(name: str, mine: Any, theirs: QTensor, first: bool) -> None:
    if isinstance(mine, QTensor) and (first or mine._storage is theirs._storage):
        return
    other = theirs.detach().to(mine.device)
    if not isinstance(mine, QTensor) or not torch.equal(mine.detach(), other):
        raise ValueError(
            f"{name} is a quantized weight that has changed since the last average (for example, an adapter was merged into "
            f"it). Codes cannot be averaged: average the adapter before merging it, or make a new AveragedModel."
        )


@contextlib.contextmanager
def _only_float(module: nn.Module) -> Iterator[None]:
    """Within the block, ``module.parameters()`` leaves out quantized weights."""
    parameters = module.parameters

    def only_float(recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for parameter in parameters(recurse) if not isinstance(parameter, QTensor))

    module.__dict__["parameters"] = only_float
    try:
        yield
    finally:
        module.__dict__.pop("parameters", None)
