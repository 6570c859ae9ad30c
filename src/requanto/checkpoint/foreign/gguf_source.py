"""The tensors of GGUF files by name, read when they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from requanto.checkpoint.foreign.gguf_header import TensorInfo, read_header, shards_of
from requanto.checkpoint.foreign.source import Header, Source
from requanto.checkpoint.format import CheckpointError


class GgufSource(Source):
    """The tensors of a GGUF file, or of all files of a split one. Those with blocks are read as bytes ``[..., row bytes]``.

    Files are read, not mapped into memory, so what was read does not stay there.

    Args:
        path: the file, or one of the files of a split checkpoint.

    Attributes:
        fields: the metadata; None for arrays of texts and long ones.
        tensors: what is known of each tensor, by its name.

    Raises:
        CheckpointError: a file is missing or damaged, or two files hold tensors of the same name.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for file in shards_of(path):
            fields, tensors = read_header(file)
            self.fields = {**fields, **self.fields}
            for tensor in tensors:
                if tensor.name in self.tensors:
                    other = os.path.basename(self.tensors[tensor.name].file)
                    raise CheckpointError(
                        f"both {other} and {file.name} hold {tensor.name}: files of two checkpoints are mixed"
                    )
                self.tensors[tensor.name] = tensor
        count = self.fields.get("split.tensors.count")
        if isinstance(count, int) and count != len(self.tensors):
            raise CheckpointError(
                f"{path}: split.tensors.count is {count}, found {len(self.tensors)} tensors in "
                f"{len(shards_of(path))} files: a file belongs to another checkpoint, or was renamed"
            )
        self.metadata = {key: value for key, value in self.fields.items() if isinstance(value, str)}

    @property
    def architecture(self) -> str:
        """``general.architecture``, such as ``"llama"``; empty if the file does not say."""
        return self.metadata.get("general.architecture", "")

    def header(self, name: str) -> Header:
        info = self.info(name)
        if info.type.dtype is not None:
            return Header(info.shape, info.type.dtype)
        return Header(torch.Size([*info.shape[:-1], info.row_bytes]), torch.uint8)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{name} is not in the files")
        return self.tensors[name]

    def where(self, name: str) -> str:
        return os.path.basename(self.info(name).file)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """The bytes of rows: uint8 ``[last - first, row bytes]``, of all leading axes together.

        Raises:
            CheckpointError: the file is shorter than when it was opened.
        """
        info = self.info(name)
        last = info.rows if last is None else last
        found = torch.empty((last - first, info.row_bytes), dtype=torch.uint8, device="cpu")
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.start + first * info.row_bytes)
            view, done = memoryview(found.numpy()).cast("B"), 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
        if done < len(view):
            raise CheckpointError(f"{info.file} ends within {name}: it was truncated while it was read")
        return found

    def __getitem__(self, name: str) -> torch.Tensor:
        info, header = self.info(name), self.header(name)
        return self.rows(name).view(info.type.dtype or torch.uint8).view(header.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors
