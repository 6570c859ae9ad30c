"""Patches of Diffusers' ModelMixin for quantized weights: loading, saving, memory footprint, single files."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

from requanto.checkpoint.activation_table import activation_table
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.files import check_all_read, check_scales_read, stored_keys
from requanto.checkpoint.foreign.quanto_directory import wrap_from_pretrained
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.opening import checked_config, read_json, stored_config
from requanto.checkpoint.readme import write_readme
from requanto.checkpoint.save_id import awaiting_id, check_ids, stamp
from requanto.checkpoint.watched_load import watch_from_pretrained
from requanto.config.config import QuantoConfig
from requanto.integrations import diffusers_single_files, gguf_diffusers
from requanto.integrations.casts import allow_casts
from requanto.integrations.conversion import has_quantized, true_bytes
from requanto.integrations.diffusers_foreign import loading, quantizer_for
from requanto.integrations.diffusers_made_from import register_models, without_fused_layers
from requanto.integrations.float_configs import forget_in_diffusers, is_float
from requanto.integrations.patching import stamped_before_upload


def register() -> None:
    """Patches the methods; models without quantized weights are not affected."""
    from diffusers.models.modeling_utils import ModelMixin

    if hasattr(ModelMixin.save_pretrained, "_requanto"):
        return
    wrap_from_pretrained(ModelMixin)
    ModelMixin.from_pretrained = classmethod(_wrap_from_pretrained(ModelMixin.from_pretrained.__func__))
    watch_from_pretrained(ModelMixin, "diffusion_pytorch_model")
    ModelMixin._upload_folder = stamped_before_upload(ModelMixin._upload_folder)
    ModelMixin.save_pretrained = without_fused_layers(_wrap_save_pretrained(ModelMixin.save_pretrained))
    if hasattr(ModelMixin, "_load_pretrained_model"):
        ModelMixin._load_pretrained_model = classmethod(_wrap_load(ModelMixin._load_pretrained_model.__func__))
    ModelMixin.get_memory_footprint = _wrap_memory_footprint(ModelMixin.get_memory_footprint)
    allow_casts(ModelMixin)
    register_models()


def register_single_file() -> None:
    """Patches ``from_single_file``."""
    from diffusers.loaders.single_file_model import FromOriginalModelMixin

    if not hasattr(FromOriginalModelMixin.from_single_file, "_requanto"):
        inner = _wrap_from_single_file(FromOriginalModelMixin.from_single_file.__func__)
        outer = diffusers_single_files.wrap_from_single_file(gguf_diffusers.wrap_from_single_file(inner))
        FromOriginalModelMixin.from_single_file = classmethod(outer)


def _wrap_load(original: Any) -> Any:
    """Raises if stored codes would not be loaded: Diffusers would leave these weights without values.

    Files of other libraries get Requanto's quantizer here if config.json does not say that they are quantized.
    """

    @functools.wraps(original)
    def _load_pretrained_model(
        cls: Any, model: Any, state_dict: Any, files: Any, path: Any, keys: Any, **kwargs: Any
    ) -> Any:
        foreign = quantizer_for(files, kwargs)
        if foreign is not None:
            keys, kwargs["hf_quantizer"] = foreign.maybe_update_loaded_keys(keys, files), foreign
            foreign.preprocess_model(
                model=model,
                device_map=kwargs.get("device_map"),
                keep_in_fp32_modules=kwargs.get("keep_in_fp32_modules") or [],
            )
        wanted = model.state_dict().keys()
        check_all_read(set(keys) - wanted, wanted - set(keys), cls.__name__)
        if not getattr(kwargs.get("hf_quantizer"), "pre_quantized", False):
            check_scales_read(set(keys) - wanted, wanted, cls.__name__)
        result = original(cls, model, state_dict, files, path, keys, **kwargs)
        if foreign is not None:
            foreign.postprocess_model(result[0])
            result[0].hf_quantizer = foreign
        return result

    return _load_pretrained_model


def _wrap_memory_footprint(original: Any) -> Any:
    @functools.wraps(original)
    def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
        if has_quantized(self):
            return true_bytes(self, return_buffers)
        return original(self, return_buffers)

    return get_memory_footprint


def _wrap_save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        if is_float(self):
            forget_in_diffusers(self)
        if not has_quantized(self) and not activation_table(self):
            return original(self, save_directory, *args, **kwargs)
        if kwargs.get("use_flashpack"):
            raise ValueError(
                "use_flashpack=True writes all tensors in one float type, which would destroy the codes of a quantized "
                "model; save it as safetensors, without use_flashpack"
            )
        adapters = [name for name, module in self.named_modules() if hasattr(module, "lora_A")]
        if adapters:
            raise ValueError(
                f"{type(self).__name__} has LoRA adapters (on {adapters[0]} ...), which save_pretrained would write "
                f"among the model's own weights. Save them with pipe.save_lora_weights(...) or "
                f"model.save_lora_adapter(...) and call unload_lora_weights() (or unload_lora()) first. Fused adapters "
                f"remain part of the weights."
            )
        from requanto.integrations.diffusers import RequantoDiffusersQuantizer, attach_quantizer, record_weights

        quantizer = getattr(self, "hf_quantizer", None) or attach_quantizer(self)
        if not isinstance(quantizer, RequantoDiffusersQuantizer):
            raise ValueError(
                f"the model was loaded with {type(quantizer).__name__} and also holds weights quantized by Requanto, but a "
                f"directory can hold only one of them. Load the float model and quantize all of it with one library."
            )
        if not (args[0] if args else kwargs.get("is_main_process", True)):
            # As for a float model, except that Diffusers itself would also write the weights.
            os.makedirs(save_directory, exist_ok=True)
            return None
        config = quantizer.quantization_config
        record_weights(self, config, saving=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
        # A .bin file holds no metadata.
        safe = args[2] if len(args) > 2 else kwargs.get("safe_serialization", True)
        identified = awaiting_id(config) if safe else contextlib.nullcontext()
        with identified, replaced_directory(save_directory) as scratch:
            try:
                result = original(self, str(scratch), *args, **kwargs)
            finally:
                config.digests = {}  # those of the files; weights in memory may change
            stamp(scratch)
            write_readme(scratch, self, config, library="diffusers")
        return result

    save_pretrained._requanto = True
    return save_pretrained


def _wrap_from_pretrained(original: Any) -> Any:
    """Makes ``use_flashpack`` with a QuantoConfig an error: FlashPack loading bypasses quantizers without a warning.

    Who opens a checkpoint of another library depends on the other keywords, too.
    """

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        config = kwargs.get("quantization_config")
        method = getattr(config, "quant_method", None)
        if kwargs.get("use_flashpack") and getattr(method, "value", method) == "quanto":
            raise ValueError(
                "use_flashpack=True loads weights without quantizing them; load the safetensors files instead"
            )
        with loading({**kwargs, "path": pretrained_model_name_or_path}):
            return original(cls, pretrained_model_name_or_path, **kwargs)

    return from_pretrained


def _wrap_from_single_file(original: Any) -> Any:
    @functools.wraps(original)
    def from_single_file(cls: Any, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        config = _config_of_file(pretrained_model_link_or_path_or_dict, kwargs)
        if config is not None:
            kwargs["quantization_config"] = config
            _check_file(pretrained_model_link_or_path_or_dict, config)
        return original(cls, pretrained_model_link_or_path_or_dict, **kwargs)

    from_single_file._requanto = True
    return from_single_file


def _check_file(source: Any, config: QuantoConfig) -> None:
    """Raises unless a single file holds the weights that its config describes; Diffusers looks for names in it first."""
    from requanto.integrations.diffusers import RequantoDiffusersQuantizer

    keys = list(source) if isinstance(source, dict) else list(stored_keys([source]))
    RequantoDiffusersQuantizer(config, pre_quantized=True).maybe_update_loaded_keys(keys, [str(source)[:200]])


def _config_of_file(source: Any, kwargs: dict[str, Any]) -> QuantoConfig | None:
    """Returns the config of a single file quantized by Requanto; None for any other file and for one not on this machine.

    Raises:
        CheckpointError: the file is quantized, but no config.json describes it.
    """
    if isinstance(source, dict):
        keys, parent = set(source), None
    elif str(source).endswith(".safetensors") and os.path.isfile(source):
        keys, parent = stored_keys([source]), Path(source).parent
    else:
        return None
    if not any(key.endswith("_qdata") for key in keys):
        return None
    given = kwargs.get("quantization_config")
    if isinstance(given, QuantoConfig) and given.tensors:
        return given
    folders = [Path(kwargs["config"], kwargs.get("subfolder") or "")] if kwargs.get("config") else []
    for folder in folders + ([parent] if parent else []):
        stored = stored_config(read_json(folder / "config.json"), folder)
        if stored.get("tensors"):
            if parent:
                check_ids(stored.pop("save_id", None), [source])
            return checked_config(stored)
    raise CheckpointError(
        f"{source if parent else 'the state dict'} holds quantized weights, but no config.json that describes them was "
        f"found (searched {', '.join(map(str, [*folders, *([parent] if parent else [])])) or 'no directory'}). Pass "
        f"config='the directory whose config.json was saved with it'."
    )
