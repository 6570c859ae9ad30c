"""Checks of config.json and of the index of shards, before a library opens a local directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requanto.checkpoint.digests import check_names
from requanto.checkpoint.format import CheckpointError, check_version, read_spec
from requanto.checkpoint.model_class import first_architecture
from requanto.config.checks import shown
from requanto.config.config import FORMAT, QuantoConfig

_AGAIN = "download or save it again"


def read_json(path: Path, must_exist: bool = False) -> dict[str, Any]:
    """The content of a JSON file, a dict; {} if there is no such file.

    Raises:
        CheckpointError: it cannot be read, is no JSON or no dict; with ``must_exist`` also if it is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if must_exist:
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error
        return {}
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path} is no valid JSON ({error}): it is truncated or damaged, {_AGAIN}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {shown(content)}, expected a JSON object: it is damaged, {_AGAIN}")
    return content


def stored_config(config: Mapping[str, Any], where: str | os.PathLike) -> dict[str, Any]:
    """``quantization_config`` of a config.json, {} if it has none.

    Raises:
        CheckpointError: it is no dict.
    """
    stored = config.get("quantization_config")
    if stored is None:
        return {}
    if not isinstance(stored, dict):
        raise CheckpointError(
            f"{where}: quantization_config in config.json is {shown(stored)}, expected an object. Restore the "
            "config.json that "
            f"was saved with the files"
        )
    return stored


def is_ours(stored: Mapping[str, Any]) -> bool:
    """Whether a quantization_config has keys that only Requanto writes."""
    return stored.get("format") == FORMAT or isinstance(stored.get("tensors"), dict)


def checked_config(stored: dict[str, Any]) -> QuantoConfig:
    """The config of a checkpoint that Requanto wrote, with every line of its table parsed.

    Raises:
        CheckpointError, ValueError, TypeError: a key or a value is wrong; the message names it.
    """
    method = stored.get("quant_method")
    if method != "quanto":
        raise CheckpointError(
            f"quantization_config.quant_method is {shown(method)}, and its keys 'format' and 'tensors' are "
            "Requanto's, which "
            f"writes 'quanto': restore the config.json that was saved with the files"
        )
    config = QuantoConfig.from_dict(stored)
    check_version(config.format, config.format_version, "quantization_config")
    for name, text in config.tensors.items():
        read_spec(text, name)
    check_names(config.digests, config.tensors)
    return config


def weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name from an index of shards.

    Raises:
        CheckpointError: the index is damaged, or names a file outside of its directory.
    """
    content = read_json(path, must_exist=True)
    found = content.get("weight_map")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: weight_map is {shown(found)}, expected an object: it is damaged, {_AGAIN}")
    for name, file in found.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file.endswith(".safetensors")
        if not plain or "\0" in file or "\\" in file or len(file) > 255:
            raise CheckpointError(
                f"{path}: weight_map[{shown(name)}] is {shown(file)}, expected the name of a .safetensors file in "
                "this directory"
            )
    if not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError(
            f"{path}: metadata is {shown(content['metadata'])}, expected an object: it is damaged, {_AGAIN}"
        )
    return found


def check_directory(directory: Path) -> None:
    """Checks config.json and the index of a local directory if Requanto wrote it; any other directory is left alone.

    Raises:
        CheckpointError, ValueError, TypeError: see :func:`checked_config` and :func:`weight_map`.
    """
    if not (directory / "config.json").is_file():
        return
    config = read_json(directory / "config.json")
    stored = stored_config(config, directory)
    if not is_ours(stored):
        return
    first_architecture(config, f"{directory}/config.json")
    checked_config(stored)
    for index in sorted(directory.glob("*.safetensors.index.json")):
        weight_map(index)
