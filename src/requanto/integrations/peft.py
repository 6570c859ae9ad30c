"""Patches of PEFT for quantized weights: which of its functions run differently, and why.

- Layers: merging and unmerging are exact or refused (`peft_merge`); forwards and initializations that need the values of a
  weight read them as floats (`requanto.tensor.reading`). LoRA's forward needs none and is left alone.
- Models: whatever adds, merges or removes adapters leaves the model as it was if it fails (`peft_undo`).
- ``QuantizationBackend`` of PEFT 0.21 and later: `Backend`.

Layers and models without a QTensor are not affected.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import dora, variants
from peft.tuners.lora import layer as lora
from peft.utils import integrations as peft_integrations
from peft.utils import other as peft_other
from torch import nn

from requanto.integrations import peft_lora, peft_merge
from requanto.integrations.patching import replace_everywhere
from requanto.integrations.peft_backend import register_backend
from requanto.integrations.peft_twin import float_twin
from requanto.integrations.peft_undo import all_or_nothing
from requanto.nn.direct_linear import use_plain_linear
from requanto.tensor.qtensor import QTensor
from requanto.tensor.reading import as_floats

logger = logging.getLogger(__name__)

#: methods of a tuner that change the model, and whether they write into float weights
_CHANGES = {
    "merge_adapter": True,
    "unmerge_adapter": True,
    "_unload_and_optionally_merge": True,
    "add_weighted_adapter": False,
    "delete_adapter": False,
}


def register() -> None:
    """Patches PEFT."""
    if hasattr(lora.Linear.merge, "_requanto"):
        return
    for cls in _with_subclasses(tuners_utils.BaseTunerLayer):
        _patch_layer(cls)
    _patch_later_subclasses(tuners_utils.BaseTunerLayer, _patch_layer)
    for cls in _with_subclasses(tuners_utils.BaseTuner):
        _patch_tuner(cls)
    _patch_later_subclasses(tuners_utils.BaseTuner, _patch_tuner)
    for cls in (peft.PeftModel, peft.PeftMixedModel):
        _patch(cls, "__init__", lambda original: _building(original, of=1))
        _patch(cls, "add_adapter", lambda original: _building(original, of=0))
    lora.ParamWrapper._activate_lora = _where_quantized(lora.ParamWrapper._activate_lora, peft_lora.activate)
    for norm in (dora.DoraLinearLayer, dora._DoraConvNdLayer):
        norm.get_weight_norm = _with_float_weight(norm.get_weight_norm)
    _patch(peft_other.ModulesToSaveWrapper, "update", _with_float_copy)
    kasa = getattr(variants, "KasaLinearVariant", None)
    if kasa is not None:  # with low_cpu_mem_usage=True the weight is rewritten by the first forward
        truncate = kasa._truncate_base_weight
        kasa._truncate_base_weight = staticmethod(_reading(truncate))
    register_backend()
    replace_everywhere(peft_integrations.dequantize_module_weight, _wrap_dequantize_module_weight)
    replace_everywhere(peft_other.prepare_model_for_kbit_training, _wrap_prepare_for_kbit_training)


def _with_subclasses(cls: type) -> Iterator[type]:
    seen, waiting = set(), [cls]
    while waiting:
        found = waiting.pop()
        if found not in seen:
            seen.add(found)
            yield found
            waiting += found.__subclasses__()


def _patch_later_subclasses(cls: type, patch: Callable[[type], None]) -> None:
    """Patches classes that are defined later too: PEFT imports some lazily, and users register their own."""
    original = cls.__dict__.get("__init_subclass__")

    def init_subclass(new: type, **kwargs: Any) -> None:
        if original is not None:
            original.__get__(None, new)(**kwargs)
        else:
            super(cls, new).__init_subclass__(**kwargs)
        patch(new)

    cls.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]


def _patch(cls: type, name: str, wrap: Callable[[Callable], Callable]) -> None:
    original = cls.__dict__.get(name)
    if callable(original) and not hasattr(original, "_requanto"):
        new = wrap(original)
        new._requanto = True  # type: ignore[attr-defined]
        setattr(cls, name, new)


# ---------------------------------------------------------------------- layers


def _patch_layer(cls: type) -> None:
    _patch(cls, "merge", _merging)
    _patch(cls, "unmerge", _unmerging)
    _patch(cls, "get_merged_weights", _reading)
    if not cls.__module__.startswith("peft.tuners.lora."):
        _patch(cls, "forward", _reading)
        _patch(cls, "get_delta_weight", _reading)


def _merging(original: Callable) -> Callable:
    @functools.wraps(original)
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> Any:
        if not peft_merge.quantized_weights(self):
            return original(self, safe_merge=safe_merge, adapter_names=adapter_names)
        return peft_merge.merge(original, self, safe_merge, adapter_names)

    return merge


def _unmerging(original: Callable) -> Callable:
    @functools.wraps(original)
    def unmerge(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not peft_merge.quantized_weights(self):
            return original(self, *args, **kwargs)
        return peft_merge.unmerge(self)

    return unmerge


def _reading(original: Callable) -> Callable:
    who = f"{original.__module__.removeprefix('peft.tuners.')}.{original.__qualname__}"

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # reading works there as well; the block is for code that writes
            return original(*args, **kwargs)
        with as_floats(who):
            return original(*args, **kwargs)

    return run


def _where_quantized(original: Callable, ours: Callable) -> Callable:
    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (original if peft_lora.weight_of(self) is None else ours)(self, *args, **kwargs)

    run._requanto = True  # type: ignore[attr-defined]
    return run


# ---------------------------------------------------------------------- models


def _patch_tuner(cls: type) -> None:
    _patch(cls, "__init__", lambda original: _building(original, of=1))
    _patch(cls, "inject_adapter", lambda original: _building(original, of=1))
    for name, values in _CHANGES.items():
        _patch(cls, name, functools.partial(_changing, values=values))
    _patch(cls, "set_adapter", _switching)
    if cls.__module__ == "peft.tuners.glora.model":  # GLoRA takes nn.Linear alone, and none of its subclasses
        _patch(cls, "_create_and_replace", _with_plain_target)


def _with_plain_target(original: Callable) -> Callable:
    @functools.wraps(original)
    def create(self: Any, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> Any:
        use_plain_linear(target)
        return original(self, config, adapter_name, target, *args, **kwargs)

    return create


def _building(original: Callable, of: int) -> Callable:
    """Adds an adapter to the model that is argument number ``of``: weights can be read as floats; all or nothing."""

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self if of == 0 else (args[0] if args else kwargs.get("model"))
        if not isinstance(model, nn.Module):
            return original(self, *args, **kwargs)
        with all_or_nothing(model, values=False), as_floats(f"the initialization of {type(self).__name__}"):
            return original(self, *args, **kwargs)

    return build


def _changing(original: Callable, values: bool) -> Callable:
    @functools.wraps(original)
    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self, values):
            return original(self, *args, **kwargs)

    return change


def _switching(original: Callable) -> Callable:
    """``set_adapter`` unmerges a merged model first; otherwise it changes no weight."""

    @functools.wraps(original)
    def set_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self, any(getattr(module, "merged_adapters", None) for module in self.modules())):
            return original(self, *args, **kwargs)

    return set_adapter


def _with_float_copy(original: Callable) -> Callable:
    """``modules_to_save`` trains a copy of a module: the copy of a quantized one is float."""

    @functools.wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.original_module
        if not any(isinstance(p, QTensor) for p in module.parameters()):
            return original(self, *args, **kwargs)
        logger.info("modules_to_save: the copy of a quantized %s that is trained is float", type(module).__name__)
        self.original_module = float_twin(module, None)
        try:
            return original(self, *args, **kwargs)
        finally:
            self.original_module = module

    return update


# ---------------------------------------------------------------------- functions


def register_corda() -> None:
    """CorDA reads the values of weights before the adapter is built."""
    replace_everywhere(importlib.import_module("peft.tuners.lora.corda").preprocess_corda, _reading)


def _with_float_weight(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_weight_norm(self: Any, weight: torch.Tensor, lora_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weight, QTensor):
            weight = weight.dequantize(lora_weight.dtype)
        return original(self, weight, lora_weight, *args, **kwargs)

    return get_weight_norm


def _wrap_dequantize_module_weight(original: Callable) -> Callable:
    @functools.wraps(original)
    def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
        weight = getattr(module, "weight", None)
        return weight.dequantize() if isinstance(weight, QTensor) else original(module)

    return dequantize_module_weight


def _wrap_prepare_for_kbit_training(original: Callable) -> Callable:
    """Prepares models with QTensors here: PEFT's function skips gradient checkpointing for quantizers it does not know."""

    @functools.wraps(original)
    def prepare_model_for_kbit_training(
        model: Any,
        use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        auto_clear_cache: bool = True,
    ) -> Any:
        if not any(isinstance(parameter, QTensor) for parameter in model.parameters()):
            return original(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, auto_clear_cache)
        for parameter in model.parameters():
            parameter.requires_grad = False
            if not isinstance(parameter, QTensor) and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
        if use_gradient_checkpointing:
            arguments = gradient_checkpointing_kwargs or {}
            if arguments.get("use_reentrant", True):
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        return model

    return prepare_model_for_kbit_training
