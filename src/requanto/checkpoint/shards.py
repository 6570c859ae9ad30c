"""Reading the tensors of a directory one at a time, and writing tensors in shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.directory import replace_file
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.opening import weight_map
from requanto.checkpoint.weight_files import entry_file


class SafetensorsFiles(Mapping):
    """Read-only mapping from tensor name to tensor of a directory's safetensors files; each access reads the tensor.

    A save to this directory that was interrupted is finished first.

    Args:
        directory: directory of the files.
        stem: file name without suffix: ``"model"`` (Transformers) or ``"diffusion_pytorch_model"`` (Diffusers).

    Raises:
        CheckpointError: no such file, or it cannot be read.
    """

    def __init__(self, directory: str | os.PathLike, stem: str = "model") -> None:
        self.directory = Path(directory)
        finish_interrupted(self.directory)
        entry = entry_file(self.directory, stem)
        self._open_files: dict[str, Any] = {}
        if entry is None:
            name = f"{stem}.safetensors"
            raise CheckpointError(f"{self.directory} holds neither {name} nor {name}.index.json")
        if entry.suffix == ".json":
            self._where = weight_map(entry)
        else:
            self._where = dict.fromkeys(self._file(entry.name).keys(), entry.name)

    def _file(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.directory / name, framework="pt")
            except (OSError, ValueError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / name} cannot be read as safetensors: {error}") from error
        return self._open_files[name]

    def __getitem__(self, key: str) -> torch.Tensor:
        file = self._where[key]
        try:
            return self._file(file).get_tensor(key)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(
                f"{key} cannot be read from {self.directory / file} ({error}): the index and its files do not "
                "belong together, "
                f"or one is damaged"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where


def save_shards(
    state: Mapping[str, torch.Tensor],
    directory: str | os.PathLike,
    stem: str = "model",
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors to ``<stem>.safetensors``, or to shards with an index if they exceed ``max_shard_size``.

    Each file is written under a temporary name and renamed when it is complete. A tensor that appears under several names
    is written once, under the first name.

    Args:
        metadata: of each file, in addition to ``format``.

    Returns:
        The files written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # a dependency of Transformers and of Diffusers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    seen: dict[tuple, str] = {}
    unique = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device)
        if tensor.numel() and identity in seen:
            continue
        seen[identity] = name
        unique[name] = tensor.detach().contiguous()
    split = split_torch_state_dict_into_shards(
        unique, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    written = []
    extra = {"format": "pt", **(metadata or {})}
    for file, names in split.filename_to_tensors.items():
        shard = {name: unique[name].cpu() for name in names}
        replace_file(directory / file, lambda part, shard=shard: save_file(shard, part, metadata=extra))
        written.append(directory / file)
    if split.is_sharded:
        index = directory / f"{stem}.safetensors.index.json"
        text = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, indent=2)
        index.write_text(text, encoding="utf-8")
        written.append(index)
    return written
