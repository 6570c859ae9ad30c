"""Patches of Transformers' loading, so that a class finds its weights in a checkpoint that another class saved.

A vision or a text model out of a multimodal checkpoint, a base model out of one with a head, or the reverse: what a float
checkpoint gives by the library's own renamings, a quantized one gives too. What stays without its stored weight is an error.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from requanto.checkpoint.format import CheckpointError
from requanto.config.config import FORMAT
from requanto.config.plan import weight_kind
from requanto.integrations.part_markers import unmark
from requanto.integrations.transformers_arguments import taken_recipe, with_stored_state_dict
from requanto.integrations.transformers_foreign import claim
from requanto.integrations.transformers_names import Renaming, parts_of, stems_of

logger = logging.getLogger(__name__)

#: attribute of a model while it is loaded: its `LoadedKeys`
LOADED = "_requanto_loaded"
#: arguments of from_pretrained that say where config.json is
_PLACE = ("subfolder", "revision", "cache_dir")


class _State(threading.local):
    """What the calls that this thread is in know. The library passes none of it to a quantizer.

    Attributes:
        path, options: arguments of ``from_pretrained``.
        read: the last config.json read in this call, if Requanto wrote it.
        keys: the keys that are being loaded.
    """

    path: Any = None
    options: dict[str, Any] = {}
    read: dict[str, Any] | None = None
    keys: LoadedKeys | None = None


_state = _State()


def register() -> None:
    """Patches the functions and methods; a second call does nothing."""
    from transformers import core_model_loading, modeling_utils
    from transformers.configuration_utils import PreTrainedConfig

    cls = modeling_utils.PreTrainedModel
    cls.from_pretrained = classmethod(_wrap_from_pretrained(cls.from_pretrained.__func__))
    PreTrainedConfig.get_config_dict = classmethod(_wrap_get_config_dict(PreTrainedConfig.get_config_dict.__func__))
    modeling_utils.get_hf_quantizer = _wrap_get_quantizer(modeling_utils.get_hf_quantizer)
    core_model_loading.rename_source_key = _wrap_rename(core_model_loading.rename_source_key)
    modeling_utils.convert_and_load_state_dict_in_model = _wrap_convert(
        modeling_utils.convert_and_load_state_dict_in_model
    )


def call() -> tuple[Any, dict[str, Any]]:
    """The path and the keywords of the ``from_pretrained`` that this thread is in."""
    return _state.path, _state.options


def remember_config(config: Any) -> None:
    """Keeps a config.json that was read in this thread, for a sub-config of it that is loaded next."""
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    _state.read = config if isinstance(stored, dict) and stored.get("format") == FORMAT else None


# ---------------------------------------------------------------------- the table of the whole model


def _wrap_from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        before = _state.path, _state.options, _state.read
        kwargs = with_stored_state_dict(kwargs)
        _state.path, _state.options, _state.read = pretrained_model_name_or_path, kwargs, None
        try:
            return original(cls, pretrained_model_name_or_path, *args, **kwargs)
        finally:
            _state.path, _state.options, _state.read = before

    return from_pretrained


def _wrap_get_config_dict(original: Any) -> Any:
    @functools.wraps(original)
    def get_config_dict(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        remember_config(result[0])
        return result

    return get_config_dict


def _wrap_get_quantizer(original: Any) -> Any:
    """Gives the config of a part the quantization_config of the whole model, and the quantizer what it needs for names."""

    @functools.wraps(original)
    def get_hf_quantizer(
        config: Any, quantization_config: Any, device_map: Any, weights_only: Any, *args: Any, **kwargs: Any
    ) -> Any:
        path, options = _state.path, _state.options
        read = functools.partial(_read_config, path, {key: options[key] for key in _PLACE if key in options})
        unmark(config)
        recipe = taken_recipe(config)
        text = config.get_text_config(decoder=True)
        if not hasattr(config, "quantization_config") and not hasattr(text, "quantization_config"):
            whole = _state.read or read()
            if whole is not None:
                logger.info("%s: the quantization_config of the whole model is used", type(config).__name__)
                config.quantization_config = copy.deepcopy(whole["quantization_config"])
            elif quantization_config is None:
                quantization_config = recipe
        foreign = None
        if kwargs.get("gguf_file") is None:
            asked = None if quantization_config is recipe else quantization_config
            foreign = claim(config, asked, device_map, weights_only, path, options)
        if foreign is not None:
            quantization_config = None  # its config is in the checkpoint's place
        quantizer, *rest = original(config, quantization_config, device_map, weights_only, *args, **kwargs)
        if foreign is not None:
            quantizer.foreign, quantizer.given_state = foreign, options.get("state_dict")
        if type(quantizer).__module__.startswith("requanto."):
            quantizer.key_mapping = options.get("key_mapping")
            quantizer.resizes = bool(options.get("ignore_mismatched_sizes"))
            quantizer.whole_config = functools.partial(_whole_config, _state.read, read, copy.deepcopy(config))
        _state.read = None
        return quantizer, *rest

    return get_hf_quantizer


def _whole_config(remembered: dict[str, Any] | None, read: Callable[[], Any], config: Any) -> dict[str, Any]:
    """Returns the whole config.json of the saved model; what the model's own config says, if it is not to be had."""
    return remembered or read() or config.to_dict()


