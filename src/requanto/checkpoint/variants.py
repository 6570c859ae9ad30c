"""Variants beside a new checkpoint that its config.json does not describe."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from requanto.checkpoint.save_id import KEY, read_metadata
from requanto.checkpoint.weight_files import Family

logger = logging.getLogger(__name__)


def warn_of_variants(new: Path, target: Path) -> None:
    """Logs which variants in a directory can no longer be loaded once the new files are there.

    All variants share one config.json. After a save it describes the weights of that save: those of another model, or a
    float model, do not fit it.

    Args:
        new: the directory with the new files; directories of components are looked at too.
        target: where they go.
    """
    for config in sorted(new.rglob("config.json")):
        place = target / config.parent.relative_to(new)
        found = _others(config.parent, place) if place.is_dir() else []
        if found and (save_id := _save_id(config)) is not None:
            left = [name for name in found if read_metadata(place / name).get(KEY) != save_id]
            if left:
                logger.warning(
                    "%s: %s will not load any more, since config.json now describes other weights: a variant has no config "
                    "of its own. To keep both, save them into different directories.",
                    place,
                    ", ".join(left),
                )


def _others(new: Path, place: Path) -> list[str]:
    """Returns the weight files of a directory that are of the same kind of model as the new ones, but other variants."""
    written = {family for path in new.iterdir() if (family := Family.of(path.name)) is not None}
    stems, variants = {family.stem for family in written}, {family.variant for family in written}
    found = ((path.name, Family.of(path.name)) for path in place.iterdir() if path.suffix == ".safetensors")
    return sorted(
        n for n, family in found if family is not None and family.stem in stems and family.variant not in variants
    )


def _save_id(config: Path) -> str | None:
    """Returns the id of a quantized model that is being saved; None for any other."""
    found = json.loads(config.read_text(encoding="utf-8"))
    described = found.get("quantization_config") if isinstance(found, dict) else None
    save_id = described.get(KEY) if isinstance(described, dict) else None
    return save_id if isinstance(save_id, str) else None
