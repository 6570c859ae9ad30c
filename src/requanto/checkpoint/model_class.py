"""The model class that a config.json names. A name is data: it may lead to a model class and to nothing else."""

from __future__ import annotations

import importlib
from typing import Any

from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown


def named_class(library: str, name: Any, where: str) -> type | None:
    """The class of that name; None if the library has nothing of that name.

    Args:
        library: ``"transformers"`` or ``"diffusers"``.
        name: the entry of ``architectures``, or ``_class_name``.
        where: what holds the name, for messages.

    Raises:
        CheckpointError: it is no name, or names something else than a model class.
    """
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise CheckpointError(f"{where} names the model class {shown(name)}, which is no name of a class")
    module = importlib.import_module(library)
    base = module.PreTrainedModel if library == "transformers" else module.ModelMixin
    try:
        found = getattr(module, name, None)
    except (ImportError, RuntimeError) as error:  # a class that needs a package which is not installed
        raise CheckpointError(f"{where} names the model class {name!r}, which cannot be imported: {error}") from error
    if found is None:
        return None
    if not isinstance(found, type) or not issubclass(found, base) or found is base:
        raise CheckpointError(f"{where} names {name!r}, which is no model class of {library.capitalize()}")
    return found


def first_architecture(config: dict[str, Any], where: str) -> str | None:
    """The first entry of ``architectures``; None if there is none.

    Raises:
        CheckpointError: it is no list of strings.
    """
    names = config.get("architectures")
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures is {shown(names)}, expected a list of class names")
    return names[0]
