"""Mutations of a checkpoint directory. Each is chosen and drawn by a seeded `random.Random`, so a seed repeats it.

kind, told = mutate(directory, random.Random(7))
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from fuzz_tensors import (
    data_fill,
    data_flip,
    exchange,
    factor,
    header_bytes,
    header_length,
    number,
    rows,
    tensor_form,
    tensor_names,
)
from fuzz_text import config_gone, config_key, config_text, index, model_class, quanto_map, table
from fuzz_words import NotPossible


def truncated(directory: Path, rng: random.Random) -> str:
    """A file ends early, or goes on after its end."""
    path = _any_file(directory, rng)
    raw = path.read_bytes()
    if rng.random() < 0.75:
        path.write_bytes(
            raw[: rng.choice((0, 1, 7, 8, 9, len(raw) // 2, max(0, len(raw) - 1), rng.randint(0, len(raw))))]
        )
    else:
        path.write_bytes(raw + bytes(rng.randrange(1, 5000)))
    return path.name


def _any_file(directory: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in sorted(directory.iterdir()) if path.name not in ("README.md",)])


def file_gone(directory: Path, rng: random.Random) -> str:
    """A file deleted, a directory in its place, or another one's content."""
    path = _any_file(directory, rng)
    action = rng.choice(("deleted", "directory", "other", "pickle", "link"))
    if action == "other":
        other = _any_file(directory, rng)
        shutil.copyfile(other, path) if other != path else path.write_bytes(b"")
        return f"{path.name} is {other.name}"
    path.unlink()
    if action == "directory":
        path.mkdir()
    elif action == "pickle":
        path.write_bytes(b"cos\nsystem\n(S'touch requanto-fuzz-was-here'\ntR.")
    elif action == "link":
        path.symlink_to(path.name)
    return f"{path.name} {action}"


def pickle_bytes(directory: Path, rng: random.Random) -> str:
    """Bytes of a pickled state dict changed."""
    files = sorted(directory.glob("*.pt"))
    if not files:
        raise NotPossible
    raw = bytearray(files[0].read_bytes())
    for _ in range(rng.choice((1, 4, 40))):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    files[0].write_bytes(raw)
    return files[0].name


#: every kind of mutation, with its weight in the draw
KINDS: dict[str, tuple[Callable[[Path, random.Random], str], int]] = {
    "data_flip": (data_flip, 10),
    "data_fill": (data_fill, 5),
    "number": (number, 12),
    "factor": (factor, 8),
    "exchange": (exchange, 8),
    "rows": (rows, 3),
    "tensor_names": (tensor_names, 8),
    "tensor_form": (tensor_form, 8),
    "header_bytes": (header_bytes, 4),
    "header_length": (header_length, 2),
    "truncated": (truncated, 5),
    "file_gone": (file_gone, 4),
    "pickle_bytes": (pickle_bytes, 12),
    "index": (index, 16),
    "config_key": (config_key, 10),
    "config_gone": (config_gone, 3),
    "config_text": (config_text, 6),
    "table": (table, 12),
    "model_class": (model_class, 3),
    "quanto_map": (quanto_map, 12),
}


def mutate(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Changes the directory once; returns (kind, what was changed)."""
    while True:
        kind = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
        try:
            return kind, KINDS[kind][0](directory, rng)
        except (NotPossible, FileNotFoundError):
            continue


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copies a small checkpoint, and one beside it as ``decoy`` that paths out of the directory lead to."""
    shutil.copytree(source, target)
    decoy = target.parent / "decoy"
    if not decoy.exists():
        os.makedirs(decoy)
        for file in sorted(source.glob("*.safetensors")):
            shutil.copyfile(file, decoy / "model.safetensors")
