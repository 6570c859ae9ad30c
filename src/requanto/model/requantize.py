"""requantize: loads a quantized state dict into a float model, without a second copy in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.digests import digest_of
from requanto.checkpoint.foreign.quanto_files import PARTS, checked_map, drop_old_metadata, to_qtensor
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.state_dict import SPEC
from requanto.checkpoint.values import check_values
from requanto.config import checks
from requanto.config.plan import parameter_holders
from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.model.quantize import progress, weight_options
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules as registry
from requanto.nn.swap import quantize_in_place, restore_float_class
from requanto.runtime.settings import settings
from requanto.scales.compact import check_scale_bits, check_zero_point
from requanto.scales.rotation import check_rotation
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import PART_NAMES, WeightSpec

_OWN_PARTS = tuple(f"_{part}" for part in PART_NAMES)


def requantize(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    quantization_map: Mapping[str, Mapping[str, Any]],
    device: torch.device | str | None = None,
    *,
    fold_lowrank: bool = False,
) -> nn.Module:
    """Loads quantized weights into a float model, in place.

    Each tensor is read from ``state_dict`` once, so the model may be on the meta device, and a lazy mapping
    (`requanto.checkpoint.shards.SafetensorsFiles`) is read one tensor at a time.

    Args:
        model: the float model, with weights or on the meta device.
        state_dict: the ``state_dict()`` of a quantized model, saved with torch.save; or flat tensors, Requanto's
            (``weight_qdata`` ...) or optimum-quanto's (``weight._data`` ...).
        quantization_map: the result of :func:`requanto.quantization_map` (or optimum-quanto's).
        device: device for the model; None: its present device, or the CPU if it is on the meta device.
        fold_lowrank: round merged adapters into the codes (`lowrank.fold_lowrank`, which returns the loss of each);
            False: they stay low-rank terms, exactly.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: map and tensors disagree, or tensors are missing, unexpected, or of the wrong shape. The model is
            then not usable.
    """
    device = torch.device(device) if device is not None else _device_of(model)
    checked_map(quantization_map, "the quantization map")
    source = _Source(state_dict, quantization_map)
    modules = dict(model.named_modules())
    holders = parameter_holders(model)
    placed: dict[int, QTensor] = {}  # by id; holds the weights so that ids stay unique
    for name, entry in progress(list(quantization_map.items()), "loading", sum(p.numel() for p in model.parameters())):
        module, leaf = _find(modules, name)
        kind = _kind(entry, "weights", name)
        activation = _kind(entry, "activations", name)
        parameter = module._parameters.get(leaf)
        if kind is not None and parameter is None:
            raise CheckpointError(f"the map quantizes {name!r} ({type(module).__name__}), which has no {leaf}")
        full = f"{name}.weight".lstrip(".") if leaf == "weight" else name
        weight = None
        if kind is not None and id(parameter) in placed:
            source.check_same(full, kind, parameter, entry)  # shared with an earlier module
            weight = parameter
        elif kind is not None:
            weight = source.weight(full, kind, parameter, _is_transposed(module), entry)
        if weight is not None and entry.get("digest") is not None:
            _check_digest(full, weight, activation, entry["digest"])
        if activation is not None or (kind is not None and weight is None):
            _make_qmodule(module, name, kind, activation, entry)
        if weight is not None:
            new = parameter
            if weight is not parameter:
                new = nn.Parameter(weight.to(device), requires_grad=False)
                for holder, place in holders[id(parameter)]:
                    holder._parameters[place] = new
                placed[id(new)] = new
            if isinstance(module, QModuleMixin):
                module.sync_activation()
            elif activation is not None:
                new.activation = activation
    _load_rest(model, source, device)
    model.to(device)
    for module in model.modules():
        if isinstance(module, QModuleMixin) and module.activation_qtype is not None:
            module.refresh_calibrated()
    if fold_lowrank:
        lowrank.fold_lowrank(model)
    return model


class _Source:
    """A state dict whose keys are read once.

    Attributes:
        left: keys that were not read yet.
    """

    def __init__(self, state_dict: Mapping[str, Any], qmap: Mapping[str, Mapping[str, Any]]) -> None:
        self.state = state_dict
        old = {key: state_dict[key] for key in state_dict if key.endswith((".qtype", ".axis", ".size", ".stride"))}
        self.left = dict.fromkeys(state_dict)
        if old:
            needed = dict(old)
            drop_old_metadata(needed, qmap)
            for key in old.keys() - needed.keys():
                del self.left[key]

    def take(self, key: str) -> Any:
        del self.left[key]
        return self.state[key]

    def check_same(self, name: str, kind: qtype, placed: QTensor, entry: Mapping[str, Any]) -> None:
        """Reads another name of a shared weight, if the state dict has it, and checks that it is the same weight."""
        if not any(name + part in self.left for part in ("", *_OWN_PARTS, *PARTS)):
            return
        again = self.weight(name, kind, placed, placed.transposed, entry)
        if again is None or not torch.equal(again.to(placed.device), placed):
            raise CheckpointError(
                f"{name} shares its weight with another module, and the checkpoint has two different weights for them"
            )

    def weight(
        self, name: str, kind: qtype, parameter: torch.Tensor, transposed: bool, entry: Mapping[str, Any]
    ) -> QTensor | None:
        """The quantized weight, or None if the state dict has a float one (the model was not frozen)."""
        if name in self.left:
            value = self.state[name]
            if not isinstance(value, QTensor):
                return None
            if value.qtype != kind or value.shape != parameter.shape:
                raise CheckpointError(
                    f"{name}: the map says {kind.name} and the model {tuple(parameter.shape)}, the state dict holds "
                    f"{value.qtype.name} {tuple(value.shape)}"
                )
            check_values(value._spec, value.inner_tensors(), name)
            return self.take(name)
        own = {part: self.take(name + part) for part in _OWN_PARTS if name + part in self.left}
        if own:
            if f"{name}_{SPEC}" in self.left:  # a file of safetensors' or accelerate's own functions
                self.take(f"{name}_{SPEC}")
            return _from_own_parts(own, kind, parameter, transposed, name, entry)
        parts = {part: self.take(name + part) for part in PARTS if name + part in self.left}
        return to_qtensor(parts, kind, parameter.shape, name)


def _from_own_parts(
    parts: Mapping[str, torch.Tensor],
    kind: qtype,
    parameter: torch.Tensor,
    transposed: bool,
    name: str,
    entry: Mapping[str, Any],
) -> QTensor:
    absent = [part for part in ("_qdata", "_scale") if not isinstance(parts.get(part), torch.Tensor)]
    if absent or not all(isinstance(part, torch.Tensor) for part in parts.values()):
        raise CheckpointError(
            f"{name} is {kind.name} according to the map, and the state dict has no tensor {name}{(absent or ['...'])[0]} "
            f"(it has {', '.join(name + part for part in parts)})"
        )
    shape = list(parameter.shape)
    if transposed:
        shape[-1], shape[-2] = shape[-2], shape[-1]
    axis = 1 if len(shape) == 3 and parts["_scale"].dim() == 3 else 0
    length = torch.Size(shape[axis + 1 :]).numel()
    bits = check_scale_bits(entry.get("scale_bits"), f"scale_bits of {name}")
    group = checks.group_size_value(entry.get("group_size"), f"group_size of {name} in the map")
    if bits is None:
        groups = parts["_scale"].shape[-1] if parts["_scale"].dim() else 0
    else:
        groups = length // (group if group not in (None, -1) else length)
    if not groups or length % groups:
        raise CheckpointError(f"{name}: {groups} scales a row do not divide its {length} weights")
    own = {part[1:]: tensor for part, tensor in parts.items()}
    if not kind.is_learned:
        own.pop("codebook", None)
    try:
        spec = WeightSpec(
            qtype=kind,
            shape=torch.Size(shape),
            dtype=parameter.dtype if parameter.is_floating_point() else parts["_scale"].dtype,
            axis=axis,
            group_size=None if groups == 1 and bits is None else length // groups,
            affine="shift" in own,
            transposed=transposed,
            scale_bits=bits,
            rotation=check_rotation(entry.get("rotation"), f"rotation of {name}"),
            column="column" in own,
            zeros=check_zero_point(entry.get("zero_point"), f"zero_point of {name}") is not None,
            signed=entry.get("signed") is True,
            scale_block=checks.group_size_value(entry.get("scale_block"), f"scale_block of {name} in the map"),
            order="order" in own,
        )
        tensor = QTensor._of(spec, own)
    except ValueError as error:
        raise CheckpointError(
            f"{name} is {kind.name} according to the map (scale_bits={bits}); map and tensors disagree: {error}"
        ) from error
    check_values(spec, own, name)
    return tensor


def _check_digest(name: str, weight: QTensor, activation: qtype | None, wanted: Any) -> None:
    if settings.check_digests and (found := digest_of(weight, activation)) != wanted:
        raise CheckpointError(
            f"{name}: the tensors that were loaded have the digest {found}, but the map says "
            f"{checks.shown(wanted)}. The file or "
            f"the map is damaged, was edited, or belongs to another save (REQUANTO_CHECK_DIGESTS=0 loads it all the same)"
        )


def _make_qmodule(
    module: nn.Module, name: str, kind: qtype | None, activation: qtype | None, entry: Mapping[str, Any]
) -> None:
    if isinstance(module, QModuleMixin):
        restore_float_class(module)
    group, symmetric = entry.get("group_size", "default"), entry.get("symmetric")
    options = weight_options(
        **{k: entry.get(k) for k in ("scale_bits", "search", "rotation", "low_rank", "column_scale", "zero_point")}
    )
    if not quantize_in_place(module, kind, activation, None, group, symmetric, name, registry, options):
        raise CheckpointError(f"the map quantizes {name!r}, and {type(module).__name__} has no quantized counterpart")


def _load_rest(model: nn.Module, source: _Source, device: torch.device) -> None:
    """Loads float parameters and buffers; raises if a tensor is missing or unexpected."""
    holders = parameter_holders(model)
    missing, done = [], set()
    placed: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, old in list(module._parameters.items()) + list(module._buffers.items()):
            key = f"{module_name}.{leaf}" if module_name else leaf
            if old is None or isinstance(old, QTensor):
                source.left.pop(key, None)  # another name of a shared weight
                continue
            persistent = leaf not in module._non_persistent_buffers_set
            if id(old) in placed:  # shared with an earlier module, already loaded
                if key in source.left and not torch.equal(source.take(key).to(old.device), old):
                    raise CheckpointError(
                        f"{key} is shared with another module, and the checkpoint has two different tensors for them"
                    )
            elif key in source.left and persistent:
                done.add(id(old))
                placed.add(id(_put(module, leaf, old, source.take(key), key, device, holders)))
            elif persistent and leaf not in ("input_scale", "output_scale"):
                missing.append((key, id(old)))
            elif old.is_meta:
                if leaf not in ("input_scale", "output_scale"):
                    raise CheckpointError(
                        f"{key} is not saved but computed when the model is created; on the meta device it is missing. "
                        f"Create the model on the CPU, or give its buffers a device."
                    )
                module._buffers[leaf] = torch.ones((), dtype=old.dtype, device=device)
    absent = [key for key, identity in missing if identity not in done]
    # optimum-quanto also writes scales, all 1, for modules without quantized activations: ignore them.
    extra = [key for key in source.left if not key.endswith((".input_scale", ".output_scale"))]
    if absent or extra:
        raise CheckpointError(
            "map, tensors and model disagree: "
            + (f"missing {', '.join(absent[:8])} ({len(absent)} in all). " if absent else "")
            + (f"Not in the model: {', '.join(extra[:8])} ({len(extra)} in all)." if extra else "")
        )


def _put(
    module: nn.Module,
    leaf: str,
    old: torch.Tensor,
    value: torch.Tensor,
    key: str,
    device: torch.device,
    holders: dict[int, list[tuple[nn.Module, str]]],
) -> torch.Tensor:
    if value.shape != old.shape:
        raise CheckpointError(f"{key}: the model has {tuple(old.shape)}, the checkpoint {tuple(value.shape)}")
    if leaf in module._buffers:
        module._buffers[leaf] = value.to(device)
        return module._buffers[leaf]
    new = nn.Parameter(value.detach().to(device), requires_grad=old.requires_grad and value.is_floating_point())
    for holder, place in holders[id(old)]:
        holder._parameters[place] = new
    return new


def _find(modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, str]:
    if name in modules:
        return modules[name], "weight"
    parent, _, leaf = name.rpartition(".")
    if parent in modules and leaf in modules[parent]._parameters:
        return modules[parent], leaf
    raise CheckpointError(f"the map quantizes {name!r}, which the model does not have")


def _kind(entry: Mapping[str, Any], key: str, name: str) -> qtype | None:
    value = entry.get(key, "none")
    if value in (None, "none"):
        return None
    try:
        return resolve_qtype(value)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the map says {key}={value!r} for {name!r}: {error}") from error


def _is_transposed(module: nn.Module) -> bool:
    if isinstance(module, QModuleMixin):
        return module.transposed_weight
    found = registry.find(module)
    return bool(found is not None and getattr(found, "transposed_weight", False)) or bool(
        getattr(module, "is_transposed", False)
    )


def _device_of(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
