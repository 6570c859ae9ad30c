"""Writes safetensors files a tensor at a time: what is in memory is one tensor, whatever the size of the file.

safetensors' own writer takes all tensors of a file at once, because names and offsets come first. Here the tensors go to
temporary files, one for each element size, and are put behind the header when they are complete. Larger elements come first,
so that every tensor is aligned, as safetensors' writer does it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from requanto.checkpoint.foreign.source import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPIED = 2**22


class ShardWriter:
    """Writes tensors to ``<stem>.safetensors``, or to shards with an index if they exceed ``max_shard_bytes``.

    Use it as a context manager: the files are complete when the block ends without an exception.

    Args:
        directory: an existing folder.
        stem: ``"model"`` (Transformers) or ``"diffusion_pytorch_model"`` (Diffusers).
        max_shard_bytes: a shard ends with the tensor that reaches this size.
        metadata: texts for the header of each file.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        stem: str = "model",
        max_shard_bytes: int = 5 * 10**9,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.directory, self.stem, self.limit = Path(directory), stem, max_shard_bytes
        self.metadata = {"format": "pt", **(metadata or {})}
        self._open: dict[int, IO[bytes]] = {}
        self._entries: dict[str, tuple[int, int, int, dict[str, Any]]] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._bytes = self._total = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for file in self._open.values():
                file.close()
                os.unlink(file.name)
            for path, _ in self._shards:  # renamed already, unless an exception ended the block
                path.unlink(missing_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor.

        Raises:
            ValueError: there is one of that name already, or its dtype has no name in safetensors files.
        """
        if name in self._names:
            raise ValueError(f"two tensors are named {name}")
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which safetensors files cannot hold")
        size = tensor.dtype.itemsize
        file = self._open.get(size)
        if file is None:
            file = self._open[size] = open(self.directory / f".{self.stem}.{size}.part", "w+b")  # noqa: SIM115
        start = file.tell()
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        file.write(memoryview(data.numpy()))
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        self._entries[name] = (size, start, file.tell(), entry)
        self._names.add(name)
        self._bytes += data.numel()
        self._total += data.numel()
        if self._bytes >= self.limit:
            self._end_shard()

    def _end_shard(self) -> None:
        path = self.directory / f".{self.stem}.shard{len(self._shards)}.part"
        first, base = {}, 0
        for size in sorted(self._open, reverse=True):
            first[size] = base
            base += self._open[size].tell()
        header = {"__metadata__": dict(sorted(self.metadata.items()))}
        order = sorted(self._entries, key=lambda name: (-self._entries[name][0], self._entries[name][1]))
        for name in order:
            size, start, stop, entry = self._entries[name]
            header[name] = {**entry, "data_offsets": [first[size] + start, first[size] + stop]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as whole:
            whole.write(len(text).to_bytes(8, "little") + text)
            for size in sorted(self._open, reverse=True):
                part = self._open[size]
                part.seek(0)
                shutil.copyfileobj(part, whole, _COPIED)
                part.seek(0)
                part.truncate()
            whole.flush()
            os.fsync(whole.fileno())
        self._shards.append((path, list(self._entries)))
        self._entries, self._bytes = {}, 0

    def _finish(self) -> None:
        if self._entries or not self._shards:
            self._end_shard()
        count = len(self._shards)
        where: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            name = f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number:05}-of-{count:05}.safetensors"
            os.replace(path, self.directory / name)
            where |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
            path = self.directory / f"{self.stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
