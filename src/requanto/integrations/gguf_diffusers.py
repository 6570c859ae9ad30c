"""GGUF files in Diffusers' ``from_single_file``: weights stay quantized.

Diffusers converts the names of a file's tensors, and splits and joins some; quantized weights are split and joined along
rows without a change, so they are given to it as they are, in place of its own `GGUFParameter`. Where it does something else
with values it gets floats, and the weight stays float.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.foreign.directory import recipe_for
from requanto.checkpoint.foreign.gguf import scan
from requanto.checkpoint.foreign.gguf_source import GgufSource
from requanto.checkpoint.foreign.translated import built, tell
from requanto.config.plan import weight_kind
from requanto.integrations.foreign import takes_over, warn_of_choices
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


def wrap_from_single_file(original: Any) -> Any:
    """Returns a function that opens files whose name ends with ``.gguf`` itself, and passes everything else on."""

    @functools.wraps(original)
    def from_single_file(cls: Any, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        path = pretrained_model_link_or_path_or_dict
        asked = kwargs.get("quantization_config")
        if not _is_gguf(path) or not takes_over("gguf", asked, _reason):
            return original(cls, path, **kwargs)
        file = found_file(path, kwargs)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        tensors = read_tensors(file, dtype if isinstance(dtype, torch.dtype) else torch.float32)
        count = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, QTensor))
        if not count:  # a file of floats, which a config may quantize as any other
            return original(cls, tensors, **kwargs)
        warn_of_choices(asked)
        kwargs["quantization_config"] = recipe_for(None)
        model = original(cls, tensors, **kwargs)
        check_kept(model, Path(file).name, count)
        return model

    return from_single_file


def _is_gguf(path: Any) -> bool:
    return isinstance(path, (str, os.PathLike)) and str(path).endswith(".gguf")


def _reason() -> str:
    return "Diffusers opens it with quantization_config=GGUFQuantizationConfig(...) only"


def found_file(path: Any, options: Mapping[str, Any]) -> str:
    """The file on this machine, downloaded if need be."""
    if os.path.isfile(path):
        return str(path)
    from diffusers.loaders import single_file_utils as library

    repository, name = library._extract_repo_id_and_weights_name(str(path))
    place = ("force_download", "cache_dir", "proxies", "local_files_only", "token", "revision")
    return library._get_model_file(repository, weights_name=name, **{key: options.get(key) for key in place})


def read_tensors(file: str | os.PathLike, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All tensors of a file under its own names: quantized weights, and floats as they are stored.

    Args:
        file: the file, or one of those of a split one.
        dtype: dtype that quantized weights show; that of weights which are dequantized.

    Raises:
        CheckpointError: the file is damaged.
    """
    source = GgufSource(file)
    found = scan({}, source)
    tell(found, os.path.basename(file))
    tensors: dict[str, torch.Tensor] = {}
    for name in source:
        if name in found.weights:
            tensors[name] = built(name, found.weights[name], source, dtype)
        elif name in found.floats:
            weight = found.floats[name]
            tensors[name] = weight.build(source).to(dtype if weight.reason else weight.dtype)
        else:
            tensors[name] = source[name]
    return tensors


def check_kept(model: Any, file: str, count: int, convolutions: bool = False) -> None:
    """Dequantizes weights that are no linear layer's or embedding's, and says what did not stay quantized.

    Args:
        count: number of weights that are quantized in the file.
        convolutions: their weights stay quantized, too.
    """
    from requanto.integrations.diffusers import record_weights

    unusual = []
    for owner, module in model.named_modules():
        for leaf, weight in list(module._parameters.items()):
            if not isinstance(weight, QTensor):
                continue
            kind = weight_kind(module, leaf, weight)
            if kind is None or (kind[0] == "convolution" and not convolutions):
                module._parameters[leaf] = nn.Parameter(weight.dequantize(), requires_grad=False)
                unusual.append(f"{owner}.{leaf}".removeprefix("."))
                count -= weight.numel()
    if unusual:
        record_weights(model, model.hf_quantizer.quantization_config)
        logger.warning(
            "%s: %d weights are dequantized, e.g. %s: they are not those of layers that can be quantized",
            *(file, len(unusual), unusual[0]),
        )
    kept = sum(weight.numel() for weight in model.parameters() if isinstance(weight, QTensor))
    if kept < count:
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module.weight, QTensor)
        ]
        logger.warning(
            "%s: %d of %d million quantized numbers stay quantized in %s. The others are not used, or Diffusers computes "
            "with their values; linear layers that are float: %s",
            *(file, kept // 10**6, count // 10**6, type(model).__name__, ", ".join(linear[:4]) or "none"),
        )
