"""Saves that are killed: what was there before, what is saved, and how to tell which of the two is there afterwards."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import requanto
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.format import flatten
from requanto.report.companions import RECORD, save_with_companions

# Files of others, which a save must not touch. Some have names that look like weights.
FOREIGN = (
    "adapter_model.safetensors",
    "optimizer.bin",
    "flux1-dev.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "model-00001-of-00009.safetensors",
    "notes.txt",
    "checkpoint-5/model.safetensors",
    ".git/config",
)
_COMPANION_NAMES = ("tokenizer.json", "merges.txt", "vocab.txt", "chat_template.jinja", RECORD)


def model(seed: int, kind: str) -> Any:
    """A tiny language model, quantized in place."""
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    made = tf.LlamaForCausalLM(config).eval()
    if kind != "float":
        requanto.quantize(made, weights=kind)
        requanto.freeze(made)
    return made


@dataclass
class Scenario:
    """One kind of save.

    Attributes:
        old: saves what is there before, or None for a target that does not exist.
        new: the save to kill.
        after: a later save, after which nothing of the killed one is left.
        target: name of the directory, relative to the place.
        prepare: called before everything else.
        load: returns a digest of what is in a directory.
    """

    old: Callable[[Path], None] | None
    new: Callable[[Path], None]
    after: Callable[[Path], None]
    target: str = "target"
    prepare: Callable[[Path], None] = lambda place: None
    load: Callable[[Path], str] = field(default_factory=lambda: _load)

    def build(self, place: Path) -> None:
        """Makes the state before the save."""
        place.mkdir(parents=True)
        self.prepare(place)
        if self.old is not None:
            self.old(place / self.target)
            if not (place / self.target / "tokenizer.json").exists():  # the library saves it separately
                (place / self.target / "tokenizer.json").write_text("{}")
            for name in FOREIGN:
                path = place / self.target / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(f"foreign {name}")

    def save(self, place: Path) -> None:
        """The save to kill."""
        self.new(place / self.target)

    def state(self, place: Path) -> str:
        """A digest of what a loader and a tokenizer find there; "nothing": the directory does not exist."""
        target = place / self.target
        if not target.exists():
            return "nothing"
        digest = hashlib.sha256(self.load(target).encode())
        for name in _COMPANION_NAMES:
            path = target / name
            digest.update(path.read_bytes() if path.is_file() else b"none")
        return digest.hexdigest()


def foreign(place: Path, scenario: Scenario) -> dict[str, tuple[int, str]]:
    """Inode and content of all files of others."""
    target = place / scenario.target
    found = {name: target / name for name in FOREIGN if (target / name).exists()}
    return {name: (path.stat().st_ino, path.read_text()) for name, path in found.items()}


def debris(place: Path) -> list[str]:
    """What killed saves left behind."""
    names = [str(path.relative_to(place)) for path in place.rglob("*")]
    return [n for n in names if any(word in n for word in (".requanto-saving", ".partial", ".tmp"))]


def _load(target: Path) -> str:
    loaded = tf.LlamaForCausalLM.from_pretrained(target)
    digest = hashlib.sha256()
    for name, tensor in sorted(flatten(dict(loaded.state_dict())).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _saver(seed: int, kind: str, **options: Any) -> Callable[[Path], None]:
    made = model(seed, kind)
    return lambda target: made.save_pretrained(target, **options)


def _in_current_directory(save: Callable[[Path], None]) -> Callable[[Path], None]:
    def inside(target: Path) -> None:
        os.chdir(target)
        before = os.stat(".").st_ino
        save(Path("."))
        if os.stat(".").st_ino != before or not os.path.samefile(".", target):
            raise RuntimeError("the current directory is another one")

    return inside


def _quantizer(seed: int, kind: str, place: Path, files: dict[str, str]) -> Callable[[Path], None]:
    """`requanto quantize`, after the model has been loaded."""
    made = model(seed, kind)
    source = place / f"source-{seed}"
    source.mkdir(parents=True)
    for name, text in files.items():
        (source / name).write_text(text)
    return lambda target: save_with_companions(made, source, target)


def _plain(files: dict[str, str]) -> Callable[[Path], None]:
    def save(target: Path) -> None:
        with replaced_directory(target) as scratch:
            for name, text in files.items():
                (scratch / name).parent.mkdir(exist_ok=True)
                (scratch / name).write_text(text)

    return save


def _read_plain(target: Path) -> str:
    from requanto.checkpoint.commit import finish_interrupted

    finish_interrupted(target)
    names = [".metadata", "model_index.json", *(f"__{n}_0.distcp" for n in range(3))]
    names += [name for name in _pipeline_files("") if "/" in name]
    return " ".join((target / name).read_text() for name in names if (target / name).is_file())


def _pipeline_files(text: str) -> dict[str, str]:
    files = {"model_index.json": text}
    for part in ("unet", "vae"):
        files |= {f"{part}/config.json": text, f"{part}/diffusion_pytorch_model.safetensors": text}
    return files


def _link(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "target").symlink_to(place / "elsewhere")


def scenarios(place: Path) -> dict[str, Scenario]:
    """All scenarios; ``place`` is for files that they share."""
    tf.utils.logging.disable_progress_bar()
    shutil.rmtree(place, ignore_errors=True)
    one, other, third = _saver(1, "int8"), _saver(2, "int4"), _saver(3, "int8")
    shards, fewer = _saver(2, "int4", max_shard_size="5KB"), _saver(1, "int8", max_shard_size="9KB")
    distributed = [{".metadata": n, **{f"__{rank}_0.distcp": n for rank in range(int(n))}} for n in "312"]
    quantized = [
        _quantizer(4, "int8", place, {"tokenizer.json": '{"of": "A"}', "vocab.txt": "A", "chat_template.jinja": "A"}),
        _quantizer(5, "int4", place, {"tokenizer.json": '{"of": "B"}', "merges.txt": "B"}),
        _quantizer(6, "int8", place, {"tokenizer.json": '{"of": "C"}'}),
    ]
    return {
        "a new directory": Scenario(None, one, third),
        "new shards": Scenario(None, shards, third),
        "over one file": Scenario(one, other, third),
        "one file to shards": Scenario(one, shards, third),
        "shards to one file": Scenario(shards, one, third),
        "shards to fewer": Scenario(shards, fewer, third),
        "float to quantized": Scenario(_saver(7, "float"), other, third),
        "float shards to quantized": Scenario(_saver(7, "float", max_shard_size="9KB"), other, third),
        "through a link": Scenario(one, shards, third, prepare=_link),
        "the current directory": Scenario(one, _in_current_directory(shards), third),
        "requanto quantize": Scenario(quantized[0], quantized[1], quantized[2]),
        "all ranks": Scenario(*map(_plain, distributed), load=_read_plain),
        "a pipeline": Scenario(*(_plain(_pipeline_files(n)) for n in "123"), load=_read_plain),
    }