def _read_config(path: Any, place: dict[str, Any]) -> dict[str, Any] | None:
    """Reads a config.json written by Requanto, of a directory or of the hub's cache; None if there is none."""
    from transformers.configuration_utils import PreTrainedConfig

    if not isinstance(path, (str, os.PathLike)) or not str(path):
        return None
    before = _state.read
    try:
        PreTrainedConfig.get_config_dict(path, local_files_only=True, **place)
        return _state.read
    except (OSError, ValueError):  # no such file here; the library reports what it needs itself
        return None
    finally:
        _state.read = before


# ---------------------------------------------------------------------- the weights


class LoadedKeys:
    """The keys of one load.

    Attributes:
        targets: name of a quantized weight in the files -> its name in the model; None: the model does not have it. Filled
            while loading.
    """

    def __init__(self, model: Any, keys: Any, load_config: Any) -> None:
        transforms = load_config.weight_mapping or []
        self.stems = stems_of(keys)
        self.parts = parts_of(keys, self.stems)
        self.targets: dict[str, str | None] = {}
        self.quantizer = load_config.hf_quantizer
        self.names = model.state_dict()
        ours = type(self.quantizer).__module__.startswith("requanto.") and self.quantizer.pre_quantized
        general = [
            c for c in transforms if any(getattr(op, "is_rebuild", False) for op in getattr(c, "operations", ()))
        ]
        self.patterns = {pattern for c in general for pattern in c.source_patterns} if ours else set()
        self.renaming = Renaming(model, [c for c in transforms if c not in general], self.names)

    def part(self, key: str) -> tuple[str, str] | None:
        """Returns (name in the model, pattern of the converter) of a stored part; None for any other key."""
        if key not in self.parts:
            return None
        stem, part = self.parts[key]
        name = self.target(stem)
        if name is None:
            return None
        pattern = f"{re.escape(name.rpartition('.')[2])}_{part}"
        return (name, pattern) if pattern in self.patterns else None

    def target(self, stem: str) -> str | None:
        """Returns the name in the model of a quantized weight."""
        if stem not in self.targets:
            self.targets[stem] = self.renaming(stem)
        return self.targets[stem]


