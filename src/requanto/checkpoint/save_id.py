"""The save id: one value in config.json and in every shard, by which files of different saves are told apart.

It is computed from the contents, so saving a model twice gives the same bytes. The library writes a placeholder of the same
length into all files; `stamp` fills it in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.format import PARTS, CheckpointError
from requanto.checkpoint.weight_files import Family, index_files

logger = logging.getLogger(__name__)

#: key in ``quantization_config`` and in a file's metadata
KEY = "save_id"
PLACEHOLDER = "requanto:save-id-to-be-filled-in"
_LENGTH = len(PLACEHOLDER)
_START = b'{"__metadata__":'


@contextlib.contextmanager
def awaiting_id(config: Any) -> Iterator[None]:
    """Within the block the config is written with the placeholder. In memory it never holds an id afterwards.

    Weights that are saved in another way (``accelerator.save_model``, ``safetensors.torch.save_file``) have no id, and so
    must the config that is saved beside them.
    """
    config.save_id = PLACEHOLDER
    try:
        yield
    finally:
        config.save_id = None


def metadata_for(config: Any) -> dict[str, str]:
    """Returns the metadata of the files that are saved with a config."""
    return {KEY: PLACEHOLDER} if getattr(config, KEY, None) == PLACEHOLDER else {}


def stamp(directory: str | os.PathLike) -> None:
    """Computes the id of a directory's new files and fills it in; without effect if no file waits for it."""
    directory = Path(directory)
    files = sorted(path for path in directory.glob("*.safetensors") if read_metadata(path).get(KEY) == PLACEHOLDER)
    names = ("config.json", *directory.glob("*.index*.json"))
    texts = {path: path.read_text(encoding="utf-8") for name in names if (path := directory / name).is_file()}
    waiting = {path: text for path, text in texts.items() if PLACEHOLDER in text}
    if not files and not waiting:
        return
    config = json.loads(texts.get(directory / "config.json", "{}")).get("quantization_config") or {}
    found = _id_of(files, config)
    for file in files:
        _fill_in(file, found)
    for path, text in waiting.items():
        path.write_text(text.replace(PLACEHOLDER, found), encoding="utf-8")


def _id_of(files: list[Path], config: Mapping[str, Any]) -> str:
    """Returns the first half of a SHA-256 over all tensors, in whatever files they are, and the config.

    Weights with a digest are not read again: their digests are in the config.
    """
    digested = {f"{name}_{part}" for name in config.get("digests") or () for part in PARTS}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        lines = [line for file in files for line in _tensor_lines(file, digested, pool)]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode())
    digest.update(json.dumps({k: v for k, v in config.items() if k != KEY}, sort_keys=True).encode())
    return digest.hexdigest()[:_LENGTH]


def _tensor_lines(file: Path, digested: Set[str], pool: ThreadPoolExecutor) -> list[str]:
    size, header = _header(file)
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:

        def line(item: tuple[str, dict[str, Any]]) -> str:
            name, entry = item
            if name in digested:
                return f"{name} {entry['dtype']} {entry['shape']}"
            first, last = (size + offset for offset in entry["data_offsets"])
            with memoryview(mapped) as whole, whole[first:last] as part:
                found = hashlib.sha256(part).hexdigest()
            return f"{name} {entry['dtype']} {entry['shape']} {found}"

        return list(pool.map(line, entries.items()))


def _header(file: Path) -> tuple[int, bytes]:
    """Returns (offset of the data, header) of a safetensors file."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return 8 + length, opened.read(length)


def _fill_in(file: Path, found: str) -> None:
    """Writes the id into a file's header. Keys are sorted too: safetensors writes them in no fixed order."""
    _, header = _header(file)
    text = header.decode()
    metadata, end = json.JSONDecoder().raw_decode(text, len(_START))
    before = text[len(_START) : end].encode()
    metadata[KEY] = found
    after = json.dumps(dict(sorted(metadata.items())), separators=(",", ":"), ensure_ascii=False).encode()
    if not header.startswith(_START) or len(after) != len(before):
        raise CheckpointError(f"{file} has an unexpected header {text[:200]!r}; no save id can be written into it")
    with open(file, "r+b") as opened:
        opened.seek(8 + len(_START))
        opened.write(after)


