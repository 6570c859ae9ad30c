"""Merging adapters into quantized weights, and unmerging them bit for bit.

PEFT merges with ``weight.data += delta``; a weight of few bits would lose most of the delta to rounding. LoRA's two factors
are stored as a low-rank term next to the codes. For any other method PEFT's own merge runs on a float copy of the layer
(`peft_twin`), and the change of the weight that it makes is stored exactly or refused (`requanto.tensor.exact`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from requanto.integrations import peft_lora
from requanto.integrations.peft_twin import float_twin
from requanto.integrations.peft_undo import all_or_nothing
from requanto.runtime.tracing import without_autocast
from requanto.tensor import exact, lowrank
from requanto.tensor.qtensor import QTensor

#: attribute of a layer: adapter -> what undoes its merge
_RECORDS = "_requanto_merged"

WAYS_ON = (
    "Leave the adapter unmerged; or dequantize the model (model.dequantize()) and merge then; or merge it into the "
    "float model and quantize that."
)


@dataclass
class _Merged:
    """What is needed to undo one merge, by names of the base layer's parameters."""

    before: dict[str, lowrank.State]
    after: dict[str, lowrank.State]
    terms: dict[str, tuple[torch.Tensor, torch.Tensor]]
    floats: dict[str, torch.Tensor]


def quantized_weights(layer: Any) -> dict[str, QTensor]:
    """The quantized parameters of the layer below an adapter, by name.

    Raises:
        NotImplementedError: one is sharded over several ranks.
    """
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
    if not isinstance(base, nn.Module):
        return {}
    found = {}
    for name, parameter in base.named_parameters():
        if isinstance(getattr(parameter, "_local_tensor", None), QTensor):
            raise NotImplementedError(
                "the quantized weight is sharded over several ranks (a DTensor): save the adapter, then load model and "
                "adapter in one process and merge there"
            )
        if isinstance(parameter, QTensor):
            found[name] = parameter
    return found


