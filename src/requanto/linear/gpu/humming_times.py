"""Measured times of humming beside the Triton kernels, by which `requanto.linear.gpu.humming` is chosen.

A table is JSON, ``{"format": 1, "entries": {key: {"rows": {number of rows: [us of ours, us of humming]}, versions}}}``, with
a key for each GPU, type of weight and shape (`key`). One ships with the package (empty: nothing was measured yet), and
``requanto tune --humming`` writes the user's.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from requanto.dtypes.qtypes import qtype

logger = logging.getLogger(__name__)

#: humming is chosen where no measured number of rows is slower than ours by this factor, and one is faster by the other.
NOT_SLOWER, FASTER = 1.05, 0.9
#: Number of the format of a table.
FORMAT = 1
SHIPPED = Path(__file__).with_name("humming.json")


def key(gpu: str, kind: qtype, group: int | None, affine: bool, dtype: torch.dtype, rows: int, length: int) -> str:
    """Name of a table's entry: what was measured, e.g. ``"NVIDIA H200/qint4/64/affine/bfloat16/4096x14336"``."""
    form = "affine" if affine else "symmetric"
    group = 0 if group in (None, length) else group
    return f"{gpu}/{kind.name}/{group}/{form}/{str(dtype).removeprefix('torch.')}/{rows}x{length}"


def is_faster(entry: dict[str, Any] | None) -> bool:
    """True if an entry says that humming is faster than the Triton kernels for some numbers of rows, and slower for none."""
    ratios = [theirs / ours for ours, theirs in (entry or {}).get("rows", {}).values()]
    return bool(ratios) and max(ratios) <= NOT_SLOWER and min(ratios) <= FASTER


def table_path() -> Path:
    """The user's table: ``humming.json`` beside the tuned tiles."""
    root = os.environ.get("REQUANTO_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "requanto") / "humming.json"


def measured() -> dict[str, Any]:
    """The shipped measurements and the user's, which come first; a damaged table is named once and not used."""
    return _measured(os.environ.get("REQUANTO_CACHE"))


@functools.lru_cache(maxsize=8)
def _measured(root: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in (SHIPPED, table_path()):
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
            for entry in entries.values():
                is_faster(entry)
            found |= entries
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            logger.warning(
                "%s is no table of humming's times (%s: %s) and not used; delete it, or measure again with requanto tune "
                "--humming", path, type(error).__name__, error
            )  # fmt: skip
    return found


def store(entries: dict[str, Any]) -> Path:
    """Adds measurements to the user's table."""
    from requanto_kernels import _table

    path = table_path()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of humming's times ({error}); delete it and measure again") from error
    _table.write(path, {**known, **entries}, FORMAT)
    _measured.cache_clear()
    return path