def read_metadata(file: str | os.PathLike) -> dict[str, str]:
    """Returns the metadata of a safetensors file; {} if it has none or is damaged, which is reported where it is read."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            start = opened.read(min(length, 1 << 16))
            if not start.startswith(_START):
                return {}
            try:
                return _object(start)
            except ValueError:
                if length <= len(start) or length > os.fstat(opened.fileno()).st_size:
                    return {}
                return _object(start + opened.read(length - len(start)))
    except (OSError, ValueError, RecursionError):
        return {}


def _object(header: bytes) -> dict[str, str]:
    found = json.JSONDecoder().raw_decode(header.decode(errors="replace"), len(_START))[0]
    return found if isinstance(found, dict) else {}


def check_ids(expected: str | bool | None, files: Iterable[str | os.PathLike]) -> None:
    """Raises if files of different saves are together.

    There is nothing to compare where all files, or the config, lack an id: an earlier version or another tool wrote them.

    Args:
        expected: ``save_id`` of the config; None: it has none; False: do not compare.
        files: those that are loaded; only safetensors files have an id.

    Raises:
        CheckpointError: the message names the files that do not belong together.
    """
    if not isinstance(expected, str) and expected is not None and expected is not False:
        raise CheckpointError(
            f"quantization_config.save_id is {expected!r}, expected a text, or false for no comparison: restore the "
            f"config.json that was saved with these files"
        )
    paths = [str(file) for file in files if str(file).endswith(".safetensors")]
    ids = {path: None if (found := read_metadata(path).get(KEY)) is None else str(found) for path in paths}
    if expected is False or not ids:
        return
    by_id: dict[str | None, list[str]] = {}
    for path, found in ids.items():
        by_id.setdefault(found, []).append(os.path.basename(path))
    if len(by_id) == 1 and (expected is None or expected in by_id or None in by_id):
        if expected is not None and None in by_id:
            logger.warning(
                "%s: no save_id, as in config.json; not checked whether they belong together", ", ".join(paths)
            )
        return
    if expected is not None:
        by_id.setdefault(expected, []).append("config.json")  # type: ignore[arg-type]
    told = "; ".join(f"save_id {found or 'none'}: {_few(names)}" for found, names in by_id.items())
    raise CheckpointError(
        f"files of different saves are together in {os.path.dirname(paths[0]) or '.'} ({told}). If another process has just "
        f"saved there, load again; else put all files of one save together, or save again. To load them as they are, set "
        f'"save_id": false in quantization_config of config.json.'
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass
class Watched:
    """The files of a local directory when a load began."""

    directory: Path
    found: dict[str, tuple[int, ...]]

    @classmethod
    def start(cls, directory: Path, variant: str | None, stem: str) -> Watched:
        """Waits for a save in progress, finishes an interrupted one, and notes the state of config and weight files."""
        finish_interrupted(directory)
        family = Family(stem, f".{variant}" if variant else "", "safetensors")
        names = {"config.json", family.single, *family.indexes}
        for index in family.indexes:
            if (directory / index).is_file():
                names |= set(index_files(directory / index) or ())
        return cls(directory, {name: _state(directory / name) for name in names})

    def changed(self) -> str | None:
        """Returns a message if a file was replaced since the load began."""
        names = sorted(name for name, state in self.found.items() if _state(self.directory / name) != state)
        if not names:
            return None
        return (
            f"{', '.join(names[:5])} in {self.directory} changed while the model was loaded: another process saved there. "
            f"Load again."
        )


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name that no file can have is refused where the index is checked
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
