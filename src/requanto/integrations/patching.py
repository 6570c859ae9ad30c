"""Replacing a library's function in every module that has imported it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from requanto.checkpoint.save_id import stamp


def replace_everywhere(original: Callable, make: Callable[[Callable], Callable]) -> None:
    """Replaces ``original`` by ``make(original)`` in all imported modules of accelerate, Diffusers, PEFT, Transformers, TRL.

    These libraries import functions by name, so replacing one module attribute is not enough. A second call does nothing.
    """
    if hasattr(original, "_requanto"):
        return
    new = make(original)
    new._requanto = True  # type: ignore[attr-defined]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("accelerate", "diffusers", "peft", "transformers", "trl") and (
            module.__dict__.get(original.__name__) is original
        ):
            setattr(module, original.__name__, new)


def stamped_before_upload(original: Callable) -> Callable:
    """Returns a model's upload method that first fills in the save id: ``push_to_hub=True`` uploads from within a save."""

    @functools.wraps(original)
    def upload(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        stamp(working_dir)
        return original(self, working_dir, *args, **kwargs)

    return upload
