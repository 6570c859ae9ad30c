"""Methods of Transformers' PreTrainedModel that must know about quantized weights: its size, saving, and unread codes."""

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
from requanto.checkpoint.foreign.quanto_directory import reading_quanto
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.readme import write_readme
from requanto.integrations.conversion import has_quantized, true_bytes, world_size
from requanto.integrations.shards import local_quantized

logger = logging.getLogger(__name__)


def register() -> None:
    """Wraps the methods; a model without quantized weights is untouched by both."""
    from transformers.modeling_utils import PreTrainedModel

    from requanto.integrations import tensor_parallel
    from requanto.integrations.accelerate import register_transformers

    if hasattr(PreTrainedModel.save_pretrained, "_requanto"):
        return
    register_transformers()
    tensor_parallel.register()
    reading_quanto(PreTrainedModel)
    PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)
    PreTrainedModel.get_memory_footprint = _footprint(PreTrainedModel.get_memory_footprint)
    PreTrainedModel._finalize_model_loading = staticmethod(_checked(PreTrainedModel._finalize_model_loading))


def _checked(original: Any) -> Any:
    """An explicit ``quantization_config=None`` drops what config.json says: the model would run on random weights."""

    @functools.wraps(original)
    def finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        unread = sorted(key for key in loading_info.unexpected_keys if key.endswith("_qdata"))
        unread = [key for key in unread if key.removesuffix("_qdata") in loading_info.missing_keys]
        if unread:
            raise CheckpointError(
                f"the files hold quantized weights ({unread[0]} and {len(unread) - 1} more), but the config says nothing "
                f"of them, so {type(model).__name__} would keep random ones. Leave quantization_config out instead of "
                f"passing None, and keep the quantization_config in config.json that was saved with the files."
            )
        return original(model, load_config, loading_info)

    return finalize_model_loading


def _footprint(original: Any) -> Any:
    @functools.wraps(original)
    def get_memory_footprint(self: Any, return_buffers: bool = True) -> int:
        if has_quantized(self):
            return true_bytes(self, return_buffers)
        return original(self, return_buffers)

    get_memory_footprint._requanto = True
    return get_memory_footprint


def _saving(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(self, "hf_quantizer", None)
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if adapter or not (has_quantized(self) or activation_table(self)):
            return original(self, save_directory, *args, **kwargs)
        if quantizer is None and kwargs.get("state_dict") is not None:
            return original(self, save_directory, *args, **kwargs)  # the caller says what the files hold
        if quantizer is None:  # quantized in place, by requanto.quantize
            from requanto.integrations.transformers import attach_quantizer

            quantizer = attach_quantizer(self)
        elif not type(quantizer).__module__.startswith("requanto."):
            raise ValueError(
                f"the model was loaded with {type(quantizer).__name__} and holds weights quantized by Requanto as well; "
                f"one directory holds one of them. Load the float model and quantize all of it with one."
            )
        if kwargs.get("distributed_checkpoint"):
            raise NotImplementedError(
                "save_pretrained(distributed_checkpoint=True) of a quantized model: Transformers refuses to load such files "
                "into one. Save without it (rank 0 writes the whole model), or the state dict with "
                "torch.distributed.checkpoint."
            )
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
        main = world_size() == 1 or self.should_save_on_this_rank(
            args[0] if args else kwargs.get("is_main_process", True)
        )
        # The other ranks take part in putting weights together, and write nothing: they get a directory to list.
        with replaced_directory(save_directory) if main else tempfile.TemporaryDirectory() as scratch:
            result = original(self, scratch, *args, **kwargs)
            if main:
                write_readme(scratch, self, quantizer.quantization_config, replaces=Path(save_directory))
        if world_size() > 1 and any(local_quantized(parameter) is not None for parameter in self.parameters()):
            dist.barrier()  # no rank goes on before the new directory is in its place
        return result

    save_pretrained._requanto = True
    return save_pretrained
