"""Converts a directory written by optimum-quanto to Requanto's format, bit-exactly.

Two kinds are read: optimum-quanto's own (``quanto_qmap.json``) and Diffusers' (``quantization_config`` with
``quant_method: quanto`` and no ``format``). `wrap_from_pretrained` makes a library's ``from_pretrained`` convert them.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.foreign.quanto_files import PARTS, is_quanto_part, quantized_names, to_qtensor
from requanto.checkpoint.format import CheckpointError, flatten, table_of
from requanto.checkpoint.shards import SafetensorsFiles, save_shards
from requanto.config.config import QuantoConfig
from requanto.dtypes.qtypes import qtype, resolve_qtype, short_name

MAP_NAME = "quanto_qmap.json"
#: scalars that optimum-quanto stores for every quantized module
SCALES = ("input_scale", "output_scale")


def is_quanto_directory(directory: str | os.PathLike) -> bool:
    """Whether the directory was written by optimum-quanto, or by Diffusers with it."""
    directory = Path(directory)
    if (directory / MAP_NAME).is_file():
        return True
    stored = _read_json(directory / "config.json").get("quantization_config") or {}
    return (
        stored.get("quant_method") == "quanto" and "weights_dtype" in stored and not {"format", "tensors"} & set(stored)
    )


def convert_quanto_directory(
    source: str | os.PathLike, target: str | os.PathLike, model_class: type | None = None
) -> Path:
    """Converts a directory of optimum-quanto to Requanto's format; codes, scales and shifts are unchanged.

    Static activation scales are unchanged too. A scale of 1 means "not calibrated": an output scale of 1 leaves that
    output float. (optimum-quanto itself rounds such an output to integers.)

    Args:
        source: the directory to read.
        target: the directory to write; an existing one is replaced.
        model_class: the model's class, if ``config.json`` does not name it.

    Returns:
        ``target``.

    Raises:
        CheckpointError: quanto_qmap.json and the tensors disagree.
    """
    source, target = Path(source), Path(target)
    config = _read_json(source / "config.json")
    diffusers = "_class_name" in config
    stem = "diffusion_pytorch_model" if diffusers else "model"
    files = SafetensorsFiles(source, stem)
    qmap = _read_json(source / MAP_NAME)
    kinds = _kinds(source, qmap, config, files)
    activations = _activations(qmap)
    shapes = {
        name: p.shape for name, p in _skeleton(source, config, model_class).named_parameters(remove_duplicate=False)
    }
    state: dict[str, Any] = {}
    for key in files:
        # optimum-quanto stores activation scales for every quantized module, also if its activations are not quantized.
        module, _, leaf = key.rpartition(".")
        if is_quanto_part(key) or (leaf in SCALES and module not in activations):
            continue
        state[key] = files[key]
    for key in (f"{module}.{scale}" for module in activations for scale in SCALES):
        if key not in state:
            raise CheckpointError(
                f"{source} lacks {key}: according to {MAP_NAME} the module's activations are quantized"
            )
    for name, kind in kinds.items():
        if name not in shapes:
            raise CheckpointError(
                f"{source} quantizes {name}, which a {config.get('_class_name', 'model')} does not have"
            )
        parts = {part: files[name + part] for part in PARTS if name + part in files}
        state[name] = to_qtensor(parts, kind, shapes[name], name)
    config["quantization_config"] = _our_config(state, activations)
    with replaced_directory(target) as scratch:
        for path in source.iterdir():
            rewritten = path.name in (MAP_NAME, "config.json") or ".safetensors" in path.name
            if path.is_file() and not rewritten:
                shutil.copy2(path, scratch / path.name)
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_shards(flatten(state), scratch, stem)
    return target


def _kinds(
    source: Path, qmap: Mapping[str, Mapping[str, str]], config: Mapping[str, Any], files: SafetensorsFiles
) -> dict[str, qtype]:
    """Maps parameter names to types: from quanto_qmap.json, or the one type of a Diffusers config."""
    names = quantized_names(files)
    if (source / MAP_NAME).is_file():
        kinds = {
            f"{module}.weight": resolve_qtype(entry["weights"])
            for module, entry in qmap.items()
            if entry.get("weights", "none") != "none"
        }
    else:
        kinds = dict.fromkeys(sorted(names), resolve_qtype(config["quantization_config"]["weights_dtype"]))
    for name in names ^ set(kinds):
        where = (
            f"its tensors, not in its map ({MAP_NAME})"
            if name in names
            else f"its map ({MAP_NAME}), not in its tensors"
        )
        raise CheckpointError(f"{source}: {name} is quantized in {where}")
    return kinds


def _activations(qmap: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Maps module names to the type of their activations."""
    kinds = {module: entry.get("activations", "none") for module, entry in qmap.items()}
    return {module: resolve_qtype(kind).name for module, kind in kinds.items() if kind not in (None, "none")}


def _our_config(state: Mapping[str, Any], activations: dict[str, str]) -> dict[str, Any]:
    table = table_of(state.items())
    if not table and not activations:
        raise CheckpointError("found no quantized weight")
    kinds = [text.split()[0] for text in table.values()]
    config = QuantoConfig(weights=short_name(resolve_qtype(max(set(kinds), key=kinds.count))) if kinds else None)
    config.record(table)
    config.activation_modules = activations
    return config.to_dict()


def _skeleton(source: Path, config: Mapping[str, Any], model_class: type | None) -> nn.Module:
    with torch.device("meta"):
        if "_class_name" in config:
            import diffusers

            cls = getattr(diffusers, config["_class_name"])
            plain = {key: value for key, value in config.items() if key != "quantization_config"}
            return cls.from_config(plain)
        import transformers

        named = (config.get("architectures") or [""])[0]
        cls = getattr(transformers, named, None) or model_class
        if cls is None:
            raise CheckpointError(
                f"{source}: config.json names the model class {named!r}, which this Transformers does not have"
            )
        loaded = transformers.AutoConfig.from_pretrained(source)
        loaded.quantization_config = None
        return cls(loaded)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def wrap_from_pretrained(model_class: type) -> None:
    """Patches ``from_pretrained`` of PreTrainedModel or ModelMixin to read local directories of optimum-quanto."""
    original = model_class.from_pretrained.__func__  # type: ignore[attr-defined]
    if hasattr(original, "_reads_quanto"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path
        where = Path(path or "", kwargs.get("subfolder") or "") if isinstance(path, (str, os.PathLike)) else None
        if where is None or not path or not where.is_dir() or not is_quanto_directory(where):
            return original(cls, path, *args, **kwargs)
        kwargs.pop("subfolder", None)
        # Loaded tensors are memory-mapped and stay valid after the directory is deleted.
        with tempfile.TemporaryDirectory(prefix="requanto-") as scratch:
            converted = convert_quanto_directory(where, Path(scratch) / "model", cls)
            if hasattr(kwargs.get("config"), "to_dict"):  # a config object that was read from the unconverted directory
                kwargs["config"] = copy.deepcopy(kwargs["config"])
                kwargs["config"].quantization_config = _read_json(converted / "config.json")["quantization_config"]
            return original(cls, converted, *args, **kwargs)

    from_pretrained._reads_quanto = True  # type: ignore[attr-defined]
    model_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]
