"""Names of weight files: which of them one save wrote, which it makes obsolete, and which of them a library loads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from requanto.checkpoint.opening import weight_map

logger = logging.getLogger(__name__)

MAP_NAME = "quanto_qmap.json"
#: stem of Transformers' weight files, and of Diffusers'
STEMS = ("model", "diffusion_pytorch_model")

_WEIGHTS = re.compile(
    r"(?P<stem>[^.]+?)(?P<variant>(?:\.[^.]+?)*?)(?P<shard>-\d{5}-of-\d{5})?\.(?P<kind>safetensors|bin)"
)
_DISTRIBUTED = re.compile(r"__\d+_\d+\.distcp")


@dataclass(frozen=True)
class Family:
    """The weight files of one model and variant: one file, or shards with an index.

    Attributes:
        stem: ``"model"`` (Transformers), ``"diffusion_pytorch_model"`` (Diffusers).
        variant: ``""``, or with its dot: ``".fp16"``.
        kind: ``"safetensors"`` or ``"bin"``.
    """

    stem: str
    variant: str
    kind: str

    @classmethod
    def of(cls, name: str) -> Family | None:
        """Returns the family of a weight file, or None for any other file."""
        found = _WEIGHTS.fullmatch(name)
        return cls(found["stem"], found["variant"], found["kind"]) if found else None

    @property
    def single(self) -> str:
        """Name of the file of a model that is not sharded."""
        return f"{self.stem}{self.variant}.{self.kind}"

    @property
    def indexes(self) -> tuple[str, ...]:
        """Names of the index of a sharded model; older versions of Diffusers put the variant elsewhere."""
        current = f"{self.stem}.{self.kind}.index{self.variant}.json"
        return (current, f"{self.stem}.{self.kind}{self.variant}.index.json") if self.variant else (current,)

    def is_shard(self, name: str) -> bool:
        """Whether a file has the name of one of this family's shards."""
        stem, variant, kind = map(re.escape, (self.stem, self.variant, self.kind))
        number = r"-\d{5}-of-\d{5}"
        return bool(re.fullmatch(rf"{stem}(?:{variant}{number}|{number}{variant})\.{kind}", name))

    def files(self, directory: Path) -> list[str]:
        """Returns the names that exist in a directory: the single file, the index, and the shards that the index lists."""
        found = [self.single] if (directory / self.single).is_file() else []
        for index in self.indexes:
            if not (directory / index).is_file():
                continue
            listed = index_files(directory / index)
            if listed is None and self.stem == "model":
                continue  # Transformers looks for the single file first, so this one does no harm
            found += [index, *(n for n in listed or () if self.is_shard(n) and (directory / n).is_file())]
        return list(dict.fromkeys(found))


def index_files(index: Path) -> list[str] | None:
    """Returns the files that an index lists; None, with a warning, if it cannot be read."""
    try:
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(name for name in listed if isinstance(name, str))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is no readable index of shards (%s); shards that it listed stay", index, error)
        return None


def obsolete(directory: Path, written: Iterable[str]) -> list[str]:
    """Returns the files of earlier saves that a loader could read together with, or instead of, the newly written ones.

    These are files of the same model and variant that an earlier save of the library wrote: the single file, the index, and
    the shards that this index lists. Anything else stays: other variants, adapters, optimizer states, other models.

    Args:
        directory: where the new files go.
        written: names of the new files of this directory.
    """
    written = set(written)
    found: list[str] = []
    families = {family for name in written if (family := Family.of(name)) is not None}
    # Both libraries prefer safetensors: an old .safetensors file would be read instead of a new .bin file.
    families |= {Family(f.stem, f.variant, "safetensors") for f in families}
    for family in sorted(families, key=str):
        found += family.files(directory)
    if families and "config.json" in written:
        found.append(MAP_NAME)  # by this file a directory of optimum-quanto is recognized
    if ".metadata" in written:  # torch.distributed.checkpoint, which names its files by rank
        found += [path.name for path in directory.iterdir() if _DISTRIBUTED.fullmatch(path.name)]
    return [name for name in dict.fromkeys(found) if name not in written and (directory / name).is_file()]


def entry_file(directory: str | Path, stem: str) -> Path | None:
    """Returns the file that the library opens first: that of a model in one file, or the index; without a variant."""
    family = Family(stem, "", "safetensors")
    # Transformers looks for the single file first, Diffusers for the index.
    order = (family.single, *family.indexes) if stem == "model" else (*family.indexes, family.single)
    return next((Path(directory, name) for name in order if Path(directory, name).is_file()), None)


def model_files(directory: str | Path) -> list[Path]:
    """Returns the safetensors files that the library loads from a directory without ``variant=``.

    If there is none with a name of a library, all files with the suffix ``.safetensors`` are returned.

    Raises:
        CheckpointError: the index is damaged.
    """
    directory = Path(directory)
    for stem in STEMS:
        entry = entry_file(directory, stem)
        if entry is not None:
            return (
                [directory / name for name in sorted(set(weight_map(entry).values()))]
                if entry.suffix == ".json"
                else [entry]
            )
    return sorted(directory.glob("*.safetensors"))
