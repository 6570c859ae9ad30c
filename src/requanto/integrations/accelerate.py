"""accelerate, also as Transformers uses it: device maps with "cpu" and "disk" entries, and module sizes in true bytes.

A weight offloaded to disk is written as its stored parts; accelerate's index holds the line that describes it
(`checkpoint.format`), and accelerate's loader returns it as a QTensor.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.format import expected_parts, flatten, rebuild, spec_text
from requanto.integrations.patching import replace_everywhere
from requanto.tensor.qtensor import QTensor

#: key of an index entry that holds the parts of a quantized weight
ENTRY = "requanto"


def register() -> None:
    """Patches accelerate; called after it is imported."""
    from accelerate.utils import modeling, offload

    from requanto.integrations import accelerate_checkpoints, accelerate_fsdp

    accelerate_fsdp.register()
    accelerate_checkpoints.register()

    replace_everywhere(offload.offload_weight, _wrap_offload_dat)
    replace_everywhere(modeling.compute_module_sizes, _wrap_module_sizes)
    loader = offload.OffloadedWeightsLoader
    if not hasattr(loader.__getitem__, "_requanto"):
        loader.__getitem__ = _wrap_getitem(loader.__getitem__)


def register_transformers() -> None:
    """Patches Transformers' offloading; called after its model loading is imported."""
    from transformers import core_model_loading
    from transformers.integrations import accelerate as theirs

    replace_everywhere(theirs.offload_weight, _wrap_offload_safetensors)
    replace_everywhere(theirs.accelerate_dispatch, _wrap_dispatch)
    replace_everywhere(core_model_loading.offload_and_maybe_resave_param, _wrap_resave)


# ---------------------------------------------------------------------- writing and reading


def _wrap_offload_dat(original: Callable) -> Callable:
    @functools.wraps(original)
    def offload_weight(weight: torch.Tensor, weight_name: str, offload_folder: str, index: dict | None = None) -> Any:
        if not isinstance(weight, QTensor):
            return original(weight, weight_name, offload_folder, index)
        parts: dict[str, Any] = {}
        for name, part in flatten({weight_name: weight.detach()}).items():
            original(part.contiguous(), name, offload_folder, parts)
        if index is not None:
            index[weight_name] = _entry(weight, {ENTRY: spec_text(weight), "parts": parts})
        return index

    return offload_weight


def _entry(weight: QTensor, more: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape), **more}


def _wrap_offload_safetensors(original: Callable) -> Callable:
    @functools.wraps(original)
    def offload_weight(
        weight: torch.Tensor, weight_name: str, offload_folder: str | None, offload_index: dict[str, Any]
    ) -> dict:
        if not isinstance(weight, QTensor):
            return original(weight, weight_name, offload_folder, offload_index)
        parts: dict[str, Any] = {}
        for name, part in flatten({weight_name: weight.detach()}).items():
            original(part.contiguous(), name, offload_folder, parts)
        offload_index[weight_name] = _entry(weight, {ENTRY: spec_text(weight), "parts": parts})
        return offload_index

    return offload_weight


def _wrap_getitem(original: Callable) -> Callable:
    @functools.wraps(original)
    def __getitem__(self: Any, key: str) -> torch.Tensor:
        entry = None if key in self.state_dict else self.index.get(key)
        if not isinstance(entry, dict) or ENTRY not in entry:
            return original(self, key)
        return read_entry(key, entry, self.save_folder, self.device)

    __getitem__._requanto = True  # type: ignore[attr-defined]
    return __getitem__


def read_entry(key: str, entry: dict[str, Any], folder: str, device: Any = None) -> nn.Parameter:
    """The weight of an index entry, from the files of its parts."""
    from accelerate.utils.offload import OffloadedWeightsLoader, load_offloaded_weight

    found = {}
    for name, info in entry["parts"].items():
        if "safetensors_file" in info:
            value = OffloadedWeightsLoader(index={name: info}, device=device)[name]
        else:
            value = load_offloaded_weight(os.path.join(folder, f"{name}.dat"), info)
        found[name.removeprefix(f"{key}_")] = value
    # This process wrote the file from a checked weight; checking all scales again at every forward would be slow.
    tensor = rebuild(key, entry[ENTRY], found, getattr(torch, entry["dtype"]), check_values=False)
    return nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------------- Transformers' loading


