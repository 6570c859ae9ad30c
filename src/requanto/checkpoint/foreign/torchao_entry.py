"""A tensor as the header of a file of torchao describes it: its attributes, with the stored tensors that it consists of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown
from requanto.dtypes.qtypes import qtype, qtypes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Entry:
    """A quantized tensor.

    Args:
        name: its name in the model.
        kind: torchao's class.
        data: the attributes of that.
        source: the stored tensors.
    """

    def __init__(self, name: str, kind: str, data: Mapping[str, Any], source: Source) -> None:
        self.name, self.kind, self._data, self._source = name, kind, data, source
        module, _, leaf = name.rpartition(".")
        self.module, self.leaf = module, leaf
        self._prefix = f"{module}._{leaf}_"

    def tensor(self, part: str) -> str:
        """Name of a stored part."""
        return self._prefix + part

    def has(self, part: str) -> bool:
        """Whether an optional part is stored."""
        return self.tensor(part) in self._source

    def sources(self) -> tuple[str, ...]:
        """Names of all its stored parts."""
        return tuple(key for key in self._source if key.startswith(self._prefix))

    def shape(self, part: str, *dtypes: torch.dtype) -> torch.Size:
        """Shape of a part.

        Raises:
            CheckpointError: it is missing, or has none of the dtypes.
        """
        header = self._source.need(self.tensor(part), self.name)
        return self._source.need_shape(self.tensor(part), self.name, header.shape, *dtypes).shape

    def expect(self, part: str, shape: Any, *dtypes: torch.dtype) -> None:
        """Raises CheckpointError unless a part is there and has this shape and one of the dtypes."""
        self._source.need_shape(self.tensor(part), self.name, shape, *dtypes)

    def is_dtype(self, part: str, dtype: torch.dtype) -> bool:
        """Whether a part has a dtype."""
        return self._source.header(self.tensor(part)).dtype == dtype

    def dtype(self, key: str) -> torch.dtype:
        """An attribute that is a float dtype."""
        found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(self.get(key)))
        if found is None:
            raise self.wrong(key, "float32, bfloat16 or float16")
        return found

    def small(self, part: str) -> torch.Tensor:
        """A part that is read for the description of the weight: zero points."""
        return self._source[self.tensor(part)]

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """An error for an attribute."""
        return CheckpointError(
            f"{self.name}: the header says {key}={shown(self._data.get(key))} of a torchao {self.kind}, expected {expected}"
        )

    # ------------------------------------------------------------------ attributes

    def known(self, *keys: str) -> None:
        """Raises CheckpointError if there are other attributes: what they change is not known."""
        if unknown := sorted(self._data.keys() - set(keys)):
            raise CheckpointError(
                f"{self.name}: the header has {unknown[0]}={shown(self._data[unknown[0]])} of a torchao {self.kind}, which "
                f"torchao 0.18 does not have: a newer version wrote it"
            )

    def get(self, key: str) -> Any:
        """An attribute: a number, a list, or the value of a described object; None if it is not there."""
        return _plain(self._data.get(key))

    def sizes(self, key: str, count: int | None = None) -> list[int]:
        """An attribute that is a list of sizes."""
        found = self.get(key)
        if (
            not isinstance(found, list)
            or not all(type(size) is int and size > 0 for size in found)
            or (count is not None and len(found) != count)
        ):
            raise self.wrong(key, f"a list of {count if count is not None else ''} sizes".replace("  ", " "))
        return found

    def number(self, key: str) -> int:
        """An attribute that is a size."""
        found = self.get(key)
        if type(found) is not int or found < 1:
            raise self.wrong(key, "a size")
        return found

    def blocks(self, shape: torch.Size, scale: torch.Size) -> list[int]:
        """The shape of the blocks that share a scale, of ``block_size`` or, where that is empty, of the scale's shape."""
        found = self.get("block_size")
        if not found:
            scale = scale if len(scale) == len(shape) else torch.Size([1] * len(shape))
            found = [size // count for size, count in zip(shape, scale, strict=True)]
        elif not isinstance(found, list) or len(found) != len(shape):
            raise self.wrong("block_size", f"{len(shape)} sizes for {tuple(shape)}")
        if any(type(size) is not int or size < 1 or length % size for size, length in zip(found, shape, strict=True)):
            raise self.wrong("block_size", f"sizes that divide {tuple(shape)}")
        return found


def _plain(value: Any) -> Any:
    """A described object ``{"_type": ..., "_data": ...}`` without its type."""
    if isinstance(value, dict) and "_data" in value:
        value = value["_data"]
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


def count_of(shape: Any, block: list[int]) -> torch.Size:
    """Number of blocks along each axis."""
    return torch.Size(size // length for size, length in zip(shape, block, strict=True))


def is_all(shape: Any) -> bool:
    """True for the shape of one number."""
    return math.prod(shape) == 1


def float8_type(dtype: torch.dtype) -> qtype:
    """Our type of a float8 dtype."""
    return qtypes[f"q{str(dtype).removeprefix('torch.')}"]
