"""Checkpoints of other libraries in Diffusers' ``from_pretrained``.

`claim` decides who opens a checkpoint when Diffusers picks its quantizer. `ForeignFiles` tells Requanto's quantizer what is
in the files, and makes the weights of each file when Diffusers has read it. A directory whose tensors are quantized and
whose config.json does not say so gets the quantizer when its weights are loaded (`quantizer_for`).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from requanto.checkpoint.activation_table import SCALES
from requanto.checkpoint.foreign.directory import recipe_for
from requanto.checkpoint.foreign.found import ForeignCheckpoint
from requanto.checkpoint.foreign.readers import recognize, scan
from requanto.checkpoint.foreign.source import FilesSource
from requanto.checkpoint.foreign.translated import Translated, built, tell
from requanto.checkpoint.format import CheckpointError
from requanto.config.config import QuantoConfig
from requanto.config.plan import weight_kind
from requanto.integrations.conversion import frozen_parameter
from requanto.integrations.foreign import as_dict, is_known, refuse_pickles, takes_over, warn_of_choices
from requanto.runtime.settings import settings
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: keywords of the from_pretrained that is running
_options: ContextVar[Mapping[str, Any]] = ContextVar("from_pretrained", default={})  # noqa: B039  (never changed)


@contextlib.contextmanager
def loading(options: Mapping[str, Any]) -> Iterator[None]:
    """Remembers the keywords of a ``from_pretrained`` while it runs."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def claim(stored: Any, asked: Any) -> QuantoConfig | None:
    """A config that makes Requanto's quantizer open a checkpoint; None if another library opens it.

    Args:
        stored: the checkpoint's ``quantization_config``.
        asked: the caller's.

    Raises:
        CheckpointError: the weights are a pickle.
    """
    known = as_dict(stored)
    method = str(known["quant_method"])
    if method == "quanto" or not is_known(method) or not takes_over(method, asked, lambda: _reason(known)):
        return None
    _refuse_pickles(_options.get().get("path"), method)
    warn_of_choices(asked)
    return config_for(known)


def config_for(stored: dict[str, Any]) -> QuantoConfig:
    """A config with which Requanto's quantizer opens a checkpoint of another library.

    Args:
        stored: the checkpoint's own config.
    """
    config = recipe_for(None)
    config.foreign = stored  # type: ignore[attr-defined]
    return config


def _reason(stored: dict[str, Any]) -> str | None:
    """Why Diffusers, with the format's own library, does not open a checkpoint here; None if it does."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, DiffusersAutoQuantizer

    method = stored["quant_method"]
    if not any(name == method or name.startswith(f"{method}_") for name in AUTO_QUANTIZATION_CONFIG_MAPPING):
        return "Diffusers does not know the format"
    options = _options.get()
    dtype = options.get("dtype") or options.get("torch_dtype")
    try:
        quantizer = DiffusersAutoQuantizer.from_config(copy.deepcopy(stored), pre_quantized=True)
        quantizer.validate_environment(torch_dtype=dtype, device_map=copy.deepcopy(options.get("device_map")))
    except Exception as error:  # whatever the library has against this machine
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    return None


def _refuse_pickles(path: Any, method: str) -> None:
    """Raises for a local directory that holds weights as pickles only, before Diffusers opens one."""
    folder = (
        Path(path, _options.get().get("subfolder") or "") if isinstance(path, (str, os.PathLike)) and path else None
    )
    if folder is None or not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        refuse_pickles(pickles, method)


class ForeignFiles:
    """The files of a checkpoint while Diffusers reads them one after the other.

    Args:
        stored: the checkpoint's config, or one that was recognized.
        files: its files.
        where: its name, for the log.

    Raises:
        CheckpointError: a file is no safetensors file on this machine, or config and tensors disagree.
    """

    def __init__(self, stored: Mapping[str, Any], files: Iterable[str | os.PathLike], where: str) -> None:
        files = [str(file) for file in files]
        refuse_pickles(files, stored.get("quant_method"))
        absent = next((file for file in files if not os.path.isfile(file)), None)
        if absent is not None:
            raise CheckpointError(
                f"{absent} is no file on this machine, and weights of other libraries are read from files only: unpack "
                f"archives, or download the checkpoint first"
            )
        source = FilesSource(files)
        self.found: ForeignCheckpoint = scan(stored, source)
        tell(self.found, where)
        self._translated = Translated(self.found, source)
        self._consumed = self.found.consumed

    def names(self, stored: Iterable[str]) -> list[str]:
        """Names of all tensors that the model gets, for those in the files."""
        found = self.found
        scales = [f"{module}.{scale}" for module in found.activations for scale in SCALES]
        return [*found.weights, *found.floats, *scales, *(name for name in stored if name not in self._consumed)]

    def tensors(self, state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """What the tensors of one file become. What is made of tensors in several files belongs to that with the first.

        Args:
            state: the tensors of the file.
            dtype: dtype that quantized weights show.
        """
        found, source = self.found, self._translated.source
        new = {name: value for name, value in state.items() if name not in self._consumed}
        for name, weight in found.weights.items():
            if weight.sources[0] in state:
                new[name] = built(name, weight, source, dtype)
        floats = {name: name for name, one in found.floats.items() if one.sources[0] in state}
        for module, one in found.activations.items():
            if one.sources[0] in state:
                floats |= {f"{module}.{scale}": module for scale in SCALES}
        return new | {name: self._translated[name][...] for name in floats}


def recognized(files: Iterable[str | os.PathLike] | None) -> dict[str, Any] | None:
    """A config for files that are quantized, and whose config does not say so; None for others."""
    files = [str(file) for file in files or ()]
    if not files or not all(file.endswith(".safetensors") and os.path.isfile(file) for file in files):
        return None
    return recognize({}, FilesSource(files, unique=False))


def quantizer_for(files: Iterable[Any], options: Mapping[str, Any]) -> Any:
    """Requanto's quantizer for a model whose files are quantized, and whose config.json does not say so; else None.

    Args:
        options: keywords of Diffusers' ``_load_pretrained_model``.
    """
    if settings.foreign == "never" or options.get("hf_quantizer") is not None:
        return None
    stored = recognized(files)
    if stored is None or not takes_over(stored["quant_method"], None, lambda: "config.json does not name the format"):
        return None
    if options.get("tp_shard_specs") is not None:
        raise CheckpointError(
            f"the files are quantized ({stored['quant_method']}), and Diffusers divides only float weights among ranks "
            f"while it loads them: load without parallel_config"
        )
    if not options.get("low_cpu_mem_usage", True):
        raise CheckpointError("low_cpu_mem_usage=False: quantized weights are loaded with low_cpu_mem_usage=True only")
    from requanto.integrations.diffusers import RequantoDiffusersQuantizer

    quantizer = RequantoDiffusersQuantizer(config_for(stored), pre_quantized=True)
    quantizer.update_torch_dtype(options.get("dtype"))
    return quantizer


def dequantize_unusual(model: Any) -> list[str]:
    """Dequantizes weights that are no layer's which can run with them, and returns their names."""
    unusual = []
    for owner, module in model.named_modules():
        for leaf, weight in list(module._parameters.items()):
            if isinstance(weight, QTensor) and weight_kind(module, leaf, weight) is None:
                module._parameters[leaf] = frozen_parameter(weight.dequantize())
                unusual.append(f"{owner}.{leaf}".removeprefix("."))
    if unusual:
        logger.warning(
            "%d weights are dequantized, e.g. %s: they are not those of layers that can be quantized",
            *(len(unusual), unusual[0]),
        )
    return unusual
