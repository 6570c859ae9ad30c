"""The head of a GGUF file: its metadata and the table of its tensors (github.com/ggml-org/ggml, docs/gguf.md).

Read here, and not by the package gguf: that one keeps two arrays for each word of the vocabulary, 120 MB for 262 144 of
them, and takes a damaged table for an error of numpy.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from requanto.checkpoint.foreign.gguf_blocks import TYPES
from requanto.checkpoint.format import CheckpointError

_VERSIONS = (2, 3)
_DAMAGED = "it is damaged or truncated, download it again"
#: kinds of metadata values: fixed sizes by their format, then strings and arrays
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
#: longest array of numbers that is kept; vocabularies are not needed here
_KEPT = 1024
#: arrays in arrays that are read
_DEEPEST = 8


class GgmlType(NamedTuple):
    """A type of GGUF's tensors.

    Attributes:
        name: its name in GGUF.
        count: weights of a block; 1: it is a plain number.
        size: bytes of a block.
        dtype: the torch dtype of a plain number, else None.
    """

    name: str
    count: int
    size: int
    dtype: torch.dtype | None = None


#: GGUF's number of each type -> the type
GGML_TYPES: dict[int, GgmlType] = {
    0: GgmlType("F32", 1, 4, torch.float32),
    1: GgmlType("F16", 1, 2, torch.float16),
    24: GgmlType("I8", 1, 1, torch.int8),
    25: GgmlType("I16", 1, 2, torch.int16),
    26: GgmlType("I32", 1, 4, torch.int32),
    27: GgmlType("I64", 1, 8, torch.int64),
    28: GgmlType("F64", 1, 8, torch.float64),
    30: GgmlType("BF16", 1, 2, torch.bfloat16),
    **{
        number: GgmlType(name, TYPES[name].count, TYPES[name].size)
        for number, name in (
            *(
                (2, "Q4_0"),
                (3, "Q4_1"),
                (6, "Q5_0"),
                (7, "Q5_1"),
                (8, "Q8_0"),
                (10, "Q2_K"),
                (11, "Q3_K"),
                (12, "Q4_K"),
            ),
            *((13, "Q5_K"), (14, "Q6_K"), (20, "IQ4_NL"), (23, "IQ4_XS"), (35, "TQ2_0"), (39, "MXFP4")),
        )
    },
    9: GgmlType("Q8_1", 32, 40),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    29: GgmlType("IQ1_M", 256, 56),
    34: GgmlType("TQ1_0", 256, 54),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the table.

    Attributes:
        name: its name.
        shape: in torch's order; the last size is the number of weights in a row.
        type: how it is stored.
        file: the file that holds it.
        start: where its bytes begin in the file.
    """

    name: str
    shape: torch.Size
    type: GgmlType
    file: str
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.type.count * self.type.size

    @property
    def rows(self) -> int:
        """Number of rows: the product of all sizes but the last."""
        return self.shape[:-1].numel()


