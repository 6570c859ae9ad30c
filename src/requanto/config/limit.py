"""Parses a user's budget: bits per weight or bytes of the whole model, and the types to choose from."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from requanto.dtypes.qtypes import resolve_qtype, short_name
from requanto.scales.groups import default_group_size

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limit:
    """A budget; exactly one of the two is set.

    Attributes:
        bits: bits per weight, averaged over all weights that the configuration selects for quantization: codes, scales and
            shifts, or the float values of those that stay float.
        max_memory: bytes of all parameters and buffers of the model, as ``get_memory_footprint`` counts them.
    """

    bits: float | None = None
    max_memory: int | None = None

    @classmethod
    def of(cls, bits: float | None, max_memory: int | str | None) -> Limit:
        """The budget for a user's ``bits`` and ``max_memory``.

        Raises:
            ValueError: neither or both are given, or the value is not positive.
        """
        if (bits is None) == (max_memory is None):
            raise ValueError(
                f"weights='auto' needs exactly one budget, bits= or max_memory=: found bits={bits!r} and "
                f"max_memory={max_memory!r}; for example bits=4.5 or max_memory='80MB'"
            )
        if bits is not None:
            if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not (math.isfinite(bits) and bits > 0):
                raise ValueError(f"bits must be a positive number of bits per weight, such as 4.5; found {bits!r}")
            return cls(bits=float(bits))
        return cls(max_memory=parse_bytes(max_memory))

    def capacity(self, weights: int, rest: int) -> int:
        """Bytes that the selected weights may take.

        Args:
            weights: their number of elements.
            rest: bytes of everything else in the model.
        """
        return math.floor(self.bits * weights / 8) if self.bits is not None else (self.max_memory or 0) - rest

    def as_argument(self, taken: int, weights: int, rest: int, up: bool) -> str:
        """The budget, written as a keyword argument, that allows ``taken`` bytes for the selected weights."""
        if self.bits is None:
            return f"max_memory={taken + rest} ({(taken + rest) / 1e6:.2f} MB)"
        scaled = taken * 8 / max(1, weights) * 10**4
        return f"bits={(math.ceil(scaled) if up else math.floor(scaled)) / 10**4:g}"

    def __str__(self) -> str:
        return f"bits={self.bits:g}" if self.bits is not None else f"max_memory={self.max_memory}"


def parse_bytes(value: int | str | None) -> int:
    """Bytes from a number or a text: ``"80MB"`` (10^6), ``"1.5GiB"`` (2^30).

    Raises:
        ValueError: the value is not a positive size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", value)
        if found and found[2].lower() in _UNITS and float(found[1]) > 0:
            return int(float(found[1]) * _UNITS[found[2].lower()])
    raise ValueError(f"max_memory must be bytes as an integer or a text such as '80MB' or '1.5GiB', found {value!r}")


def parse_candidates(texts: Sequence[str]) -> list[tuple[str, int | None]]:
    """(type, group size or None for one scale per row) of each text; a type alone has its default group size.

    Raises:
        ValueError: a type or group is unknown.
    """
    found = []
    for text in texts:
        name, _, group = text.partition(":")
        kind = resolve_qtype(name)
        if group and group != "row" and not (group.isdigit() and int(group)):
            raise ValueError(f"a candidate is TYPE, TYPE:GROUP or TYPE:row, such as 'int4:64'; found {text!r}")
        size = default_group_size(kind) if not group else None if group == "row" else int(group)
        found.append((short_name(kind), size))
    return found
