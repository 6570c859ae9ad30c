"""Which stored weight is which weight of a Transformers model, if another class saved it: a part of it, or a larger one.

Three names of one weight may differ: in the files ("stem": the key without ``_qdata``), in the model that loads them, and in
the table of config.json, which has the names of the model that was saved. The library's own renamings lead from the first to
the second, for this model, and to the third, for the saved one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import core_model_loading

from requanto.checkpoint.activation_table import SCALES
from requanto.checkpoint.format import PARTS

logger = logging.getLogger(__name__)


def stems_of(keys: Iterable[str]) -> list[str]:
    """Returns the names of the quantized weights among the keys of a checkpoint, in the order in which they are loaded."""
    stems = (key.removesuffix("_qdata") for key in keys if key.endswith("_qdata"))
    return sorted(stems, key=core_model_loading.dot_natural_key)


def parts_of(keys: Iterable[str], stems: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Maps the key of each stored part to (stem, part)."""
    keys = set(keys)
    every = ((f"{stem}_{part}", (stem, part)) for stem in stems for part in PARTS)
    return {key: found for key, found in every if key in keys}


class Renaming:
    """The library's rule from a key of the files to a name of the model, for keys without a layout conversion."""

    def __init__(self, model: Any, transforms: Iterable[Any], names: Mapping[str, Any] | None = None) -> None:
        transforms = list(transforms)
        self.renamings = [t for t in transforms if isinstance(t, core_model_loading.WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, core_model_loading.WeightConverter)]
        self.prefix = getattr(model, "base_model_prefix", "")
        self.names = model.state_dict() if names is None else names

    def __call__(self, key: str, converters: Iterable[Any] = ()) -> str | None:
        """Returns the name in the model; None if it has no such weight."""
        rename = original_rename()
        name, _ = rename(key, self.renamings, list(converters), self.prefix, self.names)
        if name not in self.names and key in self.names:
            name, _ = rename(key, [], [], base_model_prefix=self.prefix, meta_state_dict=self.names)
        return name if name in self.names else None


def original_rename() -> Callable[..., tuple[str, str | None]]:
    """The library's `rename_source_key`, without our patch."""
    return getattr(core_model_loading.rename_source_key, "__wrapped__", core_model_loading.rename_source_key)


def match_table(
    targets: Mapping[str, str | None], table: Iterable[str], prefix: str, same_class: bool, saved: Callable[[], Any]
) -> dict[str, str]:
    """Maps names of the model to names of the table.

    Args:
        targets: stem -> name in the model; None for weights that it does not have.
        table: the names to choose from, those of the model that was saved.
        prefix: the model's ``base_model_prefix``.
        same_class: the model that was saved is of the same class.
        saved: makes the `Renaming` of the model that was saved, or None; called only if names do not suffice.
    """
    table = set(table)
    wanted = {stem: name for stem, name in targets.items() if name is not None}
    if same_class and all(name in table for name in wanted.values()):
        return {name: name for name in wanted.values()}
    if all(stem in table for stem in targets):
        return {name: stem for stem, name in wanted.items()}
    found: dict[str, str] = {}
    for stem, name in wanted.items():
        for candidate in (name, stem, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in table:
                found[name] = candidate
                break
    if len(set(found.values())) == len(wanted):
        return found
    of_saved = saved()
    if of_saved is not None:
        for stem, name in wanted.items():
            if (candidate := of_saved(stem)) in table:
                found[name] = candidate
    return found


class StoredNames:
    """Names of one load: of weights, and of modules with activation scales.

    Attributes:
        targets: stem -> name in the model, or None.
        table_name: name in the model -> name in the table.
    """

    def __init__(
        self,
        model: Any,
        config: Any,
        keys: Iterable[str],
        transforms: Iterable[Any],
        architectures: list[str],
        saved: Any,
    ) -> None:
        keys = list(keys)
        renaming = Renaming(model, transforms)
        scaled = {key.rpartition(".")[0] for key in keys if key.rpartition(".")[2] in SCALES}
        stems = stems_of([*keys, *(f"{module}.weight_qdata" for module in scaled)])
        self.same_class = type(model).__name__ in architectures
        self.targets = {stem: renaming(stem) for stem in stems}
        table = [*config.tensors, *(f"{module}.weight" for module in config.activation_modules)]
        self.table_name = match_table(self.targets, table, renaming.prefix, self.same_class, saved)
        self._local = {stored: name for name, stored in self.table_name.items()}

    def local_module(self, name: str) -> str | None:
        """Returns the name in the model of a module of ``activation_modules``."""
        found = self._local.get(f"{name}.weight")
        return None if found is None else found.removesuffix(".weight")


def saved_renaming(config: dict[str, Any]) -> Renaming | None:
    """Makes the `Renaming` of the class that saved a checkpoint, from the whole config.json; None if that is not known."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    named = (config.get("architectures") or [""])[0]
    cls = getattr(transformers, named, None) if isinstance(named, str) and named else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or cls.config_class is None:
        return None
    try:
        with torch.device("meta"):
            plain = {key: value for key, value in config.items() if key != "quantization_config"}
            model = cls(cls.config_class.from_dict(plain))
    except Exception as error:
        logger.info("the names of %s are not known, since it cannot be built from config.json: %s", named, error)
        return None
    return Renaming(model, get_model_conversion_mapping(model))
