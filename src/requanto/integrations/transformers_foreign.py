"""Checkpoints of other libraries in Transformers' ``from_pretrained``: claimed before the model is built, translated after.

`claim` decides who opens a checkpoint and takes its ``quantization_config`` out of the model's config. `ForeignLoad` reads
the headers of its files, and gives the loader a state dict under the names of our own format.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from requanto.checkpoint.foreign.directory import config_of, description_of, recipe_for
from requanto.checkpoint.foreign.found import ForeignCheckpoint, transpose_conv1d
from requanto.checkpoint.foreign.readers import READERS, scan
from requanto.checkpoint.foreign.source import FilesSource, Source, TensorsSource
from requanto.checkpoint.foreign.translated import Translated, tell
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.weight_files import model_files
from requanto.integrations.foreign import as_dict, is_known, method_of, refuse_pickles, takes_over, warn_of_choices
from requanto.runtime.settings import settings

#: key of config.json, or of a file beside it, that only one format writes -> its quant_method
_HINTS = {"hf_quant_config": "modelopt", "quantize_config": "gptq", "quantization": "mlx"}


class ForeignLoad:
    """One checkpoint of another library that is being loaded.

    Args:
        stored: its ``quantization_config``.
        description: content of config.json, with `EXTRA_FILES`.

    Attributes:
        found: what is in it, once `open` was called.
    """

    def __init__(self, stored: dict[str, Any], description: Mapping[str, Any]) -> None:
        self.stored, self.description = stored, description
        self.found: ForeignCheckpoint | None = None
        self._source: Source | None = None

    def open(
        self,
        files: Iterable[str | os.PathLike],
        state: Mapping[str, Any] | None,
        where: str,
        is_conv1d: Callable[[str], bool],
    ) -> Translated:
        """Reads the headers.

        Args:
            files: the checkpoint's files.
            state: the tensors themselves, if the caller passed ``state_dict``.
            where: name of the checkpoint, for the log.
            is_conv1d: whether a stored weight belongs to a Conv1D of the model.

        Returns:
            its tensors under the names of our format.

        Raises:
            CheckpointError: the files are pickles, or config and tensors disagree.
        """
        files = [str(file) for file in files]
        if state is None:
            refuse_pickles(files, self.stored.get("quant_method"))
        self._source = FilesSource(files) if state is None else TensorsSource(state)
        self.found = scan(self._recognized() if self.stored.get("hinted") else self.stored, self._source)
        transpose_conv1d(self.found, is_conv1d)
        tell(self.found, where)
        return Translated(self.found, self._source)

    def _recognized(self) -> dict[str, Any]:
        assert self._source is not None
        config = config_of(self.description, self._source)
        if config is None:
            raise CheckpointError(
                f"config.json, or a file beside it, says that the checkpoint is quantized ({self.stored['quant_method']}), "
                f"and its tensors are not those of that format: it is incomplete, or another program wrote it"
            )
        return config

    def translated(self, state: Mapping[str, Any]) -> Translated:
        """The loader's state dict under the names of our format; tensors that were float stay the loader's own."""
        assert self.found is not None
        assert self._source is not None
        return Translated(self.found, self._source, state)


def claim(
    config: Any, asked: Any, device_map: Any, weights_only: bool, path: Any, options: Mapping[str, Any]
) -> ForeignLoad | None:
    """Decides whether Requanto opens a checkpoint of another library.

    If it does, the config's ``quantization_config`` becomes one of ours with an empty table.

    Args:
        config: the model's config; changed in place.
        asked: ``quantization_config`` of ``from_pretrained``.
        device_map, weights_only: of ``from_pretrained``.
        path: the directory or the name on the hub.
        options: keywords of ``from_pretrained``.
    """
    holder = next((c for c in (config, config.get_text_config(decoder=True)) if _stored(c) is not None), config)
    stored, folder = _stored(holder), _directory(path, options)
    # A config in memory, perhaps that of a model that Requanto opened, may lack what the directory's own says.
    alone = method_of(stored) in (None, "quanto") and options.get("state_dict") is None
    description = _foreign_description(folder) if alone else None
    if description is not None:
        stored = description.get("quantization_config")
    elif method_of(stored) == "quanto":
        return None
    else:
        description = config.to_dict() if folder is None else description_of(folder, config.to_dict())
    if stored is None or method_of(stored) is None:
        hint = next((key for key in _HINTS if isinstance(description.get(key), dict)), None)
        method = _HINTS[hint] if hint is not None else _method_by_tensors(description, folder, asked)
        if method is None:
            return None
        known = {"quant_method": method, "hinted": True}
    else:
        known = as_dict(stored)
    method = str(known["quant_method"])
    if method not in READERS and not options.get("trust_remote_code"):
        check_any_knows(method, asked)
    if not is_known(method) or not takes_over(method, asked, lambda: _reason(known, device_map, weights_only)):
        return None
    if hasattr(holder, "quantization_config"):
        del holder.quantization_config
    warn_of_choices(asked)
    config.quantization_config = recipe_for(None).to_dict()
    return ForeignLoad(known, description)


def _foreign_description(folder: Path | None) -> dict[str, Any] | None:
    """The content of a directory's config.json if another library quantized it, else None."""
    if folder is None or not (folder / "config.json").is_file():
        return None
    found = description_of(folder)
    method = method_of(found.get("quantization_config"))
    hinted = method is None and any(isinstance(found.get(key), dict) for key in _HINTS)
    return found if hinted or method not in (None, "quanto") else None


def check_any_knows(method: str, asked: Any) -> None:
    """Raises for a ``quant_method`` that nobody reads: Transformers would only warn, and give a model of random weights.

    Raises:
        CheckpointError: neither Transformers nor Requanto knows the method, or Requanto was asked for.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if settings.foreign == "never" or (method in AUTO_QUANTIZATION_CONFIG_MAPPING and asked is None):
        return
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING or method_of(asked) == "quanto":
        scan({"quant_method": method}, TensorsSource({}))


def _method_by_tensors(description: Mapping[str, Any], folder: Path | None, asked: Any) -> str | None:
    """The format of files whose config says nothing, if the caller asks for Requanto: only then are they looked at."""
    files = model_files(folder) if folder is not None and method_of(asked) == "quanto" else []
    found = config_of(description, FilesSource(files)) if files else None
    return None if found is None else method_of(found)


def _stored(config: Any) -> Any:
    return getattr(config, "quantization_config", None)


def _directory(path: Any, options: Mapping[str, Any]) -> Path | None:
    """The folder that holds config.json: local, or in the hub's cache."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        return None
    subfolder = options.get("subfolder") or ""
    if Path(path).is_dir():
        return Path(path, subfolder)
    from transformers.utils import cached_file

    place = {key: options[key] for key in ("revision", "cache_dir") if options.get(key) is not None}
    try:
        found = cached_file(str(path), "config.json", subfolder=subfolder, local_files_only=True, **place)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found).parent


def _reason(stored: dict[str, Any], device_map: Any, weights_only: bool) -> str | None:
    """Why Transformers, with the format's own library, does not keep the weights quantized here; None if it does."""
    from transformers.quantizers.auto import AutoHfQuantizer

    if stored.get("hinted"):
        return "Transformers does not know the format"
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(stored), pre_quantized=True)
        before = getattr(quantizer.quantization_config, "dequantize", False)
        quantizer.validate_environment(device_map=copy.deepcopy(device_map), weights_only=weights_only)
    except Exception as error:  # whatever the library has against this machine
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    if getattr(quantizer.quantization_config, "dequantize", False) and not before:
        return "on this device it turns the weights into floats"
    return None
