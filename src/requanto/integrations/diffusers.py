"""The Diffusers quantizer.

A float checkpoint: each planned weight is quantized when it is loaded, on its device. A checkpoint of Requanto: the stored
parts of each weight are joined into a QTensor right after their file is opened, so that Diffusers sees weights of the names
and shapes it expects. The model's modules are not replaced. A checkpoint of another library (`diffusers_foreign`): likewise.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import threading
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer

from requanto.budget.models import budget_of
from requanto.checkpoint.activation_table import activation_table, add_activation_modules, apply_loaded_scales
from requanto.checkpoint.digests import DigestChecks, check_names, digests_of
from requanto.checkpoint.files import stored_keys
from requanto.checkpoint.foreign.directory import recipe_for
from requanto.checkpoint.format import PARTS, CheckpointError, check_version, flatten, parse_spec, rebuild, table_of
from requanto.checkpoint.save_id import check_ids, metadata_for
from requanto.checkpoint.state_dict import check_described
from requanto.config.config import QuantizationMethod, QuantoConfig
from requanto.config.few_bits import warn_few_bits
from requanto.config.plan import PlannedWeight, plan
from requanto.integrations.budget import resolve_from_files
from requanto.integrations.conversion import as_config, dequantize_, frozen_parameter
from requanto.integrations.diffusers_builtin import choose_who_opens, silence_deprecation
from requanto.integrations.diffusers_foreign import ForeignFiles, dequantize_unusual, recognized
from requanto.integrations.diffusers_skips import stays_float
from requanto.integrations.foreign import warn_of_choices
from requanto.runtime.fork import new_in_child
from requanto.tensor.qtensor import QTensor
from requanto.transforms import asks_for_fold

logger = logging.getLogger(__name__)

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LOCK = new_in_child(threading.Lock())  # Diffusers may read several files in parallel


def register() -> None:
    """Registers our quantizer and config under the name "quanto", replacing the built-in ones if there are any."""
    if not hasattr(DiffusersQuantizer, "maybe_update_state_dict"):
        logger.warning(
            "Requanto needs diffusers 0.39 or newer and is disabled for the installed version: pip install -U diffusers"
        )
        return
    auto.AUTO_QUANTIZER_MAPPING["quanto"] = RequantoDiffusersQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"] = QuantoConfig
    silence_deprecation()
    choose_who_opens(auto.DiffusersAutoQuantizer)


class RequantoDiffusersQuantizer(DiffusersQuantizer):
    """Quantizes weights while they are loaded; saves and loads Requanto's format."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # Only from_single_file does not pass pre_quantized; whether its file is quantized is found out when it is read.
        self.from_file = "pre_quantized" not in kwargs
        # A copy: this model's table of weights is written into it, and the user may use the config for other models.
        super().__init__(copy.deepcopy(as_config(quantization_config)), **kwargs)
        self.quantization_config: QuantoConfig
        #: its own config, and the files of a checkpoint of another library
        self._foreign = self.quantization_config.__dict__.pop("foreign", None)
        self._foreign_files: ForeignFiles | None = None
        self.table: dict[str, str] = dict(self.quantization_config.tensors) if self.pre_quantized else {}
        self.planned: dict[str, PlannedWeight] = {}
        self.dtype = torch.float32
        self._files: list[str] = []
        #: parts read so far of weights whose other parts are in files not yet read
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    # ------------------------------------------------------------------ before the weights

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises for a checkpoint of an unknown format and for a device map with "disk" entries."""
        config = self.quantization_config
        if self.pre_quantized and not self.from_file and self._foreign is None and self._foreign_files is None:
            if config.format is None:
                raise CheckpointError(
                    "this checkpoint has quant_method 'quanto' but was not written by Requanto (its quantization_config "
                    "has no 'format'). To load a checkpoint of optimum-quanto, use requanto.QuantizedDiffusersModel."
                )
            check_version(config.format, config.format_version, "quantization_config")
            for name, text in self.table.items():
                parse_spec(text, name)
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map has 'disk' entries, which quantized Diffusers models do not support. Use "
                "model.enable_group_offload(..., offload_to_disk_path=...) after loading, or 'cpu' in the device_map."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Returns the dtype to load in: float32, as in Diffusers, if none is given."""
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
            if asks_for_fold(config):
                raise ValueError(
                    "folds are found by running the float model, and from_pretrained of Diffusers has no inputs for it. "
                    "Load the float pipeline, then requanto.quantize(pipe.transformer, weights=..., fold=True, "
                    "fold_inputs=lambda model: pipe(...)) and requanto.freeze(pipe.transformer)"
                )
            self.planned = plan_model(model, config, keep_in_fp32_modules or ())
            warn_few_bits(planned.options.qtype for planned in self.planned.values())
            self.planned = resolve_from_files(model, config, self.planned, self._files, state=state_dict)
        else:
            config = self.quantization_config
            files = self._files if self._foreign_files is None else ()
            add_activation_modules(model, config.activation_modules, self.table, files, digests=config.digests)
        model.register_to_config(quantization_config=self.quantization_config)

    # ------------------------------------------------------------------ sizes, for device maps

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """Returns the dtype by which an automatic device map counts the size of quantized weights."""
        from accelerate.utils import CustomDtype

        kind = default_type(self.quantization_config)
        # The next larger width that accelerate has.
        return CustomDtype.INT2 if kind.bits <= 2 else CustomDtype.INT4 if kind.bits <= 4 else torch.int8

    def get_special_dtypes_update(self, model: Any, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Returns the dtype by which the device map counts weights that stay float."""
        quantized = set(self.planned) | set(self.table)
        return {name: torch_dtype for name, _ in model.named_parameters() if name not in quantized}

    def get_cuda_warm_up_factor(self) -> int:
        """Returns how many weights Diffusers counts as one float element when it allocates memory ahead of loading."""
        return 32 // default_type(self.quantization_config).bits

    # ------------------------------------------------------------------ the weights

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Returns the names in the files, with each quantized weight's name in place of the names of its parts.

        Raises:
            CheckpointError: a weight is in the files but not in the config, or the reverse.
        """
        self._files = [file for file in checkpoint_files if os.path.isfile(file)]
        if self._foreign is None and not self.pre_quantized and (stored := recognized(self._files)) is not None:
            warn_of_choices(self.quantization_config)
            self._foreign, self.pre_quantized = stored, True
        if self._foreign is not None:
            return self._open_foreign(loaded_keys, checkpoint_files)
        config, found = self.quantization_config, set(loaded_keys)
        if self.pre_quantized:
            check_names(config.digests, self.table)
        # safetensors' load_file puts together the weights of a file that save_file wrote.
        joined = [name for name in self.table if name in found]
        stored = stored_keys(self._files) if joined and self._files else found
        plain = next((name for name in joined if name in stored), None)
        if plain is not None:
            raise CheckpointError(
                f"the files hold a tensor {plain}, which quantization_config.tensors describes as quantized: its parts are "
                f"{plain}_qdata, {plain}_scale ... The files belong to another checkpoint, or were damaged"
            )
        unknown = [key for key in loaded_keys if key.endswith("_qdata") and self._owner(key) is None]
        if unknown:
            raise CheckpointError(
                f"the files hold {unknown[0]}, but quantization_config does not describe that weight: restore the "
                f"config.json that was saved with them"
            )
        for name, text in self.table.items():
            parts = () if name in joined else needed_parts(text, name)
            lost = [f"{name}_{part}" for part in parts if f"{name}_{part}" not in found]
            if lost:
                raise CheckpointError(
                    f"{lost[0]} is described by quantization_config.tensors but not in the files: a file is missing or "
                    f"belongs to another checkpoint (found {len(found)} tensors in {len(checkpoint_files)} files)"
                )
        if not self.from_file:
            check_ids(self.quantization_config.save_id, checkpoint_files)
        self.quantization_config.save_id = None
        return [key for key in loaded_keys if self._owner(key) is None and key not in self.table] + list(self.table)

    def _open_foreign(self, loaded_keys: list[str], files: list[str]) -> list[str]:
        """`maybe_update_loaded_keys` for a checkpoint of another library."""
        opened = self._foreign_files = ForeignFiles(self._foreign, files, os.path.dirname(files[0]))
        self._foreign, self.quantization_config = None, recipe_for(opened.found)
        self.table = dict(self.quantization_config.tensors)
        return opened.names(loaded_keys)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the state dict of a file with the parts of each weight joined into a QTensor.

        Parts of a weight whose other parts are in files not yet read are held back until then.
        """
        if self._foreign_files is not None:
            return self._foreign_files.tensors(state_dict, self.dtype)
        if self.from_file:
            self._detect_quantized(state_dict)
        if not self.pre_quantized:
            return state_dict
        new: dict[str, Any] = {}
        complete = []
        with _LOCK:
            for key, value in state_dict.items():
                owner = self._owner(key)
                if isinstance(value, QTensor) and key in self.table:
                    check_described(key, value, self.table[key])
                    complete.append((key, value.inner_tensors()))
                    continue
                if owner is None:
                    new[key] = value
                    continue
                name, part = owner
                parts = self._parts.setdefault(name, {})
                parts[part] = value
                if all(needed in parts for needed in needed_parts(self.table[name], name)):
                    complete.append((name, self._parts.pop(name)))
        checks = DigestChecks(self.quantization_config.digests)
        for name, parts in complete:
            new[name] = rebuild(name, self.table[name], parts, self.dtype, check_codes=not checks.covers(name))
            checks.add(name, self.table[name], parts)
        for error in checks.finish().values():
            raise error
        return new

    def _detect_quantized(self, state_dict: dict[str, Any]) -> None:
        """Sets ``pre_quantized`` from the content of a single file."""
        stored = [key for key in state_dict if key.endswith("_qdata")]
        # Weights that are quantized already (`integrations.gguf_diffusers`) may get other names, so no table has them.
        self.pre_quantized = bool(stored) or any(isinstance(value, QTensor) for value in state_dict.values())
        self.table = dict(self.quantization_config.tensors) if stored else {}
        missing = [key for key in stored if key.removesuffix("_qdata") not in self.table]
        if missing:
            raise CheckpointError(
                f"the file holds quantized weights ({missing[0]} ...) that no quantization_config describes. Their "
                f"description is in the config.json that was saved with the file: put it in the same directory, or pass "
                f"config='the directory it is in'."
            )
        if stored:
            self.maybe_update_loaded_keys(list(state_dict), ["the file"])

    def _owner(self, key: str) -> tuple[str, str] | None:
        """Splits a stored key into (weight, part); None if it is not a part of a quantized weight."""
        for part in PARTS:
            name = key.removesuffix(f"_{part}")
            if name != key and name in self.table:
                return name, part
        return None

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Whether the parameter is a QTensor, is to be quantized, or is a cast to float8, which Diffusers leaves."""
        return isinstance(param_value, QTensor) or param_name in self.planned or param_value.dtype in _FLOAT8

    def check_quantized_param_shape(self, param_name: str, current_param: Any, loaded_param: Any) -> None:
        """Raises: Diffusers calls this only if the shapes differ."""
        raise CheckpointError(
            f"{param_name}: the checkpoint holds shape {tuple(loaded_param.shape)}, the model expects "
            f"{tuple(current_param.shape)}: the config.json does not belong to these files"
        )

    @torch.no_grad()
    def create_quantized_param(
        self, model: Any, param_value: torch.Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Moves one weight to its device, quantizes it unless it is a QTensor, and sets it on its module."""
        weight = param_value.to(target_device)
        if not isinstance(weight, QTensor) and weight.dtype in _FLOAT8:
            weight = weight.to(self.dtype)
        if param_name in self.planned and not isinstance(weight, QTensor):
            weight = self.planned[param_name].quantize(weight, param_name)
        module, _, leaf = param_name.rpartition(".")
        setattr(model.get_submodule(module), leaf, frozen_parameter(weight))

    # ------------------------------------------------------------------ after the weights

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._foreign_files is not None:
            for name in dequantize_unusual(model):
                del self.table[name]
            self._foreign_files = None
        apply_loaded_scales(model)
        empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if empty:
            raise CheckpointError(
                f"the files lack {len(empty)} of the model's tensors, e.g. {empty[0]}: a file is missing or damaged"
            )
        record_weights(model, self.quantization_config)
        missing = [name for name in (*self.planned, *self.table) if name not in self.quantization_config.tensors]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {len(missing)} of the weights to quantize, e.g. {missing[0]}")
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Returns the flat state dict and the metadata of the files."""
        return flatten(state_dict), metadata_for(self.quantization_config)

    def _dequantize(self, model: Any) -> Any:
        from diffusers.configuration_utils import FrozenDict

        dequantize_(model)
        ours = ("quantization_config", "_pre_quantization_dtype")
        model._internal_dict = FrozenDict({k: v for k, v in model._internal_dict.items() if k not in ours})
        del model.quantization_method
        return model

    @property
    def is_serializable(self) -> bool:
        """Always True."""
        return True

    @property
    def supports_safetensors_serialization(self) -> bool:
        """Always True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on the quantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile works without graph breaks."""
        return True


def plan_model(model: Any, config: QuantoConfig, always_float: Any = ()) -> dict[str, PlannedWeight]:
    """Returns the weights of a Diffusers model that a config quantizes."""
    return plan(model, config, default_skips=stays_float, always_float=always_float)


def record_weights(model: Any, config: QuantoConfig, saving: bool = False) -> None:
    """Records the quantized weights and activation types of a model in its config; with ``saving`` their digests too."""
    config.activation_modules = activation_table(model)
    digests = digests_of(model.state_dict(), config.activation_modules) if saving else None
    config.record(table_of(model.named_parameters()), digests)


def attach_quantizer(model: Any) -> RequantoDiffusersQuantizer:
    """Attaches a quantizer to a model quantized in place by `requanto.quantize`, as if Diffusers had loaded it."""
    kinds = [p.qtype.name for p in model.parameters() if isinstance(p, QTensor)]
    config = QuantoConfig(weights=max(set(kinds), key=kinds.count) if kinds else None)
    config.budget = budget_of(model)
    quantizer = RequantoDiffusersQuantizer(config, pre_quantized=False)
    record_weights(model, quantizer.quantization_config)
    model.register_to_config(quantization_config=quantizer.quantization_config)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, QuantizationMethod.QUANTO
    return quantizer


@functools.lru_cache(maxsize=4096)
def needed_parts(text: str, name: str) -> tuple[str, ...]:
    """Returns the names of the stored parts of a weight."""
    from requanto.checkpoint.format import expected_parts

    return tuple(expected_parts(text, name))


def default_type(config: QuantoConfig) -> Any:
    """Returns the type of layers for which the config makes no exception."""
    return config.choice_for(None).qtype
