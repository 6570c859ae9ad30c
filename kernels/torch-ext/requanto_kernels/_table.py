"""Files of tuned tiles: what each entry says about where it was measured, and which of them hold here.

    {"format": 2, "entries": {"triton 3.7/NAME": {
        "config": {...}, "triton": "3.7.1", "gpu": "NVIDIA H200", "requanto": "0.1.0", "us": 12.3}}}

NAME is `config.key`. An entry holds for the version of Triton that it was measured with, up to its last number: another
compiler allocates registers its own way, and another tile is the fastest. Entries of other versions stay in the file.
"""

import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TypeVar

import triton

logger = logging.getLogger(__name__)

FORMAT = 2
Config = TypeVar("Config")


def prefix() -> str:
    """What the names of entries begin with that hold for this version of Triton."""
    return "triton " + ".".join(triton.__version__.split(".")[:2]) + "/"


@cache
def own_version() -> str:
    try:
        return importlib.metadata.version("requanto")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def raw(path: Path) -> dict[str, dict]:
    """All entries of a file as they are in it; none of a missing file, or of one of an older format."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["entries"] if found["format"] == FORMAT else {}


def read(path: Path, config_of: Callable[[str, dict], Config]) -> dict[str, Config]:
    """The entries that hold here, by name; one line is logged about those that do not.

    config_of: makes a config of an entry's name and values. Raises what it raises, and a KeyError, TypeError or ValueError
    if the file is no table.
    """
    found = json.loads(path.read_text())
    entries, form = found["entries"], found["format"]
    if form != FORMAT:
        if form not in range(1, FORMAT):
            raise ValueError(f"format is {form!r}, expected {FORMAT}")
        logger.warning(
            "%s is of format %s, whose %d tuned tiles do not say enough to be used (now %d): run `requanto tune` again.",
            path, form, len(entries), FORMAT
        )  # fmt: skip
        return {}
    here, own, others, newer = prefix(), {}, set(), 0
    for name, entry in entries.items():
        try:
            config = config_of(name, entry["config"])
        except TypeError:
            # A field that this version does not have is damage only in an entry of this version.
            if not isinstance(entry, dict) or entry.get("requanto") in (None, own_version()):
                raise
            newer += 1
            continue
        if name.startswith(here):
            own[name.removeprefix(here)] = config
        else:
            others.add(name.split("/")[0])
    if others or newer:
        told = [*sorted(others), *(["another version of requanto"] if newer else [])]
        logger.warning(
            "%s: %d of %d tuned tiles are of %s and not used with %s: run `requanto tune` again.",
            path, len(entries) - len(own), len(entries), ", ".join(told), here.rstrip("/")
        )  # fmt: skip
    return own


def described(entries: dict[str, object], about: dict[str, dict]) -> dict[str, dict]:
    """Entries of a file for configs that were found here."""
    where = {"triton": triton.__version__, "requanto": own_version()}
    return {
        prefix() + name: {"config": asdict(config), **where, **about.get(name, {})} for name, config in entries.items()
    }


def merge(path: Path, entries: dict[str, dict]) -> None:
    """Adds entries to a file; those of the same names are replaced."""
    write(path, {**raw(path), **entries})


def write(path: Path, entries: dict[str, dict], form: int = FORMAT) -> None:
    """Replaces a file atomically. form: the number of its format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": form, "entries": dict(sorted(entries.items()))}, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
