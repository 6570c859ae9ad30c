"""Directories that other libraries quantized: what is in them, and conversion to our format a tensor at a time."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requanto.checkpoint.digests import digests_of
from requanto.checkpoint.foreign.found import ForeignCheckpoint, transpose_conv1d
from requanto.checkpoint.foreign.gguf import scan as scan_gguf
from requanto.checkpoint.foreign.gguf_source import GgufSource
from requanto.checkpoint.foreign.readers import recognize, scan
from requanto.checkpoint.foreign.source import FilesSource, Source
from requanto.checkpoint.foreign.translated import Translated, built
from requanto.checkpoint.format import CheckpointError, flatten
from requanto.checkpoint.opening import read_json
from requanto.checkpoint.save_id import KEY, PLACEHOLDER, stamp
from requanto.checkpoint.stream import ShardWriter
from requanto.checkpoint.weight_files import model_files
from requanto.config.checks import shown
from requanto.config.config import QuantoConfig
from requanto.dtypes.qtypes import qtypes, short_name

#: files beside config.json that say how a checkpoint was quantized -> the key under which readers find their content
EXTRA_FILES = {"hf_quant_config.json": "hf_quant_config", "quantize_config.json": "quantize_config"}
#: keys of config.json that describe the quantization, which the converted one does not have
_FOREIGN_KEYS = ("quantization", "compression_config", *EXTRA_FILES.values())
#: models with Conv1D layers, and the names of these layers
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass
class ForeignDirectory:
    """A directory that another library quantized.

    Attributes:
        path: the directory.
        description: content of config.json, and of `EXTRA_FILES` under their keys.
        source: its tensors.
        found: what a reader found in them.
    """

    path: Path
    description: dict[str, Any]
    source: Source
    found: ForeignCheckpoint

    @property
    def stem(self) -> str:
        """Stem of its weight files: that of Diffusers, or of Transformers."""
        return "diffusion_pytorch_model" if "_class_name" in self.description else "model"


def description_of(directory: str | os.PathLike, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json, with that of the files beside it that say how the checkpoint was quantized.

    Args:
        directory: the directory, or a folder of the hub's cache.
        config: the content of config.json, if the caller has it.

    Raises:
        CheckpointError: a file is no JSON object.
    """
    folder = Path(directory)
    found = copy.deepcopy(dict(config)) if config is not None else read_json(folder / "config.json")
    for file, key in EXTRA_FILES.items():
        if (folder / file).is_file():
            found[key] = read_json(folder / file)
    return found


def config_of(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """The ``quantization_config`` that readers take; None if the tensors are not quantized, or by Requanto.

    Raises:
        CheckpointError: ``quantization_config`` is no object.
    """
    stored = description.get("quantization_config") or description.get("compression_config")
    if stored is not None and not isinstance(stored, dict):
        raise CheckpointError(f"quantization_config in config.json is {shown(stored)}, expected an object")
    if stored and stored.get("quant_method") is not None:
        return None if stored["quant_method"] == "quanto" else dict(stored)
    return recognize(description, source)


def open_gguf(file: str | os.PathLike) -> ForeignDirectory:
    """Reads the head of a GGUF file; its weights have the file's own names.

    Raises:
        CheckpointError: the file is damaged.
    """
    source = GgufSource(file)
    return ForeignDirectory(Path(file), {}, source, scan_gguf({}, source))


def open_file(file: str | os.PathLike) -> ForeignDirectory:
    """Reads the header of a single safetensors file, such as ComfyUI's; its weights have the file's own names.

    Raises:
        CheckpointError: the file is damaged, or its tensors alone are those of no format.
    """
    source = FilesSource([file])
    config = recognize({}, source)
    if config is None:
        raise CheckpointError(
            f"{file} holds no weights that can be told to be quantized by their tensors alone. If a config.json describes "
            f"them, pass its directory"
        )
    return ForeignDirectory(Path(file), {}, source, scan(config, source))


def is_conv1d(description: Mapping[str, Any], name: str) -> bool:
    """Whether the weight of that name belongs to a Conv1D, where there is no model to look at."""
    parts = (description, *(value for value in description.values() if isinstance(value, Mapping)))
    found = any(
        part.get("model_type") in _CONV1D_MODELS for part in parts
    )  # an encoder-decoder's config has others inside
    return found and name.split(".")[-2:][0] in _CONV1D_LAYERS


def open_directory(directory: str | os.PathLike) -> ForeignDirectory | None:
    """Reads config and headers of a directory; None if no other library quantized it.

    Raises:
        CheckpointError: files are damaged, or config and tensors disagree.
    """
    path = Path(directory)
    files = model_files(path)
    if not files:
        return None
    description, source = description_of(path), FilesSource(files)
    config = config_of(description, source)
    if config is None:
        return None
    found = scan(config, source)
    transpose_conv1d(found, lambda name: is_conv1d(description, name))
    return ForeignDirectory(path, description, source, found)


def recipe_for(found: ForeignCheckpoint | None) -> QuantoConfig:
    """A config with the table of what was found, and its most frequent type; None: not known yet."""
    table = {} if found is None else dict(found.table)
    kinds = Counter(text.split()[0] for text in table.values())
    config = QuantoConfig(weights=short_name(qtypes[max(sorted(kinds), key=kinds.__getitem__)]) if kinds else None)
    config.record(table)
    if found is not None:
        config.activation_modules = {name: one.type for name, one in found.activations.items()}
    return config


def write_converted(
    foreign: ForeignDirectory, target: str | os.PathLike, progress: Callable[[int, int], None] = lambda done, all: None
) -> None:
    """Writes config.json and weight files of our format. Codes are not rounded anew; one weight is in memory at a time.

    Args:
        foreign: the checkpoint.
        target: an existing folder; `requanto.checkpoint.directory.replaced_directory` makes a safe one.
        progress: called after each weight with the number of weights done and of all.

    Raises:
        CheckpointError: a weight's tensors are damaged.
    """
    found, source = foreign.found, foreign.source
    config = recipe_for(found)
    translated = Translated(found, source)
    digests: dict[str, str] = {}
    parts = set()
    with ShardWriter(target, foreign.stem, metadata={KEY: PLACEHOLDER}) as writer:
        for done, (name, weight) in enumerate(found.weights.items(), 1):
            state = {name: built(name, weight, source)}
            digests |= digests_of(state)
            for key, part in flatten(state).items():
                writer.add(key, part)
                parts.add(key)
            progress(done, len(found.weights))
        for key in translated:
            if key not in parts:
                writer.add(key, translated[key][...])
    scales = {key: translated[key][...] for key in translated if key.rpartition(".")[0] in found.activations}
    digests |= digests_of(scales, config.activation_modules)
    config.record(dict(config.tensors), digests)
    description = {key: value for key, value in foreign.description.items() if key not in _FOREIGN_KEYS}
    description["quantization_config"] = {**config.to_dict(), KEY: PLACEHOLDER}
    text = json.dumps(description, indent=2) + "\n"
    Path(target, "config.json").write_text(text, encoding="utf-8")
    stamp(target)
