"""Single safetensors files of other libraries in Diffusers' ``from_single_file``: ComfyUI's, BFL's, Nunchaku's.

As with GGUF files (`gguf_diffusers`), Diffusers gets quantized weights in place of its tensors, and converts their names. A
file of a whole pipeline is opened once; weights of its text encoders become floats, because Transformers loads those.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from requanto.checkpoint.foreign.comfyui import is_cast
from requanto.checkpoint.foreign.directory import recipe_for
from requanto.checkpoint.foreign.readers import recognize, scan
from requanto.checkpoint.foreign.source import FilesSource, Source, TensorsSource
from requanto.checkpoint.foreign.translated import built, tell
from requanto.checkpoint.format import CheckpointError
from requanto.config.config import QuantoConfig
from requanto.integrations.float_configs import forget_in_diffusers
from requanto.integrations.foreign import chosen, method_of, takes_over, warn_of_choices
from requanto.integrations.gguf_diffusers import check_kept, found_file
from requanto.runtime.settings import settings
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: beginnings of names of weights that Transformers loads
_TEXT_ENCODERS = ("text_encoder", "cond_stage_model.", "conditioner.")


class _Opened(NamedTuple):
    """A file that Requanto opens.

    Attributes:
        tensors: its weights under its own names: quantized ones, and floats.
        where: its name, for the log.
        metadata: of its header.
    """

    tensors: dict[str, torch.Tensor]
    where: str
    metadata: Mapping[str, str]


def wrap_from_single_file(original: Any) -> Any:
    """Returns a function that opens files of other libraries itself, and passes everything else on."""

    @functools.wraps(original)
    def from_single_file(cls: Any, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        path, asked = pretrained_model_link_or_path_or_dict, kwargs.get("quantization_config")
        if _is_file(path):
            path = found_file(path, kwargs)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        opened = _open(path, asked, dtype if isinstance(dtype, torch.dtype) else torch.float32)
        if opened is None:
            return original(cls, path, **kwargs)
        count = sum(tensor.numel() for tensor in opened.tensors.values() if isinstance(tensor, QTensor))
        if not kwargs.get("low_cpu_mem_usage", True):
            raise CheckpointError(
                "low_cpu_mem_usage=False: quantized weights are loaded with low_cpu_mem_usage=True only"
            )
        warn_of_choices(asked)
        kwargs["quantization_config"] = recipe_for(None)
        with _config_of(opened, cls, kwargs) as options:
            model = original(cls, dict(opened.tensors), **options)
        if any(isinstance(weight, QTensor) for weight in model.parameters()):
            check_kept(model, opened.where, count, convolutions=True)
        else:  # another part of a pipeline
            forget_in_diffusers(model)
        return model

    return from_single_file


def register_pipelines() -> None:
    """Makes pipelines' ``from_single_file`` open files of other libraries."""
    from diffusers.loaders import single_file

    original = single_file.load_single_file_checkpoint
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def load_single_file_checkpoint(path: Any, **kwargs: Any) -> Any:
        if _is_file(path):
            path = found_file(path, kwargs)
        opened = _open(path, None, torch.float32)
        if opened is None:
            return original(path, **kwargs)
        tensors = opened.tensors
        encoders = [
            name for name, tensor in tensors.items() if isinstance(tensor, QTensor) and name.startswith(_TEXT_ENCODERS)
        ]
        for name in encoders:
            tensors[name] = tensors[name].dequantize().to(torch.bfloat16)  # type: ignore[attr-defined]
        if encoders:
            logger.warning(
                "%s: %d weights of text encoders are dequantized, e.g. %s: Transformers loads them as floats",
                *(opened.where, len(encoders), encoders[0]),
            )
        return tensors

    load_single_file_checkpoint._requanto = True  # type: ignore[attr-defined]
    single_file.load_single_file_checkpoint = load_single_file_checkpoint


def _is_file(path: Any) -> bool:
    return isinstance(path, (str, os.PathLike)) and str(path).endswith(".safetensors")


def _open(path: Any, asked: Any, dtype: torch.dtype) -> _Opened | None:
    """The weights of a file or state dict; None if it is float, Requanto's own, or another library opens it.

    Raises:
        CheckpointError: it is damaged.
    """
    if getattr(asked, "tensors", None) or (asked is not None and method_of(asked) != "quanto"):
        return None
    if isinstance(path, dict):
        if any(isinstance(value, QTensor) for value in path.values()):
            return _Opened(path, "the state dict", {})
        source: Source = TensorsSource(path)
    elif _is_file(path):
        source = FilesSource([path])
    else:
        return None
    where = "the state dict" if isinstance(path, dict) else os.path.basename(path)
    stored = recognize({}, source)
    if stored is None and _takes_casts(asked) and is_cast(source):
        stored = {"quant_method": "comfyui", "float8_cast": True}
    if stored is None or not takes_over(stored["quant_method"], asked, _reason):
        return None
    return _Opened(_tensors(stored, source, dtype, where), where, source.metadata)


def _reason() -> str:
    return "Diffusers takes the codes for the weights"


def _takes_casts(asked: Any) -> bool:
    """Whether the caller's config means that float8 weights without scales stay as they are."""
    return isinstance(asked, QuantoConfig) and asked.weights == "float8" and chosen(asked) == ["weights"]


def _tensors(stored: Mapping[str, Any], source: Source, dtype: torch.dtype, where: str) -> dict[str, torch.Tensor]:
    found = scan(stored, source)
    tell(found, where)
    if found.activations:
        logger.warning(
            "%s: the inputs of %d layers stay float: Diffusers gives layers other names, and their scales have no place",
            *(where, len(found.activations)),
        )
    tensors: dict[str, torch.Tensor] = {
        name: built(name, weight, source, dtype) for name, weight in found.weights.items()
    }
    tensors |= {name: one.build(source) for name, one in found.floats.items()}
    consumed = found.consumed
    return tensors | {name: source[name] for name in source if name not in consumed}


@contextlib.contextmanager
def _config_of(opened: _Opened, cls: Any, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keywords with the model's config, where the header has it (Nunchaku) and the caller passed none."""
    given = any(options.get(key) is not None for key in ("config", "original_config"))
    text = opened.metadata.get("config")
    if given or text is None or settings.foreign == "never":
        yield options
        return
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="requanto-") as folder:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        Path(folder, "config.json").write_text(json.dumps({**config, "_class_name": cls.__name__}), encoding="utf-8")
        yield {**options, "config": folder, "subfolder": None}
