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

from requanto.checkpoint.digests import digests_of
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.foreign.quanto_files import PARTS, checked_map, is_quanto_part, quantized_names, to_qtensor
from requanto.checkpoint.format import CheckpointError, flatten, table_of
from requanto.checkpoint.model_class import first_architecture, named_class
from requanto.checkpoint.opening import check_directory, read_json, stored_config
from requanto.checkpoint.save_id import KEY, PLACEHOLDER, stamp
from requanto.checkpoint.shards import SafetensorsFiles, save_shards
from requanto.checkpoint.weight_files import MAP_NAME
from requanto.config.config import QuantoConfig
from requanto.dtypes.qtypes import qtype, resolve_qtype, short_name
from requanto.scales.quanto import group_size_rule

#: scalars that optimum-quanto stores for every quantized module
SCALES = ("input_scale", "output_scale")


def is_quanto_directory(directory: str | os.PathLike) -> bool:
    """Whether the directory was written by optimum-quanto, or by Diffusers with it."""
    directory = Path(directory)
    if (directory / MAP_NAME).is_file():
        return True
    stored = stored_config(read_json(directory / "config.json"), directory)
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
    config = read_json(source / "config.json", must_exist=True)
    diffusers = "_class_name" in config
    stem = "diffusion_pytorch_model" if diffusers else "model"
    files = SafetensorsFiles(source, stem)
    qmap = checked_map(read_json(source / MAP_NAME), source / MAP_NAME)
    kinds = _kinds(source, qmap, config, files)
    activations = {module: entry["activations"].name for module, entry in qmap.items() if entry["activations"]}
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
        config["quantization_config"][KEY] = PLACEHOLDER
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_shards(flatten(state), scratch, stem, metadata={KEY: PLACEHOLDER})
        stamp(scratch)
    return target


def stored_weights(source: str | os.PathLike, model_class: type | None = None) -> dict[str, dict[str, Any]]:
    """Type, shape and group size of each quantized weight of a directory, from headers and a model without weights.

    Args:
        source: a directory for which `is_quanto_directory` is true.
        model_class: the model's class, if ``config.json`` does not name it.

    Returns:
        name -> ``qtype``, ``shape`` and ``group_size`` (None: one scale a row).

    Raises:
        CheckpointError: the map and the tensors disagree.
    """
    source = Path(source)
    config = read_json(source / "config.json", must_exist=True)
    files = SafetensorsFiles(source, "diffusion_pytorch_model" if "_class_name" in config else "model")
    kinds = _kinds(source, checked_map(read_json(source / MAP_NAME), source / MAP_NAME), config, files)
    skeleton = _skeleton(source, config, model_class)
    shapes = {name: p.shape for name, p in skeleton.named_parameters(remove_duplicate=False)}
    unknown = next((name for name in kinds if name not in shapes), None)
    if unknown is not None:
        raise CheckpointError(f"{source} quantizes {unknown}, which a {type(skeleton).__name__} does not have")
    return {
        name: {
            "qtype": kind,
            "shape": tuple(shapes[name]),
            "group_size": None if kind.bits == 8 else group_size_rule(shapes[name]),
        }
        for name, kind in kinds.items()
    }


def _kinds(
    source: Path, qmap: Mapping[str, Mapping[str, qtype | None]], config: Mapping[str, Any], files: SafetensorsFiles
) -> dict[str, qtype]:
    """Maps parameter names to types: from quanto_qmap.json, or the one type of a Diffusers config."""
    names = quantized_names(files)
    if (source / MAP_NAME).is_file():
        kinds = {f"{module}.weight": entry["weights"] for module, entry in qmap.items() if entry["weights"]}
    else:
        one = {"": {"weights": stored_config(config, source).get("weights_dtype")}}
        kind = checked_map(one, f"quantization_config.weights_dtype of {source}")[""]["weights"]
        if kind is None:
            raise CheckpointError(
                f"{source}: quantization_config.weights_dtype names no type, and there is no {MAP_NAME}"
            )
        kinds = dict.fromkeys(sorted(names), kind)
    for name in names ^ set(kinds):
        where = (
            f"its tensors, not in its map ({MAP_NAME})"
            if name in names
            else f"its map ({MAP_NAME}), not in its tensors"
        )
        raise CheckpointError(f"{source}: {name} is quantized in {where}")
    return kinds


def _our_config(state: Mapping[str, Any], activations: dict[str, str]) -> dict[str, Any]:
    table = table_of(state.items())
    if not table and not activations:
        raise CheckpointError("found no quantized weight")
    kinds = [text.split()[0] for text in table.values()]
    config = QuantoConfig(weights=short_name(resolve_qtype(max(set(kinds), key=kinds.count))) if kinds else None)
    config.activation_modules = activations
    config.record(table, digests_of(state, activations))
    return config.to_dict()


def _skeleton(source: Path, config: Mapping[str, Any], model_class: type | None) -> nn.Module:
    with torch.device("meta"):
        if "_class_name" in config:
            cls = named_class("diffusers", config["_class_name"], f"_class_name in {source}/config.json") or model_class
            if cls is None:
                raise CheckpointError(
                    f"{source}: config.json names the model class {config['_class_name']!r}, which this Diffusers "
                    "does not have"
                )
            plain = {key: value for key, value in config.items() if key != "quantization_config"}
            return cls.from_config(plain)
        import transformers

        where = f"{source}/config.json"
        named = first_architecture(config, where)
        cls = (named and named_class("transformers", named, where)) or model_class
        if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
            raise CheckpointError(
                f"{source}: config.json names the model class {named!r}, which this Transformers does not have"
            )
        loaded = transformers.AutoConfig.from_pretrained(source)
        loaded.quantization_config = None
        if cls.config_class is not None and not isinstance(loaded, cls.config_class):
            raise CheckpointError(
                f"{where} is a {type(loaded).__name__} and names the model class {cls.__name__}, which takes a "
                f"{cls.config_class.__name__}"
            )
        return cls(loaded)


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
            if where is not None and path:
                check_directory(where)
            return original(cls, path, *args, **kwargs)
        kwargs.pop("subfolder", None)
        # Loaded tensors are memory-mapped and stay valid after the directory is deleted.
        with tempfile.TemporaryDirectory(prefix="requanto-") as scratch:
            converted = convert_quanto_directory(where, Path(scratch) / "model", cls)
            if hasattr(kwargs.get("config"), "to_dict"):  # a config object that was read from the unconverted directory
                kwargs["config"] = copy.deepcopy(kwargs["config"])
                kwargs["config"].quantization_config = read_json(converted / "config.json")["quantization_config"]
            return original(cls, converted, *args, **kwargs)

    from_pretrained._reads_quanto = True  # type: ignore[attr-defined]
    model_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]
