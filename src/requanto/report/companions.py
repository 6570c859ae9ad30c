"""Saves a quantized model together with its companions: tokenizer, processor, templates, custom code.

A record in the directory says which files a run wrote, so that the next run, perhaps of another model, can tell them from
files that somebody else put there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.weight_files import Family

logger = logging.getLogger(__name__)

#: file name -> SHA-256 of what a run wrote
RECORD = ".requanto-companions.json"
# Files of a model that save_pretrained does not write.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
# Made anew by each save, or about files that are not copied.
_NEVER = frozenset({RECORD, "adapter_config.json", "README.md"})


def save_with_companions(model: Any, source: Path, out: Path, leave: Collection[str] = ()) -> None:
    """Saves a model that was loaded from ``source`` to ``out``, with its companions; all of it or nothing.

    Companions of an earlier run for another model are deleted. One that was edited since is kept as ``NAME.bak``; if it is
    the same model's, the edited one stays in use. Files that no run wrote stay. Those named in ``leave`` are not copied.
    """
    remove: list[str] = []
    with replaced_directory(out, remove) as scratch:
        model.save_pretrained(scratch)
        saved = {path.name for path in scratch.iterdir() if path.is_file()} - _NEVER
        earlier = _record(out)
        record = {name: _digest(scratch / name) for name in saved if not _is_weights(name)}
        copied = {path.name: path for path in companions(source) if path.name not in {*saved, *leave}}
        for name, path in copied.items():
            digest = _digest(path)
            if _keeps_edit(out / name, path, earlier.get(name), digest):
                logger.warning("%s was edited after it had been copied, and stays", out / name)
            else:
                shutil.copyfile(path, scratch / name)
                _back_up(out / name, path, earlier.get(name), scratch)
            record[name] = digest
        for name in sorted(set(earlier) - set(record)):
            if (out / name).is_file() and not _is_weights(name):
                _back_up(out / name, None, earlier[name], scratch)
                remove.append(name)
        (scratch / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def companions(source: Path) -> list[Path]:
    """Returns the files of a model directory that belong to the model and are no weights."""
    found = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NEVER and not _is_weights(path.name))


def _is_weights(name: str) -> bool:
    return Family.of(name) is not None or ".index." in name


def _record(out: Path) -> dict[str, str]:
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
        # Names only: a path would reach out of the directory.
        return {name: digest for name, digest in found.items() if name == Path(name).name and name not in _NEVER}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("%s is damaged (%s): files that an earlier run wrote are not recognized", out / RECORD, error)
        return {}


def _keeps_edit(present: Path, source: Path, recorded: str | None, digest: str) -> bool:
    """Whether the file in OUT is this model's and was edited by the user."""
    if recorded != digest or not present.is_file() or _digest(present) == recorded:
        return False
    return not _damaged(present, source)


def _back_up(present: Path, source: Path | None, recorded: str | None, scratch: Path) -> None:
    """Keeps a copy of a file that will be replaced or deleted, unless an earlier run wrote it or it is damaged."""
    if not present.is_file() or _damaged(present, source):
        return
    digest = _digest(present)
    if digest == recorded or (source is not None and digest == _digest(source)):
        return
    name = f"{present.name}.bak"
    count = 1
    while (present.parent / name).exists():
        count += 1
        name = f"{present.name}.bak{count}"
    shutil.copyfile(present, scratch / name)
    logger.warning("%s does not belong to this model and is kept as %s", present, name)


def _damaged(present: Path, source: Path | None) -> bool:
    """Whether a file is empty, cut off, or JSON that cannot be read."""
    content = present.read_bytes()
    original = None if source is None else source.read_bytes()
    if not content or (original is not None and len(content) < len(original) and original.startswith(content)):
        return True
    if present.suffix == ".json":
        try:
            json.loads(content)
        except ValueError:
            return True
    return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
