"""GGUF files in Transformers' ``from_pretrained(..., gguf_file=...)``: weights stay quantized."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from requanto.checkpoint.foreign.directory import recipe_for
from requanto.checkpoint.foreign.gguf_header import read_header, shards_of
from requanto.checkpoint.foreign.gguf_source import GgufSource
from requanto.checkpoint.foreign.translated import Translated, tell
from requanto.checkpoint.format import CheckpointError
from requanto.integrations import transformers_parts
from requanto.integrations.foreign import method_of, takes_over, warn_of_choices
from requanto.integrations.gguf_names import scan_for
from requanto.integrations.gguf_reader import found_file
from requanto.integrations.tensor_parallel import LOADING
from requanto.integrations.transformers import RequantoHfQuantizer


def register() -> None:
    """Patches the function that chooses the quantizer; it is not patched twice."""
    from transformers import modeling_utils

    if not hasattr(modeling_utils.get_hf_quantizer, "_requanto_gguf"):
        modeling_utils.get_hf_quantizer = _wrap_get_quantizer(modeling_utils.get_hf_quantizer)


def _wrap_get_quantizer(original: Any) -> Any:
    @functools.wraps(original)
    def get_hf_quantizer(
        config: Any,
        quantization_config: Any,
        device_map: Any,
        weights_only: Any,
        user_agent: Any,
        gguf_file: Any = None,
    ) -> Any:
        path, options = transformers_parts.call()
        other = getattr(config, "quantization_config", None)
        if (
            gguf_file is None
            or method_of(other) not in (None, "quanto")
            or not takes_over("gguf", quantization_config, lambda: _reason(path, gguf_file, options))
        ):
            return original(config, quantization_config, device_map, weights_only, user_agent, gguf_file=gguf_file)
        quantizer = RequantoGgufQuantizer(quantization_config, path, options)
        config.quantization_config = quantizer.quantization_config
        device_map = quantizer.update_device_map(device_map)
        user_agent["quant"] = "quanto"
        return quantizer, config, device_map

    get_hf_quantizer._requanto_gguf = True  # type: ignore[attr-defined]
    return get_hf_quantizer


def _reason(path: Any, gguf_file: str, options: Mapping[str, Any]) -> str | None:
    """Why Transformers does not keep the weights quantized; None if it does."""
    from transformers.integrations.gguf.kernels import get_gguf_kernel
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.utils import is_kernels_available

    file = found_file(path, gguf_file, options)
    fields, tensors = read_header(file) if file is not None else ({}, [])
    if tensors and all(one.type.dtype is not None for one in tensors):
        return None  # a file of floats
    architecture = fields.get("general.architecture")
    if architecture is None or not is_gguf_arch_supported(architecture):
        return f"Transformers turns all weights of {architecture or 'most'} models into floats"
    if not (is_kernels_available() and get_gguf_kernel()):
        return "Transformers turns all weights into floats without its kernels for GGUF"
    return None


class RequantoGgufQuantizer(RequantoHfQuantizer):
    """Loads a GGUF file. After that the model is one of Requanto's, as if its own format had been loaded.

    Args:
        asked: ``quantization_config`` of ``from_pretrained``: how to quantize a file of floats; None: it stays float.
        path, options: further arguments of ``from_pretrained``.
    """

    def __init__(self, asked: Any, path: Any = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(recipe_for(None) if asked is None else asked, pre_quantized=True)
        self._asked, self._path, self._options = asked, path, options or {}
        self.source: GgufSource | None = None
        self._state: Translated | None = None

    def read_header(self, gguf_file: str) -> None:
        """Reads the heads of the files; of a split checkpoint, of all."""
        for shard in shards_of(gguf_file):
            if not shard.is_file():
                found_file(self._path, shard.name, self._options)
        self.source = GgufSource(gguf_file)
        if any(info.type.dtype is None for info in self.source.tensors.values()):
            warn_of_choices(self._asked)
            self.quantization_config = recipe_for(None)
        else:
            self.pre_quantized = self._asked is None

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype to load in: that of a file of floats, else torch's default, where none is given."""
        if dtype is not None:
            return dtype
        assert self.source is not None
        dtypes = {info.type.dtype for info in self.source.tensors.values()}
        halves = [kind for kind in (torch.bfloat16, torch.float16) if kind in dtypes]
        return halves[0] if halves and None not in dtypes else torch.get_default_dtype()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.__dict__[LOADING] = self
        assert self.source is not None
        self.leaves = frozenset(name.rpartition(".")[2] for name, _ in model.named_parameters(remove_duplicate=False))
        where = Path(next(iter(self.source.tensors.values())).file).name if len(self.source) else "the file"
        found = scan_for(model, self.source)
        tell(found, where)
        if not found.weights and not found.floats:
            raise CheckpointError(
                f"{where} holds no weight of {type(model).__name__} ({found.format}): it is a file of another model"
            )
        self._state = Translated(found, self.source)
        if not self.pre_quantized:
            super()._process_model_before_weight_loading(model, **{**kwargs, "checkpoint_files": None})
            return
        recipe = recipe_for(found)
        self.quantization_config.weights = recipe.weights
        self.quantization_config.record(dict(recipe.tensors))
        self.names = self.stored_names(model, list(self._state))

    def get_state_dict(self, checkpoint_file: str, model: Any) -> Mapping[str, Any]:
        """The file's tensors under the names of our format, none of them read yet."""
        assert self._state is not None
        return self._state

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Ours alone: the names are those of the model already, and those of safetensors files do not apply."""
        return self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        result = super()._process_model_after_weight_loading(model, **kwargs)
        self._state = self.source = None
        if not self.quantization_config.tensors:  # a file of floats
            self.remove_quantization_config(model)
        return result