def _wrap_resave(original: Callable) -> Callable:
    @functools.wraps(original)
    def offload_and_maybe_resave_param(
        target_name: str, param: Any, loading_info: Any, disk_offload_folder: Any, disk_offload_index: dict, ops: Any
    ) -> dict:
        if not isinstance(param, QTensor):
            return original(target_name, param, loading_info, disk_offload_folder, disk_offload_index, ops)
        # Transformers would load the float weight from the checkpoint at every forward, so this layer would silently not
        # be quantized. Write the codes to the offload folder instead.
        from transformers.integrations.accelerate import offload_weight

        loading_info.missing_keys.discard(target_name)
        return offload_weight(param, target_name, disk_offload_folder, disk_offload_index)

    return offload_and_maybe_resave_param


def _wrap_dispatch(original: Callable) -> Callable:
    @functools.wraps(original)
    def accelerate_dispatch(
        model: Any, hf_quantizer: Any, device_map: Any, folder: Any, index: Any, offload_buffers: Any
    ) -> None:
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if index and ENTRY in (index.get(source) or {}):
                # Part names start with the entry's name, so a tied weight needs its own part names.
                parts = {f"{name}{part.removeprefix(source)}": info for part, info in index[source]["parts"].items()}
                index[name] = index[source] | {"parts": parts}
        for name, entry in (index or {}).items():
            if ENTRY in entry:
                _set_placeholder(model, name, entry)
        original(model, hf_quantizer, device_map, folder, index, offload_buffers)

    return accelerate_dispatch


def _set_placeholder(model: nn.Module, name: str, entry: dict[str, Any]) -> None:
    """Replaces a float parameter on the meta device by a meta QTensor, so that sizes and transfers count its true bytes."""
    parts = expected_parts(entry[ENTRY], name)
    meta = {part: torch.empty(shape, dtype=dtypes[0], device="meta") for part, (shape, dtypes) in parts.items()}
    tensor = rebuild(name, entry[ENTRY], meta, getattr(torch, entry["dtype"]))
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def load_offloaded(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state dict with every offloaded weight loaded to the CPU.

    Raises:
        RuntimeError: a weight is on the meta device and was not offloaded by accelerate.
    """
    state_dict = model.state_dict()
    for name, tensor in state_dict.items():
        if tensor.device.type == "meta":
            from transformers.integrations.accelerate import load_offloaded_parameter

            try:
                value = load_offloaded_parameter(model, name)
            except (ValueError, KeyError, AttributeError) as error:
                raise RuntimeError(f"{name} has no values (it is on the meta device): {error}") from error
            state_dict[name] = value.detach().to("cpu")
    return state_dict


# ---------------------------------------------------------------------- sizes


def _float_like(tensor: QTensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), requires_grad=False)


def _wrap_module_sizes(original: Callable) -> Callable:
    @functools.wraps(original)
    def compute_module_sizes(
        model: nn.Module, dtype: Any = None, special_dtypes: Any = None, buffers_only: bool = False
    ) -> dict[str, int]:
        sizes = original(model, dtype, special_dtypes, buffers_only)
        if buffers_only:
            return sizes
        for name, tensor in model.named_parameters():
            if not isinstance(tensor, QTensor):
                continue
            # accelerate counted a float tensor of this shape: replace that by the true number of bytes.
            holder = nn.Module()
            holder.register_parameter("weight", _float_like(tensor))
            kinds = {"weight": special_dtypes[name]} if special_dtypes and name in special_dtypes else None
            counted = original(holder, dtype, kinds)["weight"]
            parts = name.split(".")
            for end in range(len(parts) + 1):
                sizes[".".join(parts[:end])] += tensor.nbytes - counted
        return sizes

    return compute_module_sizes
