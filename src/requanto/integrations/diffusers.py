"""The Diffusers quantizer.

Loading a float checkpoint, each planned weight is quantized as it arrives, on its device. Loading one of ours, the stored
parts of each weight become a QTensor as soon as their file is open, so that the library, from then on, sees weights of the
names and shapes it expects. The model's modules are never changed.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer

from requanto.budget.models import budget_of
from requanto.checkpoint.activation_table import activation_table, add_activation_modules, settle
from requanto.checkpoint.format import PARTS, CheckpointError, check_version, flatten, parse_spec, rebuild, table_of
from requanto.config.config import QuantizationMethod, QuantoConfig
from requanto.config.plan import PlannedWeight, plan
from requanto.integrations.budget import chosen_from_files
from requanto.integrations.conversion import as_config, dequantize_, frozen_parameter
from requanto.integrations.diffusers_builtin import refuse_other_backends, silence_deprecation
from requanto.integrations.diffusers_skips import stays_float
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

_LOCK = threading.Lock()  # the library may read several files at once


def register() -> None:
    """Puts our quantizer and config in the places of the built-in ones, which need not exist."""
    if not hasattr(DiffusersQuantizer, "maybe_update_state_dict"):
        logger.warning("Requanto needs diffusers 0.39 or newer; its Diffusers part is off. pip install -U diffusers")
        return
    auto.AUTO_QUANTIZER_MAPPING["quanto"] = RequantoDiffusersQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"] = QuantoConfig
    silence_deprecation()
    refuse_other_backends(auto.DiffusersAutoQuantizer)


class RequantoDiffusersQuantizer(DiffusersQuantizer):
    """Quantizes on the way in, saves and loads our format."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # from_single_file alone does not say whether the file is quantized: the file itself will.
        self.from_file = "pre_quantized" not in kwargs
        # A copy: what was quantized is written into it, and the user's config may serve for other models.
        super().__init__(copy.deepcopy(as_config(quantization_config)), **kwargs)
        self.quantization_config: QuantoConfig
        self.table: dict[str, str] = dict(self.quantization_config.tensors) if self.pre_quantized else {}
        self.planned: dict[str, PlannedWeight] = {}
        self.dtype = torch.float32
        self._files: list[str] = []
        self._parts: dict[str, dict[str, torch.Tensor]] = {}  # of weights whose other parts are in files to come

    # ------------------------------------------------------------------ before the weights

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses a checkpoint of an unknown format and a device map with disk in it."""
        config = self.quantization_config
        if self.pre_quantized and not self.from_file:
            if config.format is None:
                raise CheckpointError(
                    "this checkpoint says quant_method 'quanto' but was not written by Requanto (its quantization_config "
                    "has no 'format'). A checkpoint of optimum-quanto is read by requanto.QuantizedDiffusersModel."
                )
            check_version(config.format, config.format_version, "quantization_config")
            for name, text in self.table.items():
                parse_spec(text, name)
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts parts of the model on 'disk', where quantized weights cannot go. Use "
                "model.enable_group_offload(..., offload_to_disk_path=...) after loading, or 'cpu' in the device_map."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The library's default, float32, where none is asked for."""
        self.dtype = torch.float32 if torch_dtype is None else torch_dtype
        return self.dtype

    def _process_model_before_weight_loading(
        self,
        model: Any,
        keep_in_fp32_modules: list[str] | None = None,
        state_dict: dict[str, Any] | None = None,  # of a single file
        **kwargs: Any,
    ) -> None:
        if not self.pre_quantized:
            config = self.quantization_config
            config.tensors, config.format, config.format_version = {}, None, None
            self.planned = plan_model(model, config, keep_in_fp32_modules or ())
            self.planned = chosen_from_files(model, config, self.planned, self._files, state=state_dict)
        else:
            add_activation_modules(model, self.quantization_config.activation_modules, self.table)
        model.register_to_config(quantization_config=self.quantization_config)

    # ------------------------------------------------------------------ sizes, for device maps

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """What an automatic device map counts for a weight."""
        from accelerate.utils import CustomDtype

        kind = as_layer_type(self.quantization_config)
        # The next larger width that it knows.
        return CustomDtype.INT2 if kind.bits <= 2 else CustomDtype.INT4 if kind.bits <= 4 else torch.int8

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """What it counts for weights that stay float."""
        quantized = set(self.planned) | set(self.table)
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in quantized}

    def get_cuda_warm_up_factor(self) -> int:
        """Memory the library reserves at once: one element of the float dtype for this many weights."""
        return 32 // as_layer_type(self.quantization_config).bits

    # ------------------------------------------------------------------ the weights

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """The names in the files, with each weight's own name in place of its parts'.

        Raises:
            CheckpointError: the files lack weights that the config describes, or the reverse.
        """
        self._files = checkpoint_files
        found = set(loaded_keys)
        strange = [key for key in loaded_keys if key.endswith("_qdata") and self._owner(key) is None]
        if strange:
            raise CheckpointError(
                f"the files hold {strange[0]}, and quantization_config does not describe that weight: restore the "
                f"config.json that was saved with them"
            )
        for name, text in self.table.items():
            lost = [f"{name}_{part}" for part in needed_parts(text, name) if f"{name}_{part}" not in found]
            if lost:
                raise CheckpointError(
                    f"{lost[0]} is described by quantization_config.tensors and not in the files: a file is missing or "
                    f"belongs to another checkpoint ({len(found)} tensors in {len(checkpoint_files)} files)"
                )
        return [key for key in loaded_keys if self._owner(key) is None] + list(self.table)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Stored parts -> QTensors, for the weights whose parts are complete with this file."""
        if self.from_file:
            self._look_at(state_dict)
        if not self.pre_quantized:
            return state_dict
        new: dict[str, Any] = {}
        complete = []
        with _LOCK:
            for key, value in state_dict.items():
                owner = self._owner(key)
                if owner is None:
                    new[key] = value
                    continue
                name, part = owner
                parts = self._parts.setdefault(name, {})
                parts[part] = value
                if all(needed in parts for needed in needed_parts(self.table[name], name)):
                    complete.append((name, self._parts.pop(name)))
        for name, parts in complete:
            new[name] = rebuild(name, self.table[name], parts, self.dtype)
        return new

    def _look_at(self, state_dict: dict[str, Any]) -> None:
        """Finds out whether a single file is quantized."""
        stored = [key for key in state_dict if key.endswith("_qdata")]
        self.pre_quantized = bool(stored)
        self.table = dict(self.quantization_config.tensors) if stored else {}
        missing = [key for key in stored if key.removesuffix("_qdata") not in self.table]
        if missing:
            raise CheckpointError(
                f"the file holds quantized weights ({missing[0]} ...) which no quantization_config describes. Their "
                f"description is in the config.json that was saved with the file: keep it beside the file, or pass "
                f"config='the directory it is in'."
            )
        if stored:
            self.maybe_update_loaded_keys(list(state_dict), ["the file"])

    def _owner(self, key: str) -> tuple[str, str] | None:
        """(weight, part) that a stored key is, or None."""
        for part in PARTS:
            name = key.removesuffix(f"_{part}")
            if name != key and name in self.table:
                return name, part
        return None

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """True for a QTensor, and for a weight that the plan names."""
        return isinstance(param_value, QTensor) or param_name in self.planned

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> None:
        """Called where the shapes differ."""
        raise CheckpointError(
            f"{param_name}: the checkpoint holds shape {tuple(loaded_param.shape)}, the model expects "
            f"{tuple(current_param.shape)}: config.json and files do not belong together"
        )

    @torch.no_grad()
    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Quantizes (where needed) one weight on its device and puts it in its place."""
        weight = param_value.to(target_device)
        tensor = weight if isinstance(weight, QTensor) else self.planned[param_name].quantize(weight, param_name)
        module, _, leaf = param_name.rpartition(".")
        setattr(model.get_submodule(module), leaf, frozen_parameter(tensor))

    # ------------------------------------------------------------------ after the weights

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        settle(model)
        describe(model, self.quantization_config)
        left = [name for name in (*self.planned, *self.table) if name not in self.quantization_config.tensors]
        if left:
            raise CheckpointError(
                f"{left[0]} was to be quantized, but the checkpoint has no such weight ({len(left)} are missing)"
            )
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The flat state dict; all else is in config.json, so that a model is the same bytes whenever it is saved."""
        return flatten(state_dict), {}

    def _dequantize(self, model: Any) -> Any:
        from diffusers.configuration_utils import FrozenDict

        dequantize_(model)
        ours = ("quantization_config", "_pre_quantization_dtype")
        model._internal_dict = FrozenDict({k: v for k, v in model._internal_dict.items() if k not in ours})
        del model.quantization_method
        return model

    @property
    def is_serializable(self) -> bool:
        """Always."""
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on top of it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Without graph breaks."""
        return True