@torch.no_grad()
def merge(original: Callable, layer: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
    """Merges adapters into the quantized weights of one layer; always checks for NaN. If one is refused, none is merged.

    Args:
        original: the merge of the layer's class.
        layer: the adapter layer.
        safe_merge: PEFT's; a merge here is always safe.
        adapter_names: the adapters; None: the active ones.
    """
    with all_or_nothing(layer, values=True):
        for adapter in check_adapters_to_merge(layer, adapter_names):
            if peft_lora.has_factors(layer, adapter) and peft_lora.weight_of(layer) is not None:
                if adapter in peft_lora.own_adapters(layer):
                    _merge_factors(layer, adapter)
            else:
                _merge_twin(original, layer, adapter)


def _records(layer: Any) -> dict[str, _Merged]:
    return layer.__dict__.setdefault(_RECORDS, {})


def _merge_factors(layer: Any, adapter: str) -> None:
    weight = peft_lora.weight_of(layer)
    assert weight is not None
    up, down = peft_lora.factors(layer, adapter)
    rows = None
    if layer.lora_variant.get(adapter) is not None:
        earlier = [_records(layer)[name] for name in layer.merged_adapters if name in _records(layer)]
        base = earlier[0].before[_name_of(layer, weight)].weight(weight) if earlier else weight
        rows = peft_lora.dora_factor(layer, adapter, base, up, down)
    bias = peft_lora.bias_after(layer, adapter)
    _check_finite(adapter, up, down, rows, bias)
    if rows is not None and not bool((rows > 0).all()):
        raise NotImplementedError(
            f"adapter {adapter!r} (DoRA) cannot be merged exactly: {int((rows <= 0).sum())} of its magnitudes are not "
            f"positive, and the scale of a row has to be. {WAYS_ON}"
        )

    def change() -> None:
        lowrank.append(weight, up.to(weight.dtype), down.to(weight.dtype))
        if rows is not None:
            lowrank.scale_rows(weight, rows)

    name = _name_of(layer, weight)
    terms = {} if rows is not None else {name: (up.clone(), down.clone())}
    _record(layer, adapter, {name: weight}, terms, {} if bias is None else {"bias": bias}, change)


def _name_of(layer: Any, weight: QTensor) -> str:
    return next(name for name, found in quantized_weights(layer).items() if found is weight)


def _check_finite(adapter: str, *tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")


def _merge_twin(original: Callable, layer: Any, adapter: str) -> None:
    """Runs PEFT's merge on a float copy of the layer, and makes the same change to the quantized weights."""
    weights = quantized_weights(layer)
    twin = float_twin(layer)
    twin.merged_adapters = []
    base = twin.get_base_layer()
    names = [adapter]
    records = [_records(layer).get(name) for name in layer.merged_adapters]
    if records and all(record is not None for record in records) and _unchanged_since(records[-1], weights):
        # Some methods compute all updates from the weight without adapters, so earlier ones are merged again with this one.
        names = [*layer.merged_adapters, adapter]
        for record in reversed(records):
            for name, state in record.before.items():  # type: ignore[union-attr]
                _parameter(base, name).data = state.weight(weights[name]).dequantize(torch.float32)
            for name, value in record.floats.items():  # type: ignore[union-attr]
                _parameter(base, name).data = value.clone()
    with without_autocast(next(iter(weights.values())).device):  # it would round the update
        original(twin, safe_merge=True, adapter_names=names)

    after = dict(base.named_parameters())
    method = type(layer).__module__.split(".")[-2]
    changes = {}
    for name, weight in weights.items():
        try:
            if name not in after or after[name].shape != weight.shape:
                raise NotImplementedError("the merge replaces the weight by one of another shape.")
            changes[name] = exact.plan(weight, after[name].data)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"adapter {adapter!r} ({method}) cannot be merged exactly into {name}: {error} {WAYS_ON}"
            ) from error
        except ValueError as error:
            _check_finite(adapter, after[name])
            raise ValueError(f"adapter {adapter!r} ({method}): {error}") from error
    floats = {}
    for name, parameter in layer.get_base_layer().named_parameters():
        if name not in weights and name in after and not torch.equal(parameter.float(), after[name].float()):
            _check_finite(adapter, after[name])
            floats[name] = after[name].to(parameter.dtype)
    if adapter not in twin.merged_adapters and not floats and not any(changes.values()):
        return  # the layer does not have this adapter
    changed = {name: weights[name] for name, found in changes.items() if found is not None}
    terms = {n: (c.up, c.down) for n, c in changes.items() if c is not None and c.up is not None and c.down is not None}

    def change() -> None:
        for name, found in changes.items():
            if found is not None:
                found.apply(weights[name])

    _record(layer, adapter, changed, terms, floats, change)


def _unchanged_since(record: _Merged | None, weights: dict[str, QTensor]) -> bool:
    return record is not None and all(state.matches(weights[name]) for name, state in record.after.items())


def _parameter(module: nn.Module, name: str) -> Any:
    return module.get_parameter(name)


def _record(
    layer: Any,
    adapter: str,
    weights: dict[str, QTensor],
    terms: dict[str, tuple[torch.Tensor, torch.Tensor]],
    floats: dict[str, torch.Tensor],
    change: Callable[[], None],
) -> None:
    """Makes a change and records how to undo it."""
    base = layer.get_base_layer()
    before = {name: lowrank.State.of(weight) for name, weight in weights.items()}
    old = {name: _parameter(base, name).data for name in floats}
    change()
    for name, value in floats.items():
        _parameter(base, name).data = value
    after = {name: lowrank.State.of(weight) for name, weight in weights.items()}
    _records(layer)[adapter] = _Merged(before, after, terms, old)
    layer.merged_adapters.append(adapter)


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """Undoes all merges of a layer in reverse order. If one is refused, none is undone."""
    with all_or_nothing(layer, values=True):
        while layer.merged_adapters:
            adapter = layer.merged_adapters.pop()
            record = _records(layer).pop(adapter, None)
            if record is None:
                raise RuntimeError(
                    f"adapter {adapter!r} was merged before the weight was quantized, so it cannot be unmerged"
                )
            for name, before in record.before.items():
                _undo(adapter, quantized_weights(layer)[name], before, record.after[name], record.terms.get(name))
            for name, value in record.floats.items():
                parameter = _parameter(layer.get_base_layer(), name)
                parameter.data = value.to(parameter.device)


def _undo(
    adapter: str,
    weight: QTensor,
    before: lowrank.State,
    after: lowrank.State,
    term: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    if after.matches(weight):
        before.restore(weight)
    elif term is None:
        raise RuntimeError(
            f"adapter {adapter!r} cannot be unmerged: it multiplied rows or columns of the weight, and after that another "
            f"layer that shares the weight changed it. Unmerge in the reverse order of merging, or load the model again."
        )
    else:  # another layer that shares the weight merged later: subtract only this term
        up, down = term
        lowrank.append(weight, -up.to(weight.device), down)
        lowrank.compress(weight)
