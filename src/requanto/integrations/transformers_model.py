"""Patches of Transformers' PreTrainedModel for quantized weights: loading, saving, memory footprint."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from requanto.checkpoint.activation_table import activation_table
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.files import check_all_read, check_scales_read
from requanto.checkpoint.foreign.quanto_directory import wrap_from_pretrained
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.opening import stored_config
from requanto.checkpoint.readme import write_readme
from requanto.checkpoint.save_id import awaiting_id, stamp
from requanto.checkpoint.watched_load import watch_from_pretrained
from requanto.integrations import tensor_parallel, transformers_resize
from requanto.integrations.casts import allow_casts
from requanto.integrations.conversion import has_quantized, true_bytes, world_size
from requanto.integrations.float_configs import forget_in_transformers, is_float
from requanto.integrations.part_markers import marked
from requanto.integrations.patching import stamped_before_upload
from requanto.integrations.shards import local_quantized

logger = logging.getLogger(__name__)


def register() -> None:
    """Patches the methods; models without quantized weights are not affected."""
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

    from requanto.integrations import gguf, transformers_parts
    from requanto.integrations.accelerate import register_transformers

    if hasattr(PreTrainedModel.save_pretrained, "_requanto"):
        return
    register_transformers()
    tensor_parallel.register()
    transformers_resize.register()
    transformers_parts.register()
    gguf.register()
    wrap_from_pretrained(PreTrainedModel)
    watch_from_pretrained(PreTrainedModel, "model")
    PreTrainedModel._upload_modified_files = stamped_before_upload(PreTrainedModel._upload_modified_files)
    PreTrainedModel.save_pretrained = _wrap_save_pretrained(PreTrainedModel.save_pretrained)
    PreTrainedModel.get_memory_footprint = _wrap_memory_footprint(PreTrainedModel.get_memory_footprint)
    if not hasattr(PreTrainedConfig.get_config_dict, "_requanto"):
        PreTrainedConfig.get_config_dict = classmethod(_wrap_get_config(PreTrainedConfig.get_config_dict.__func__))
    allow_casts(PreTrainedModel)
    PreTrainedModel._finalize_model_loading = staticmethod(
        _wrap_finalize_loading(PreTrainedModel._finalize_model_loading)
    )


def _wrap_finalize_loading(original: Any) -> Any:
    """Raises if stored codes that belong to weights of the model were not loaded, before these are initialized."""

    from requanto.integrations import transformers_parts

    @functools.wraps(original)
    def finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        transformers_parts.check_loaded(model, set(loading_info.missing_keys))
        check_all_read(loading_info.unexpected_keys, loading_info.missing_keys, type(model).__name__)
        if not getattr(getattr(load_config, "hf_quantizer", None), "pre_quantized", False):
            names = [name for name, _parameter in model.named_parameters()]
            check_scales_read(loading_info.unexpected_keys, names, type(model).__name__)
        quantizer = model.__dict__.get(tensor_parallel.LOADING)
        if quantizer is not None and quantizer.pre_quantized:
            _check_shapes(loading_info.mismatched_keys, getattr(load_config, "ignore_mismatched_sizes", False))
        return original(model, load_config, loading_info)

    return finalize_model_loading


def _check_shapes(mismatched: Any, ignore: bool) -> None:
    """Raises for tensors of a wrong shape in a quantized checkpoint; Transformers would only print a table."""
    if mismatched and not ignore:
        name, found, expected = sorted(mismatched, key=str)[0]
        raise CheckpointError(
            f"{name}: the checkpoint holds shape {tuple(found)}, the model expects {tuple(expected)} "
            f"({len(mismatched)} such tensors): a file or config.json is damaged, or they do not belong together"
        )


def _wrap_get_config(original: Any) -> Any:
    """Raises for a ``quantization_config`` that is no object, which Transformers would take for a config object."""

    @functools.wraps(original)
    def get_config_dict(cls: Any, path: Any, **kwargs: Any) -> Any:
        found, rest = original(cls, path, **kwargs)
        if isinstance(found, dict):
            stored_config(found, path)
        return found, rest

    get_config_dict._requanto = True  # type: ignore[attr-defined]
    return get_config_dict


def _wrap_memory_footprint(original: Any) -> Any:
    @functools.wraps(original)
    def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
        if has_quantized(self):
            return true_bytes(self, return_buffers)
        return original(self, return_buffers)

    get_memory_footprint._requanto = True
    return get_memory_footprint


def _wrap_save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(self, "hf_quantizer", None)
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not adapter and is_float(self):
            forget_in_transformers(self)
            quantizer = getattr(self, "hf_quantizer", None)
        if adapter or not (has_quantized(self) or activation_table(self)):
            return original(self, save_directory, *args, **kwargs)
        if quantizer is None and kwargs.get("state_dict") is not None:
            return original(self, save_directory, *args, **kwargs)  # the caller decides what is saved
        if quantizer is None:  # quantized in place, by requanto.quantize
            from requanto.integrations.transformers import attach_quantizer

            quantizer = attach_quantizer(self)
        elif not type(quantizer).__module__.startswith("requanto."):
            raise ValueError(
                f"the model was loaded with {type(quantizer).__name__} and also holds weights quantized by Requanto, but a "
                f"directory can hold only one of them. Load the float model and quantize all of it with one library."
            )
        if kwargs.get("distributed_checkpoint"):
            raise NotImplementedError(
                "save_pretrained(distributed_checkpoint=True) is not supported for a quantized model: Transformers "
                "refuses to load such a checkpoint. Save without it (rank 0 writes the whole model), or save the state "
                "dict with torch.distributed.checkpoint."
            )
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
        chosen = args[0] if args else kwargs.get("is_main_process", True)
        main = bool(chosen) and (world_size() == 1 or self.should_save_on_this_rank(chosen))
        if not chosen:
            os.makedirs(save_directory, exist_ok=True)  # as for a float model
        config = quantizer.quantization_config
        # Other ranks take part in gathering weights but write nothing; Transformers still lists their save directory.
        place = replaced_directory(save_directory) if main else tempfile.TemporaryDirectory()
        with awaiting_id(config), place as scratch:
            try:
                with marked(self.config, config):
                    result = original(self, scratch, *args, **kwargs)
            finally:
                config.digests = {}  # those of the files; weights in memory may change
            if main:
                stamp(scratch)
                write_readme(scratch, self, config)
        if world_size() > 1 and any(local_quantized(parameter) is not None for parameter in self.parameters()):
            dist.barrier()  # wait until rank 0 has replaced the directory
        return result

    save_pretrained._requanto = True
    return save_pretrained