def plan_model(model: Any, config: QuantoConfig, always_float: Any = ()) -> dict[str, PlannedWeight]:
    """What of a Diffusers model a config quantizes."""
    return plan(model, config, default_skips=stays_float, always_float=always_float)


def describe(model: Any, config: QuantoConfig) -> None:
    """Writes what a model holds into its config."""
    config.record(table_of(model.named_parameters()))
    config.activation_modules = activation_table(model)


def attach_quantizer(model: Any) -> RequantoDiffusersQuantizer:
    """The quantizer of a model that `requanto.quantize` made: from now on the library takes it for one it loaded."""
    kinds = [p.qtype.name for p in model.parameters() if isinstance(p, QTensor)]
    config = QuantoConfig(weights=max(set(kinds), key=kinds.count) if kinds else None)
    config.budget = budget_of(model)
    quantizer = RequantoDiffusersQuantizer(config, pre_quantized=False)
    describe(model, quantizer.quantization_config)
    model.register_to_config(quantization_config=quantizer.quantization_config)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, QuantizationMethod.QUANTO
    return quantizer


@functools.lru_cache(maxsize=4096)
def needed_parts(text: str, name: str) -> tuple[str, ...]:
    """The stored parts that a description asks for."""
    from requanto.checkpoint.format import expected_parts

    return tuple(expected_parts(text, name))


def as_layer_type(config: QuantoConfig) -> Any:
    """The type of most of a model's layers."""
    return config.choice_for(None).qtype