def _wrap_convert(original: Any) -> Any:
    @functools.wraps(original)
    def convert_and_load_state_dict_in_model(
        model: Any, state_dict: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        if getattr(quantizer, "foreign", None) is not None:
            state_dict = quantizer.foreign.translated(state_dict)
        if isinstance(getattr(quantizer, "joined", None), list):
            state_dict = quantizer.joined_state(model, state_dict)
        if not any(key.endswith("_qdata") for key in state_dict):
            return original(model, state_dict, load_config, *args, **kwargs)
        loaded = LoadedKeys(model, state_dict, load_config)
        model.__dict__[LOADED] = loaded
        if (
            loaded.patterns and loaded.quantizer.names is None
        ):  # a state dict, or files of another kind than safetensors
            loaded.quantizer.names = loaded.quantizer.stored_names(model, state_dict)
        with _loading(loaded):
            return original(model, state_dict, load_config, *args, **kwargs)

    return convert_and_load_state_dict_in_model


@contextmanager
def _loading(loaded: LoadedKeys) -> Iterator[None]:
    before, _state.keys = _state.keys, loaded
    try:
        yield
    finally:
        _state.keys = before


def _wrap_rename(original: Any) -> Any:
    """Renames a stored part as the library would rename the float weight."""

    @functools.wraps(original)
    def rename_source_key(source_key: str, *args: Any, **kwargs: Any) -> Any:
        found = None if _state.keys is None else _state.keys.part(source_key)
        return original(source_key, *args, **kwargs) if found is None else found

    return rename_source_key


# ---------------------------------------------------------------------- what was not read


def check_loaded(model: Any, missing: set[str]) -> None:
    """Raises if a weight of the model stays without the quantized weight that is stored for it.

    Args:
        model: the model, before its missing weights are initialized.
        missing: names of its weights that were not loaded.

    Raises:
        CheckpointError: the message says which, and what can be loaded instead.
    """
    loaded: LoadedKeys | None = model.__dict__.pop(LOADED, None)
    if loaded is None:
        return
    quantizer, name = loaded.quantizer, type(model).__name__
    missing = missing - _filled_by_ties(model, missing)
    ours = bool(loaded.patterns) or getattr(quantizer, "pre_quantized", False)
    if ours:
        missing = missing - set(getattr(quantizer, "problems", ())) - set(getattr(quantizer, "resized", ()))
    unread = [(stem, target) for stem in loaded.stems if (target := loaded.target(stem)) in missing]
    if unread and not ours:
        raise CheckpointError(
            f"the files hold quantized weights ({unread[0][0]}_qdata and {len(unread) - 1} more), but the config does not "
            f"describe them, so {name} would have random weights. Use the config.json that was saved with the files, "
            f"and pass neither quantization_config=None nor a config that lacks its quantization_config; in the config of a "
            f"part, set quantization_config to that of the whole model."
        )
    if unread:
        raise CheckpointError(
            f"{unread[0][0]} and {len(unread) - 1} more quantized weights are in the files, but were not loaded as "
            f"{unread[0][1]} ...: {name} would have random weights. Load them with the version of Transformers that saved "
            f"them, and report this."
        )
    others = [stem for stem in loaded.stems if loaded.target(stem) is None]
    for stem in others:
        converted = loaded.renaming(stem, loaded.renaming.converters)
        if converted in missing:
            raise CheckpointError(
                f"{stem} is stored quantized, and {name} has its values in {converted}, in another layout: this version of "
                f"Transformers joins or splits such weights, which needs float values. Load the checkpoint with the version "
                f"of Transformers that saved it and save it again after .dequantize(), then quantize that."
            )
    ignored = re.compile("|".join(f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ["(?!)"]))
    wanted = sorted(key for key in missing if not ignored.search(key))
    counterpart = find_counterpart(wanted, others)
    if counterpart is not None:
        key, stem = counterpart
        raise CheckpointError(
            f"{name} would have random weights: {key} is not in the files under a name that {name} reads, but {stem} is "
            f"({len(others)} quantized weights stay unread). The float checkpoint would load no better. "
            f"{_advice(loaded, name)}"
        )
    beside = _missing_in_a_block(model, wanted, loaded)
    if beside is not None:
        key, read = beside
        raise CheckpointError(
            f"{name} would have random weights: {key} is not in the files, and {read} is, quantized"
            + (f"; {others[0]} is in the files, and {name} has no such weight" if others else "")
            + ". A shard is missing, tensors were renamed, or config.json is that of another model"
        )
    # A class that reads other weights of the file, and has a new head, lacks only few.
    if loaded.stems and len(others) == len(loaded.stems) and 2 * len(wanted) > len(loaded.names):
        raise CheckpointError(
            f"{name} would have random weights: it reads none of the {len(others)} quantized weights in the files, and "
            f"{len(wanted)} of its own {len(loaded.names)} tensors, e.g. {wanted[0]}, are not there. {_advice(loaded, name)}"
        )


def _missing_in_a_block(model: Any, missing: list[str], loaded: LoadedKeys) -> tuple[str, str] | None:
    """A missing weight of a layer that can be quantized, and a quantized one that was read for a block of that kind.

    Weights in numbered blocks come from files; what a class adds to a model stands outside of them.
    """
    read: dict[str, str] = {}
    for target in loaded.targets.values():
        if target is not None and (block := _block_of(target)):
            read.setdefault(block, target)
    for key in missing:
        owner, _, leaf = key.rpartition(".")
        found = read.get(_block_of(key))
        if found is None:
            continue
        module = model.get_submodule(owner)
        parameter = module._parameters.get(leaf)
        if parameter is not None and weight_kind(module, leaf, parameter) is not None:
            return key, found
    return None


def _block_of(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``model.layers.#``; empty for a name without a number."""
    words = name.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    return "" if not numbers else ".".join("#" if word.isdigit() else word for word in words[: numbers[-1] + 1])


def _advice(loaded: LoadedKeys, name: str) -> str:
    whole = getattr(loaded.quantizer, "whole_config", dict)()
    saved = (whole.get("architectures") or [None])[0]
    if saved is None or saved == name:
        return "Load it with the class that saved it, or pass key_mapping={pattern in the files: name in the model}."
    return f"Load the whole model, transformers.{saved}.from_pretrained(...), and take the part that you need from it."


def find_counterpart(missing: list[str], unread: list[str]) -> tuple[str, str] | None:
    """Returns a missing weight and an unread one that must be the same: their names differ only in what comes first.

    Three last components are equal, a layer's number among them ("layers.0.mlp.up_proj.weight"), or the missing one's whole
    name of two or more ("lm_head.weight", "language_model.lm_head.weight").
    """
    by_end: dict[tuple[str, ...], str] = {}
    for stem in unread:
        words = stem.split(".")
        for start in range(len(words) - 1):
            by_end.setdefault(tuple(words[start:]), stem)
    for name in missing:
        words = name.split(".")
        for start in range(len(words) - 1):
            end = tuple(words[start:])
            layer = len(end) > 2 and any(word.isdigit() for word in end)
            if end in by_end and (start == 0 or layer):
                return name, by_end[end]
    return None


def _filled_by_ties(model: Any, missing: set[str]) -> set[str]:
    """Returns the missing weights that are tied to one that was loaded."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    filled = {name for name, source in tied.items() if source not in missing}
    sources = {source for name, source in tied.items() if name not in missing}
    return filled | sources | {name for name, source in tied.items() if source in sources}
