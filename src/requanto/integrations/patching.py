"""Replacing a library's function under every name it was imported by."""

from __future__ import annotations

import sys
from collections.abc import Callable


def replace_everywhere(original: Callable, make: Callable[[Callable], Callable]) -> None:
    """Sets ``make(original)`` wherever a module of the original's own package, or of its peers, holds the original.

    Libraries import their helpers by name, so one assignment would leave the others. Doing it twice changes nothing.
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
