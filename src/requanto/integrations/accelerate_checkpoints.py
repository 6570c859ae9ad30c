"""accelerate's ``save_state``, ``save_model``, ``load_checkpoint_in_model`` and ``load_checkpoint_and_dispatch``.

safetensors' functions write a quantized weight as its parts and a description of them (`requanto.checkpoint.state_dict`); an
index of shards holds the weight's own name.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.state_dict import check_joined, join_described
from requanto.integrations.accelerate import ENTRY, read_entry
from requanto.integrations.patching import replace_everywhere
from requanto.tensor.float_targets import assign_frozen
from requanto.tensor.qtensor import QTensor


class _State(threading.local):
    """The model whose checkpoint this thread loads."""

    model: nn.Module | None = None


_state = _State()


def register() -> None:
    """Patches accelerate; called after it is imported."""
    from accelerate.utils import modeling

    replace_everywhere(modeling.id_tensor_storage, _wrap_id_tensor_storage)
    replace_everywhere(modeling.load_checkpoint_in_model, _wrap_load_checkpoint)
    replace_everywhere(modeling.load_state_dict, _wrap_load_state_dict)
    replace_everywhere(modeling.set_module_tensor_to_device, _wrap_set_tensor)
    replace_everywhere(modeling.load_offloaded_weights, _wrap_load_offloaded)


def _wrap_id_tensor_storage(original: Callable) -> Callable:
    @functools.wraps(original)
    def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
        if not isinstance(tensor, QTensor):
            return original(tensor)
        codes = tensor._storage.parts["qdata"]
        return tensor.device, codes.data_ptr(), codes.nbytes

    return id_tensor_storage


def _wrap_load_state_dict(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_state_dict(checkpoint_file: Any, device_map: Any = None) -> dict[str, torch.Tensor]:
        tensors = join_described(original(checkpoint_file, device_map))
        if _state.model is not None:
            check_joined(tensors, _state.model)
            _quantize_targets(_state.model, tensors, only_tied=device_map is not None)
        return tensors

    return load_state_dict


def _quantize_targets(model: nn.Module, tensors: dict[str, Any], only_tied: bool) -> None:
    """Makes float weights of the model quantized, with all that is tied to them.

    With a device map accelerate replaces parameters, but it ties them again to the first of each group, which the files may
    lack. Without one it copies values, which a float weight cannot take.
    """
    targets, groups = {}, defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, QTensor):
            targets[name] = parameter
            groups[id(parameter)].append(name)
    found = {}
    for name, value in tensors.items():
        if not isinstance(value, QTensor) or name not in targets:
            continue
        old, group = targets[name], groups[id(targets[name])]
        if not only_tied or (len(group) > 1 and not old.is_meta):
            found |= dict.fromkeys(group, value.to(value.device if old.is_meta else old.device, old.dtype))
    if found:
        model.load_state_dict(found, strict=False, assign=True)


@contextmanager
def loading(model: nn.Module | None) -> Iterator[None]:
    """A block in which files are read for ``model``; None: for nothing that is known."""
    before, _state.model = _state.model, model
    try:
        yield
    finally:
        _state.model = before


def _wrap_load_checkpoint(original: Callable) -> Callable:
    """Lets `load_state_dict` know the model: accelerate only warns of parts that nothing reads."""

    @functools.wraps(original)
    def load_checkpoint_in_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with loading(model):
            return original(model, *args, **kwargs)

    return load_checkpoint_in_model


def _wrap_set_tensor(original: Callable) -> Callable:
    """A quantized value makes a float parameter quantized; a float value is quantized like the weight that it replaces."""

    @functools.wraps(original)
    def set_module_tensor_to_device(
        module: nn.Module, tensor_name: str, device: Any, value: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(value, torch.Tensor) and not isinstance(value, QTensor):
            owner, _, leaf = tensor_name.rpartition(".")
            old = module.get_submodule(owner)._parameters.get(leaf)
            if isinstance(old, QTensor) and value.shape == old.shape:
                value = old._quantize_like(value.to(old.dtype), low_rank=old.rank or None, same_column=False)
        with assign_frozen():
            original(module, tensor_name, device, value, *args, **kwargs)

    return set_module_tensor_to_device


def _wrap_load_offloaded(original: Callable) -> Callable:
    """``load_checkpoint_in_model`` writes weights for the CPU to a temporary folder first and reads them here."""

    @functools.wraps(original)
    def load_offloaded_weights(model: nn.Module, index: dict[str, Any] | None, offload_folder: Any) -> None:
        from accelerate.utils import modeling

        quantized = {key: entry for key, entry in (index or {}).items() if ENTRY in entry}
        for key, entry in quantized.items():
            # The files are deleted after this, so nothing may stay mapped to them.
            modeling.set_module_tensor_to_device(
                model, key, "cpu", value=read_entry(key, entry, offload_folder).clone()
            )
        original(model, {k: v for k, v in (index or {}).items() if k not in quantized}, offload_folder)

    return load_offloaded_weights
