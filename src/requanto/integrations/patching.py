"""Replacing a library's function in every module that has imported it."""

from __future__ import annotations

import sys
from collections.abc import Callable


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
