"""The tensors of a checkpoint by name: headers first, values one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from requanto.checkpoint.format import CheckpointError

#: torch dtypes by their names in safetensors files; a file with another one is refused
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F4": torch.float4_e2m1fn_x2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Header(NamedTuple):
    """What is known of a stored tensor before it is read."""

    shape: torch.Size
    dtype: torch.dtype


def _header_of(piece: Any) -> Header:
    """What torch will show of a slice: of F4, which is stored as single codes, a tensor of pairs."""
    dtype, shape = DTYPES[piece.get_dtype()], list(piece.get_shape())
    if dtype is torch.float4_e2m1fn_x2 and shape:
        shape[-1] //= 2
    return Header(torch.Size(shape), dtype)


class Source(Mapping[str, torch.Tensor]):
    """Read-only mapping from name to tensor. Each access reads the tensor; `header` does not.

    Attributes:
        metadata: the texts in the headers of the files.
    """

    metadata: Mapping[str, str] = {}

    def header(self, name: str) -> Header:
        """Shape and dtype of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        raise NotImplementedError

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages; empty if it came from memory."""
        return ""

    def need(self, name: str, whose: str) -> Header:
        """`header` of a tensor without which a weight cannot be read.

        Args:
            name: the tensor.
            whose: the weight, for the message.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self:
            module = name.rpartition(".")[0]
            there = sorted(key.rpartition(".")[2] for key in self if key.rpartition(".")[0] == module)
            raise CheckpointError(
                f"{whose} needs the tensor {name}, which is not in the files (of its module they hold "
                f"{', '.join(there[:8]) or 'nothing'}): a shard is missing, or another program wrote the config"
            )
        return self.header(name)

    def need_shape(self, name: str, whose: str, shape: Iterable[int], *dtypes: torch.dtype) -> Header:
        """`need` with a check of shape and dtype.

        Args:
            shape: the expected shape.
            dtypes: the possible dtypes; none: any.

        Raises:
            CheckpointError: it is missing, or has another shape or dtype.
        """
        found, shape = self.need(name, whose), torch.Size(shape)
        if found.shape != shape or (dtypes and found.dtype not in dtypes):
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "a tensor"
            raise CheckpointError(
                f"{name} is {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}, expected {wanted} "
                f"{tuple(shape)}: it is damaged, or does not belong to this config"
            )
        return found


class FilesSource(Source):
    """The tensors of safetensors files, memory-mapped.

    Args:
        files: the files.
        unique: refuse files that hold tensors of the same name; otherwise the last one counts, as in the libraries.

    Raises:
        CheckpointError: a file is missing or damaged, or holds a tensor that another has, too.
    """

    def __init__(self, files: Iterable[str | os.PathLike], unique: bool = True) -> None:
        self._open: dict[str, Any] = {}
        self._file: dict[str, str] = {}
        self.metadata = {}
        for file in map(str, files):
            try:
                opened = self._open[file] = safe_open(file, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(f"{file} is missing: the checkpoint is incomplete") from error
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors ({error}): it is truncated or damaged, download it again"
                ) from error
            for key in opened.keys():  # noqa: SIM118  (it is no dict)
                if unique and key in self._file:
                    raise CheckpointError(
                        f"both {Path(self._file[key]).name} and {Path(file).name} hold {key}: files of two checkpoints "
                        f"are mixed in one directory"
                    )
                self._file[key] = file
            self.metadata |= opened.metadata() or {}

    def header(self, name: str) -> Header:
        if name not in self._file:
            raise CheckpointError(f"{name} is not in the files")
        piece = self._open[self._file[name]].get_slice(name)
        if piece.get_dtype() not in DTYPES:
            raise CheckpointError(
                f"{name} has dtype {piece.get_dtype()} in {self.where(name)}, which torch has no dtype for"
            )
        return _header_of(piece)

    def where(self, name: str) -> str:
        return Path(self._file[name]).name

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self._open[self._file[name]].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{name} cannot be read from {self.where(name)}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file


class TensorsSource(Source):
    """Tensors that are in memory, or slices of safetensors files.

    Args:
        tensors: name -> tensor, or an object as ``safe_open(...).get_slice(name)`` gives it.
    """

    def __init__(self, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors, self.metadata = tensors, metadata or {}

    def header(self, name: str) -> Header:
        if name not in self._tensors:
            raise CheckpointError(f"{name} is not in the state dict")
        found = self._tensors[name]
        if isinstance(found, torch.Tensor):
            return Header(found.shape, found.dtype)
        return _header_of(found)

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._tensors[name]
        return found if isinstance(found, torch.Tensor) else found[...]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors
