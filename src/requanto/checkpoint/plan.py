"""Reads the plan of a save that was killed. A downloaded directory can hold one too, so it may not lead out of it.

A plan says which files of a scratch folder replace which files of the target (`requanto.checkpoint.commit`).
"""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

from requanto.checkpoint.scratch import NEW, OLD, PLAN, PREFIX

logger = logging.getLogger(__name__)

#: bytes of the largest plan that is read; that of a million files is as large
_LARGEST = 1 << 28


def read_plan(folder: Path, target: Path) -> dict[str, Any] | None:
    """Returns the plan in a scratch folder; None if there is none, or none that may be carried out, which is logged.

    Args:
        folder: a scratch folder in ``target``.
        target: the directory whose files the plan replaces.
    """
    path = folder / PLAN
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:  # the folder of another user, who may just now be saving
        logger.info("%s cannot be read (%s): another user's save, which is left alone", path, error)
        return None
    try:
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
            raise ValueError("it is not a regular file, or larger than any plan")
        _check_owner(folder, target)
        plan = json.loads(path.read_text(encoding="utf-8"))
        _check(plan)
        for name in (*plan["install"], *plan["remove"]):
            for place in (folder / NEW, folder / OLD, target):
                _check_inside(place, name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is damaged (%s) and not used", path, error)
        return None
    return plan


def _check_owner(folder: Path, target: Path) -> None:
    """A plan that somebody else put into the directory is not carried out with this user's rights."""
    if not hasattr(os, "geteuid"):  # Windows
        return
    owner = folder.lstat().st_uid
    if owner not in (os.geteuid(), target.stat().st_uid):
        raise ValueError(f"its folder belongs to the user {owner}, and neither to this one nor to the directory's")


def _check(plan: Any) -> None:
    """Raises ValueError, KeyError, TypeError or AttributeError if this is no plan."""
    for key in ("install", "remove"):
        if not isinstance(plan[key], list):
            raise ValueError(f"{key} is no list")
    names = [*plan["install"], *plan["remove"]]
    for name in names:
        parts = name.split("/")
        if os.sep != "/":
            parts = [part for piece in parts for part in piece.split(os.sep)]
        if os.path.isabs(name) or "\0" in name or any(p in ("", ".", "..") or p.startswith(PREFIX) for p in parts):
            raise ValueError(f"{name[:200]!r} is no name of a file in the directory")
    for stamps, wanted in ((plan["old"], names), (plan["new"], plan["install"])):
        for name in wanted:
            stamp = stamps[name]
            if stamp is not None and not (isinstance(stamp, list) and all(type(v) is int for v in stamp)):
                raise ValueError(f"the state of {name[:200]!r} is not a size and a time")


def _check_inside(place: Path, name: str) -> None:
    """Raises ValueError if a folder on the way to a file is a link that leads out of the directory."""
    if place.name in (NEW, OLD) and place.is_symlink():
        raise ValueError(f"{place.name} is a link")
    parent = (place / name).parent
    if not Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(place)):
        raise ValueError(f"{name[:200]!r} leads out of the directory")
