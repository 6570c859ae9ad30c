"""optimum-quanto's quantize, freeze, requantize and quantization_map."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.foreign.quanto_files import drop_old_metadata
from requanto.checkpoint.format import CheckpointError
from requanto.config.few_bits import warn_few_bits
from requanto.config.plan import parameter_holders
from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.integrations.optimum_quanto.modules import QModuleMixin, registry
from requanto.nn.swap import quantize_in_place, restore_float_class
from requanto.scales.optimizers import Optimizer
from requanto.scales.quanto import group_size_rule


def quantize(
    model: nn.Module,
    weights: str | qtype | None = None,
    activations: str | qtype | None = None,
    optimizer: Optimizer | None = None,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> None:
    """Replaces Linear, Conv2d and (with activations) LayerNorm modules by quantized modules, in place.

    Args:
        model: any module, or a single layer.
        weights, activations: types or their names.
        optimizer: how scales are found; None: absmax for 8 bits, minimum and maximum for fewer.
        include, exclude: shell patterns for full dotted names.

    Raises:
        ValueError: a module is already frozen with another type.
    """
    kind = None if weights is None else resolve_qtype(weights)
    activation = None if activations is None else resolve_qtype(activations)
    warn_few_bits((kind,))
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    for name, module in list(model.named_modules()):
        if include is not None and not any(fnmatch(name, pattern) for pattern in include):
            continue
        if exclude is not None and any(fnmatch(name, pattern) for pattern in exclude):
            continue
        _quantize_one(module, name, kind, activation, optimizer)


def _quantize_one(
    module: nn.Module, name: str, kind: qtype | None, activation: qtype | None, optimizer: Optimizer | None
) -> None:
    if isinstance(module, QModuleMixin):
        if module.frozen:
            if (module.weight_qtype, module.activation_qtype) == (kind, activation):
                return
            raise ValueError(
                f"{name or type(module).__name__} is already frozen as {module.weight_qtype.name} and has no float weights "
                f"any more: quantize a float model"
            )
        if not restore_float_class(module):
            return
    if quantize_in_place(module, kind, activation, optimizer, None, None, name, registry):
        # optimum-quanto derives the group size from the shape; it is not an argument.
        small = isinstance(module, QModuleMixin) and module.weight_qtype is not None and module.weight_qtype.bits < 8
        if small:
            module.weight_group_size = group_size_rule(module.weight.shape)


def freeze(model: nn.Module) -> None:
    """Replaces float weights by quantized ones; a weight that several modules share is quantized once."""
    shared: dict[int, Any] = {}
    alive: list[Any] = []  # holds the float weights so that their ids are not reused
    for module in model.modules():
        if not isinstance(module, QModuleMixin) or module.weight_qtype is None or module.frozen:
            continue
        weight = module.weight
        known = shared.get(id(weight))
        if known is not None and known.qtype == module.weight_qtype:
            module.weight = known
            continue
        module.freeze()
        shared[id(weight)] = module.weight
        alive.append(weight)


def quantization_map(model: nn.Module) -> dict[str, dict[str, str]]:
    """Returns {module name: {"weights": type, "activations": type}}; ``"none"`` means float."""
    return {
        name: {
            "weights": "none" if module.weight_qtype is None else module.weight_qtype.name,
            "activations": "none" if module.activation_qtype is None else module.activation_qtype.name,
        }
        for name, module in model.named_modules()
        if isinstance(module, QModuleMixin)
    }


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    quantization_map: Mapping[str, Mapping[str, str]],
    device: torch.device | str | None = None,
) -> None:
    """Loads a quantized state dict into a float model, in place; tensors are assigned, not copied.

    Raises:
        CheckpointError: quantization_map, tensors and model disagree.
    """
    if device is None:
        device = next(model.parameters()).device
        device = torch.device("cpu") if device.type == "meta" else device
    modules = dict(model.named_modules())
    for name, entry in quantization_map.items():
        if name not in modules:
            raise CheckpointError(f"the quantization map names {name!r}, which the model does not have")
        kinds = [
            None if entry[key] in (None, "none") else resolve_qtype(entry[key]) for key in ("weights", "activations")
        ]
        _quantize_one(modules[name], name, *kinds, None)
        if not isinstance(modules[name], QModuleMixin):
            raise CheckpointError(
                f"the quantization map names {name!r}, but a {type(modules[name]).__name__} cannot be quantized"
            )
    state = dict(state_dict)
    drop_old_metadata(state, quantization_map)
    tied = {key: group for group in _shared_names(model) for key in group}
    result = model.load_state_dict(state, strict=False, assign=True)
    given = set(state)
    missing = [
        key for key in result.missing_keys
        if not key.endswith((".input_scale", ".output_scale")) and not any(other in given for other in tied.get(key, ()))
    ]  # fmt: skip
    extra = [key for key in result.unexpected_keys if ".weight._" not in key]
    if missing or extra:
        raise CheckpointError(
            f"map, tensors and model disagree: missing {', '.join(missing[:8]) or 'nothing'}; unexpected "
            f"{', '.join(extra[:8]) or 'nothing'}"
        )
    for module in model.modules():
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                scale = leaf in ("input_scale", "output_scale")
                module._buffers[leaf] = (torch.ones_like if scale else torch.empty_like)(buffer, device=device)
    model.to(device)


def _shared_names(model: nn.Module) -> list[list[str]]:
    names = {id(module): name for name, module in model.named_modules()}
    return [
        [f"{names[id(module)]}.{leaf}".lstrip(".") for module, leaf in places]
        for places in parameter_holders(model).values()
        if len(places) > 1
    ]
