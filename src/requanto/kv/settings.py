"""KVSettings: the types of cached keys and values, and which of the tokens are quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qfloat8_e5m2, qint2, qint4, qint8, qtype, resolve_qtype, short_name
from requanto.kv.codec import Codec

#: Types of cached keys and values. The integers below 8 bits have a shift.
TYPES: tuple[qtype, ...] = (qint8, qint4, qint2, qfloat8_e4m3fn, qfloat8_e5m2)

Kind = str | qtype | torch.dtype | None


@dataclass(frozen=True)
class KVSettings:
    """How the keys and the values of a layer are quantized.

    Keys have one scale for each channel and block of ``block`` tokens, values one for each token and group of channels: keys
    have channels of large values, values have none (KIVI, https://arxiv.org/abs/2402.02750).

    Attributes:
        keys, values: their types: "int8", "int4", "int2", "float8" ...; None: they stay float.
        window: at least so many of the last tokens stay float, at most ``window + block - 1``.
        block: tokens that are quantized together.
        group: channels of a value that share a scale, at most: a head whose size is no multiple of it has groups of the
            largest size that divides it, down to half of this, or a single group.

    Raises:
        ValueError, TypeError: a type is unknown or not one of `TYPES`, a number is out of its range.
    """

    keys: Kind = "int8"
    values: Kind = "int8"
    window: int = 64
    block: int = 64
    group: int = 64

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            object.__setattr__(self, name, _checked_type(name, getattr(self, name)))
        for name, least in (("window", 0), ("block", 1), ("group", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} of a KV cache is a number of tokens or channels, found {value!r}")
            if value < least:
                raise ValueError(f"{name} of a KV cache must be {least} or more, found {value}")

    def key_codec(self) -> Codec | None:
        """The codec of the keys; None: they stay float."""
        return None if self.keys is None else Codec(self.keys, "channel", self.block)  # type: ignore[arg-type]

    def value_codec(self) -> Codec | None:
        """The codec of the values; None: they stay float."""
        return None if self.values is None else Codec(self.values, "token", self.group)  # type: ignore[arg-type]

    def __str__(self) -> str:
        keys, values = (
            "float" if kind is None else short_name(kind)  # type: ignore[arg-type]
            for kind in (self.keys, self.values)
        )
        return f"keys={keys}, values={values}, window={self.window}, block={self.block}, group={self.group}"


def _checked_type(name: str, value: Kind) -> qtype | None:
    if value is None:
        return None
    kind = resolve_qtype(value)
    if kind not in TYPES:
        known = ", ".join(short_name(each) for each in TYPES)
        raise ValueError(f"{name} of a KV cache can be {known} or None (float), found {value!r}")
    return kind
