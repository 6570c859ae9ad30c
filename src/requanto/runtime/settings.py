"""Settings of the process: few, and none that changes a result.

requanto.settings.workspace_bytes = 256 * 2**20
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from dataclasses import dataclass, fields

_MEGABYTE = 2**20
#: What torch counts bytes in.
_MOST_BYTES = 2**63 - 1


def compiled_from(text: str) -> bool | None:
    """What REQUANTO_COMPILE stands for.

    Raises:
        ValueError: neither 1, 0 nor nothing.
    """
    known = {"": None, "0": False, "1": True}
    if text not in known:
        raise ValueError(
            f"REQUANTO_COMPILE is {text!r}, expected 1 (compiled CPU kernels, or an error), 0 (none of them) or nothing "
            "(where there is a C++ compiler)"
        )
    return known[text]


def packing_from(text: str) -> bool:
    """What REQUANTO_PACK stands for.

    Raises:
        ValueError: neither 1, 0 nor nothing.
    """
    known = {"": True, "0": False, "1": True}
    if text not in known:
        raise ValueError(
            f"REQUANTO_PACK is {text!r}, expected 1 or nothing (weights are prepacked at their first product) or 0 (they "
            "are not)"
        )
    return known[text]


def workspace_from(text: str) -> int:
    """What REQUANTO_WORKSPACE_MB stands for, in bytes.

    Raises:
        ValueError: no number of megabytes.
    """
    try:
        size = float(text or "64")
    except ValueError:
        size = math.nan
    if not 0 <= size <= _MOST_BYTES // _MEGABYTE:
        raise ValueError(
            f"REQUANTO_WORKSPACE_MB is {text!r}, expected a number of megabytes without a unit, 0 or more, such as 64"
        )
    return int(size * _MEGABYTE)


class Choices:
    """What choices of implementations are made under.

    Attributes:
        version: a number for the settings, the table's entries and the failures at the time; the same when they are again.
    """

    def __init__(self) -> None:
        self.version = 0
        self._seen: dict[tuple[object, ...], int] = {}
        self._settings: tuple[object, ...] = ()
        self._events = 0

    def changed(self, settings: tuple[object, ...] | None = None) -> None:
        """Choices made so far may be other ones now: an implementation more, kernels that could not be made, settings."""
        if settings is None:
            self._events += 1
        else:
            self._settings = settings
        self.version = self._seen.setdefault((self._events, *self._settings), len(self._seen) + 1)


choices = Choices()


@dataclass
class Settings:
    """What may be set, by attribute, at any time.

    Attributes:
        workspace_bytes: the most memory that one thread keeps in scratch buffers, to dequantize weights into; 0 or more.
            (environment: REQUANTO_WORKSPACE_MB; 64 MB unless set).
        pack_on_first_use: on a CPU, reorder the codes of a layer for its kernel at the first product. The reordered
            form replaces the stored one, and the stored one comes back when it is asked for.
            (environment: REQUANTO_PACK=0 turns it off; `requanto.prepare(model)` packs all the same.)
        compiled: on a CPU, use kernels that torch's compiler makes where they are faster: for int8, float8 (e4m3), int4,
            int3 and int2 with many rows, and convolutions, mostly in bfloat16. Their first use on a machine takes half a
            minute and a C++ compiler, then they lie in a file (`cpu.aot.cache`). None: where there is a compiler,
            and if they cannot be made, eager operators and a line in the log; True: an error then; False: never.
            (environment: REQUANTO_COMPILE=1 or 0; None unless set)

    Raises:
        AttributeError: there is no setting of that name.
        TypeError, ValueError: the value is none for it. The setting stays as it was.
    """

    workspace_bytes: int = workspace_from(os.environ.get("REQUANTO_WORKSPACE_MB", ""))
    pack_on_first_use: bool = packing_from(os.environ.get("REQUANTO_PACK", ""))
    compiled: bool | None = compiled_from(os.environ.get("REQUANTO_COMPILE", ""))

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, _checked(name, value))
        choices.changed(tuple(self.__dict__.values()))

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"requanto.settings.{name} cannot be deleted; set it to another value")


def _checked(name: str, value: object) -> object:
    if name == "workspace_bytes":
        return _bytes(value)
    if name == "pack_on_first_use":
        return _one_of(name, value, (True, False))
    if name == "compiled":
        return _one_of(name, value, (None, True, False))
    known = [field.name for field in fields(Settings)]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise AttributeError(f"requanto.settings has no {name!r}; {meant}There are {', '.join(known)}")


def _bytes(value: object) -> int:
    expected = "expected a whole number of bytes, such as 64 * 2**20 for 64 MB"
    if isinstance(value, bool):
        raise TypeError(f"requanto.settings.workspace_bytes is {value!r}, {expected}")
    try:
        size = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"requanto.settings.workspace_bytes is {value!r}, {expected}") from error
    if not 0 <= size <= _MOST_BYTES:
        raise ValueError(
            f"requanto.settings.workspace_bytes is {value!r}, {expected}, from 0 (nothing is kept) to 2**63 - 1"
        )
    return size


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> object:
    if not any(value is one for one in allowed):
        raise TypeError(f"requanto.settings.{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


settings = Settings()
