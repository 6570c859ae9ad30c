"""A foreign checkpoint under the names of our own format: a mapping whose values are made when they are asked for.

Loaders of the libraries go through the keys of a checkpoint and read a tensor when they place it. They find ``W_qdata``,
``W_scale`` ... here, as in a checkpoint of Requanto, and everything after that is the same.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.readers import UNFORESEEN
from requanto.checkpoint.foreign.source import DTYPES, Source
from requanto.checkpoint.format import CheckpointError, expected_parts, rebuild
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: torch dtype -> its name in safetensors files
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: dtypes of several codes in one number
_WORDS = (torch.uint16, torch.int16, torch.uint32, torch.int32)


class Lazy:
    """A tensor that is made when it is read: ``lazy[...]``. Loaders use it like a slice of a safetensors file.

    Args:
        make: makes the tensor.
        shape: its shape.
        dtype: its dtype, or one of those that it may have.
    """

    def __init__(self, make: Callable[[], torch.Tensor], shape: torch.Size, dtype: torch.dtype) -> None:
        self._make, self.shape, self.dtype = make, shape, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._make()[index]

    def get_shape(self) -> list[int]:
        """The shape, as safetensors' slices give it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype by its name in safetensors files."""
        return _NAMES[self.dtype]

    def is_floating_point(self) -> bool:
        """Whether it holds floats."""
        return self.dtype.is_floating_point

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


class OnePass:
    """Parts that are made together and taken one by one, perhaps by several threads. What was taken is let go of.

    Args:
        make: makes all parts by name.
    """

    def __init__(self, make: Callable[[], Parts]) -> None:
        self._make, self._parts, self._lock = make, {}, threading.Lock()  # type: ignore[var-annotated]

    def take(self, part: str) -> torch.Tensor:
        """One of the parts; all are made anew if it was taken before."""
        with self._lock:
            if part not in self._parts:
                self._parts = dict(self._make())
            return self._parts.pop(part)


def lazy_parts(name: str, text: str, make: Callable[[], Parts]) -> dict[str, Lazy]:
    """The stored parts of a weight under their keys (``NAME_qdata`` ...), made when the first is read."""
    together = OnePass(make)
    return {
        f"{name}_{part}": Lazy(lambda part=part: together.take(part), shape, dtypes[0])  # type: ignore[misc]
        for part, (shape, dtypes) in expected_parts(text, name).items()
    }


def built(name: str, weight: ForeignWeight, source: Source, dtype: torch.dtype = torch.float32) -> QTensor:
    """Makes a weight and checks it.

    Args:
        name: its name, for messages.
        dtype: dtype that the tensor shows.

    Raises:
        CheckpointError: its tensors do not fit together, or hold values that no quantization writes.
    """
    try:
        return rebuild(name, weight.text, weight.build(source), dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n(made of {', '.join(weight.sources)})") from error
    except UNFORESEEN as error:
        raise _unforeseen(name, weight.sources, error) from error


def built_float(name: str, one: ForeignFloat, source: Source) -> torch.Tensor:
    """Makes a weight that becomes float and checks its form.

    Raises:
        CheckpointError: its tensors do not fit together.
    """
    try:
        value = one.build(source)
    except CheckpointError:
        raise
    except UNFORESEEN as error:
        raise _unforeseen(name, one.sources, error) from error
    if (value.shape, value.dtype) != (one.shape, one.dtype):
        raise CheckpointError(
            f"{name} becomes {value.dtype} {tuple(value.shape)}, expected {one.dtype} {tuple(one.shape)}: a tensor is "
            f"damaged (made of {', '.join(one.sources)})"
        )
    if one.reason and not bool(value.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or Inf: a tensor is damaged (made of {', '.join(one.sources)})")
    return value


def _unforeseen(name: str, sources: tuple[str, ...], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name} cannot be made of {', '.join(sources)} ({type(error).__name__}: {error}): one of them is damaged, or "
        f"config and files do not belong together"
    )


def _check_float(name: str, source: Source) -> None:
    """Raises CheckpointError for codes that would be loaded as a weight."""
    dtype = source.header(name).dtype
    if name.rpartition(".")[2] == "weight" and (dtype.itemsize == 1 or dtype in _WORDS) and dtype != torch.bool:
        raise CheckpointError(
            f"{name} is {str(dtype).removeprefix('torch.')}, which are codes, and neither the config nor a tensor beside it "
            f"says what they stand for: its scales are missing, or another program wrote the config"
        )


class Translated(Mapping[str, Any]):
    """The tensors of a foreign checkpoint, quantized weights as the parts of our format; values are `Lazy` or stored ones.

    Args:
        found: what a reader found in ``source``.
        source: the tensors.
        others: how a tensor that is loaded as it is appears; None: it is read from ``source``.
    """

    def __init__(self, found: ForeignCheckpoint, source: Source, others: Mapping[str, Any] | None = None) -> None:
        self.found, self.source = found, source
        self._values: dict[str, Any] = {}
        for name, weight in found.weights.items():
            self._values |= lazy_parts(name, weight.text, lambda n=name, w=weight: built(n, w, source).inner_tensors())
        for name, one in found.floats.items():
            make = lambda n=name, one=one: built_float(n, one, source)  # noqa: E731
            self._values[name] = Lazy(make, one.shape, one.dtype)
        for module, scale in found.activations.items():
            self._values[f"{module}.input_scale"] = Lazy(
                lambda scale=scale: scale.build(source).reshape(()).float(),
                torch.Size(()),
                torch.float32,  # type: ignore[misc]
            )
            # 1 stands for an output that stays float
            one = torch.ones((), dtype=torch.float32, device="cpu")
            self._values[f"{module}.output_scale"] = Lazy(lambda one=one: one, torch.Size(()), torch.float32)  # type: ignore[misc]
        consumed = found.consumed
        for name in source:
            if name in consumed:
                continue
            if name in found.weights or name in self._values:
                raise CheckpointError(
                    f"{name} is in the files as a float tensor, and quantized as well: files of two checkpoints are mixed"
                )
            _check_float(name, source)
            self._values[name] = others[name] if others is not None else self._stored(name)

    def _stored(self, name: str) -> Lazy:
        shape, dtype = self.source.header(name)
        return Lazy(lambda: self.source[name], shape, dtype)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values


def tell(found: ForeignCheckpoint, where: str) -> None:
    """Logs what a checkpoint holds: its format, what is dequantized and why, and what runs otherwise than elsewhere."""
    logger.info("%s: %s, %d weights stay quantized", where, found.format, len(found.weights))
    reasons: dict[str, list[str]] = {}
    for name, one in found.floats.items():
        if one.reason:
            reasons.setdefault(one.reason, []).append(name)
    for reason, names in reasons.items():
        logger.warning("%s: %d weights are dequantized, e.g. %s: %s", where, len(names), names[0], reason)
    notes: dict[str, int] = {}
    for weight in found.weights.values():
        if weight.note:
            notes[weight.note] = notes.get(weight.note, 0) + 1
    for note, count in notes.items():
        logger.info("%s: %d weights: %s", where, count, note)