class _Cursor:
    """Reads numbers one after the other, and no further than the file goes."""

    def __init__(self, data: Any, file: str) -> None:
        self.data, self.file, self.at = data, file, 0

    def bytes(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise CheckpointError(
                f"{self.file} ends at byte {len(self.data)}, within its head, which goes on to byte {self.at + count} or "
                f"further: {_DAMAGED}"
            )
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def text(self) -> str:
        found = self.bytes(self.number("<Q"))
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.file} holds a text that is not UTF-8 at byte {self.at - len(found)}: {_DAMAGED}"
            ) from error

    def skip_texts(self, count: int) -> None:
        for _ in range(count):
            self.bytes(self.number("<Q"))

    def value(self, key: str) -> Any:
        return self._value(key, self.number("<I"), _DEEPEST)

    def _value(self, key: str, kind: int, deepest: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or not deepest:
            what = f"of the unknown kind {kind}" if kind != _ARRAY else f"of more than {_DEEPEST} arrays in each other"
            raise CheckpointError(f"{self.file}: the metadata {key!r} has a value {what}: {_DAMAGED}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _STRING:
            return self.skip_texts(count)
        if inner in _NUMBERS:
            size = struct.calcsize(_NUMBERS[inner])
            found = self.bytes(size * count)
            return list(struct.unpack(f"<{count}{_NUMBERS[inner][1]}", found)) if count <= _KEPT else None
        return [self._value(key, inner, deepest - 1) for _ in range(count)]


def read_header(path: str | os.PathLike) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Reads metadata and table of one file. No tensor is read.

    Returns:
        The metadata (None for arrays of texts and long ones), and the tensors in the order of the table.

    Raises:
        CheckpointError: it is no GGUF file, of an unknown version, truncated, or its table makes no sense.
    """
    file = str(path)
    try:
        with open(file, "rb") as opened:
            if os.path.getsize(file) < 24:
                raise CheckpointError(
                    f"{file} has {os.path.getsize(file)} bytes, less than a GGUF file's head: {_DAMAGED}"
                )
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(data, file))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete") from error


def _read(cursor: _Cursor) -> tuple[dict[str, Any], list[TensorInfo]]:
    file = cursor.file
    magic, version = cursor.bytes(4), cursor.number("<I")
    if magic != b"GGUF":
        raise CheckpointError(f"{file} begins with {magic!r}, expected b'GGUF': it is no GGUF file")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{file} is a GGUF file of a big-endian machine, which is not read here")
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{file} is of GGUF version {version}; this Requanto reads {' and '.join(map(str, _VERSIONS))}. If the file is "
            f"not damaged, install a newer one: pip install -U requanto"
        )
    count, keys = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        metadata[key] = cursor.value(key)
    entries = list(_entries(cursor, count))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{file}: general.alignment is {alignment!r}, expected a power of two: {_DAMAGED}")
    begin = -(-cursor.at // alignment) * alignment
    tensors = [
        TensorInfo(name, shape, type_, file, _checked_start(name, file, begin, offset, alignment))
        for name, shape, type_, offset in entries
    ]
    _check_places(tensors, len(cursor.data), file)
    return metadata, tensors


def _entries(cursor: _Cursor, count: int) -> Iterator[tuple[str, torch.Size, GgmlType, int]]:
    seen: set[str] = set()
    for _ in range(count):
        name, dims = cursor.text(), cursor.number("<I")
        if not 1 <= dims <= 8:
            raise CheckpointError(f"{cursor.file}: {name} has {dims} axes, expected 1 to 8: {_DAMAGED}")
        shape = torch.Size(reversed([cursor.number("<Q") for _ in range(dims)]))
        number, offset = cursor.number("<I"), cursor.number("<Q")
        if name in seen:
            raise CheckpointError(f"{cursor.file} holds two tensors of the name {name}: {_DAMAGED}")
        seen.add(name)
        type_ = GGML_TYPES.get(number)
        if type_ is None:
            raise CheckpointError(
                f"{cursor.file}: {name} is of GGUF's type {number}, which Requanto does not know; it knows "
                f"{', '.join(sorted(known.name for known in GGML_TYPES.values()))}. If the file is not damaged, install a "
                f"newer version: pip install -U requanto"
            )
        if math.prod(shape) >= 2**48:  # numel() would overflow
            raise CheckpointError(f"{cursor.file}: {name} has shape {tuple(shape)}, which no tensor has: {_DAMAGED}")
        if shape[-1] % type_.count:
            raise CheckpointError(
                f"{cursor.file}: {name} has shape {tuple(shape)}, but rows of {type_.name} consist of blocks of "
                f"{type_.count} weights: {_DAMAGED}"
            )
        yield name, shape, type_, offset


def _checked_start(name: str, file: str, begin: int, offset: int, alignment: int) -> int:
    if offset % alignment:
        raise CheckpointError(
            f"{file}: {name} begins at byte {offset} of the data, expected a multiple of {alignment}: {_DAMAGED}"
        )
    return begin + offset


def _check_places(tensors: list[TensorInfo], size: int, file: str) -> None:
    """Tensors lie within the file, and not on one another."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda one: one.start):
        if tensor.start < end:
            raise CheckpointError(
                f"{file}: {tensor.name} begins at byte {tensor.start}, expected {end} or later, where {before} ends: a "
                f"wrong offset; {_DAMAGED}"
            )
        end, before = tensor.start + tensor.rows * tensor.row_bytes, tensor.name
        if end > size:
            raise CheckpointError(
                f"{file} has {size} bytes, but {tensor.name} ({tensor.type.name} {tuple(tensor.shape)}) goes on to byte "
                f"{end}: {_DAMAGED}"
            )


def shards_of(path: str | os.PathLike) -> list[Path]:
    """The files of a checkpoint that is split (``NAME-00001-of-00003.gguf``), by the name of one of them, else that one."""
    path = Path(path)
    stem, _, count = path.stem.rpartition("-of-")
    base, _, number = stem.rpartition("-")
    if path.suffix != ".gguf" or not (len(number) == len(count) == 5 and number.isdigit() and count.isdigit()):
        return [path]
    return [path.with_name(f"{base}-{one:05d}-of-{count}.gguf") for one in range(1, int(count) + 1)]
