"""Two methods of Transformers' PreTrainedModel that must know about quantized weights: its size, and saving."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.quanto_directory import reading_quanto
from requanto.checkpoint.readme import write_readme
from requanto.integrations.conversion import has_quantized, true_bytes, world_size

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
        ours = type(quantizer).__module__.startswith("requanto.") and has_quantized(self)
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if not ours or adapter or world_size() > 1:
            return original(self, save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
        with replaced_directory(save_directory) as scratch:
            result = original(self, scratch, *args, **kwargs)
            write_readme(scratch, self, quantizer.quantization_config, replaces=Path(save_directory))
        return result

    save_pretrained._requanto = True
    return save_pretrained
