"""Checks of a config's values: of a user's keywords, and of what a checkpoint's config.json holds.

Every error names the key, what was found and what is expected. Long values are shortened in messages.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

from requanto.dtypes.qtypes import qfloat8, qint8, qtype, resolve_qtype, short_name

#: value of ``weights``: a type is chosen for each layer within a budget
AUTO = "auto"
#: longest pattern or name; module names are a few dozen characters long
LONGEST = 1000
#: largest group size, block or rank
LARGEST = 2**31 - 1

_DIGEST = re.compile(r"[0-9a-f]{16}")
_RESTORE = "restore the config.json that was saved with the files"


def shown(value: Any) -> str:
    """``repr`` of a value, shortened to what fits a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def type_name(value: Any, where: str) -> str:
    """The short name of a weight type, or ``"auto"``.

    Raises:
        ValueError: an unknown type.
        TypeError: neither a string, a qtype nor a torch dtype.
    """
    if isinstance(value, str) and value == AUTO:
        return AUTO
    return short_name(_resolved(value, where))


def activation_name(value: Any, where: str) -> str | None:
    """The short name of an activation type, or None.

    Raises:
        ValueError, TypeError: it is no type, or not one for activations.
    """
    if value is None or (isinstance(value, str) and value == "none"):
        return None
    kind = _resolved(value, where)
    if kind not in (qint8, qfloat8) and kind.blocks is None:
        raise ValueError(
            f"{where} must be None, 'int8', 'float8', 'nvfp4' or an MX type ('mxfp4', 'mxfp6', 'mxfp8'), found "
            f"{shown(value)}"
        )
    return short_name(kind)


def _resolved(value: Any, where: str) -> qtype:
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"{where}: unknown quantized type {shown(value)}")
    try:
        return resolve_qtype(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error


def flag(value: Any, where: str) -> bool:
    """A bool; None means False.

    Raises:
        ValueError: anything else, such as the text "False".
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"{where} must be True or False, found {shown(value)}")


def symmetric_value(value: Any, where: str) -> bool | None:
    """True, False or None.

    Raises:
        ValueError: anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    raise ValueError(f"{where} must be True, False or None, found {shown(value)}")


def group_size_value(value: Any, where: str) -> int | None:
    """A group size: a positive integer, -1 or None.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and (value == -1 or 1 <= value <= LARGEST):
        return value
    raise ValueError(
        f"{where} must be a positive integer, -1 (one scale a row) or None (default), found {shown(value)}"
    )


def small(value: Any, where: str) -> Any:
    """The value itself, unless it is an integer that no size in a model reaches.

    Raises:
        ValueError: such an integer.
    """
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{where} must be at most {LARGEST}, found {shown(value)}")
    return value


def method_name(value: Any, where: str) -> str | None:
    """A string or None; `requanto.scales.search.check_method` knows which strings are names.

    Raises:
        ValueError: anything else.
    """
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{where} must be the name of a method or None, found {shown(value)}")


def pattern(value: Any, where: str) -> str:
    """A pattern for module names.

    Raises:
        ValueError: not a string, empty, or longer than `LONGEST`.
    """
    if isinstance(value, str) and 0 < len(value) <= LONGEST:
        return value
    raise ValueError(f"{where} must be module names or globs of 1 to {LONGEST} characters, found {shown(value)}")


def patterns(value: Any, where: str) -> list[str] | None:
    """A list of patterns from a pattern, a list, tuple or set of them, or None.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"{where} must be a list of module names or globs, found {shown(value)}")
    return [pattern(entry, where) for entry in value]


def strings(value: Any, where: str) -> list[str] | None:
    """A list of strings, or None.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value):
        return list(value)
    raise ValueError(f"{where} must be a list of strings, found {shown(value)}")


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A dict with patterns as keys; None means {}.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a dict from a pattern to a type, found {shown(value)}")
    return {pattern(key, f"the keys of {where}"): entry for key, entry in value.items()}


def table(value: Any, where: str, what: str) -> dict[str, str]:
    """A table that a checkpoint stores: names to strings; None means {}.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"quantization_config.{where} must be a dict from a name to {what}, found {shown(value)}: {_RESTORE}"
        )
    for name, entry in value.items():
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST or not name.isprintable():
            raise ValueError(
                f"quantization_config.{where} holds {shown(name)}, which is no name of a weight: {_RESTORE}"
            )
        if not isinstance(entry, str) or len(entry) > LONGEST:
            raise ValueError(
                f"quantization_config.{where}[{shown(name)}] must be {what}, found {shown(entry)}: {_RESTORE}"
            )
    return dict(value)


def digests(value: Any) -> dict[str, str]:
    """``quantization_config.digests``.

    Raises:
        ValueError: not a table of digests.
    """
    found = table(value, "digests", "16 hexadecimal digits")
    for name, entry in found.items():
        if not _DIGEST.fullmatch(entry):
            raise ValueError(
                f"quantization_config.digests[{shown(name)}] must be 16 hexadecimal digits, found {shown(entry)}: {_RESTORE}"
            )
    return found


def budget(value: Any) -> dict[str, Any] | None:
    """``quantization_config.budget`` (`requanto.budget.Choice.record`), or None.

    Raises:
        ValueError: it has another form.
    """
    if value is None:
        return None
    form = "the record of a budget, as Requanto wrote it"
    error = ValueError(f"quantization_config.budget must be {form}, found {shown(value)}: {_RESTORE}")
    if not isinstance(value, Mapping):
        raise error
    asked, layers = value.get("asked"), value.get("layers")
    if not isinstance(asked, Mapping) or len(asked) != 1 or not asked.keys() <= {"bits", "max_memory"}:
        raise error
    if value.get("measured") not in ("samples", "weights") or not isinstance(layers, Mapping):
        raise error
    numbers = [value.get("bits"), value.get("gap")]
    for row in layers.values():
        if not isinstance(row, (list, tuple)) or not row:
            raise error
        numbers += row
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) and not math.isnan(n) for n in numbers):
        raise error
    return dict(value)


def text_or_none(value: Any, where: str) -> str | None:
    """A string or None.

    Raises:
        ValueError: anything else.
    """
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"quantization_config.{where} must be a string, found {shown(value)}: {_RESTORE}")
