"""The texts of the yardsticks, by name.

    eval, calibration   ship with the package; defaults may be chosen on them
    numpy               docstrings of NumPy's functions
    aptitude            the user's manual of aptitude, a Debian package

`numpy` and `aptitude` were never used to choose anything in this package, and are not in the training text of `causal`.
"""

from __future__ import annotations

import inspect

from requanto.data import calibration_text, eval_text
from yardsticks.debian import manual_text


def numpy_text() -> str:
    """Docstrings of NumPy's functions up to their examples: every eighth, by name. English technical prose."""
    import numpy

    found: dict[str, str] = {}
    for name in sorted(numpy.__all__):
        text = (inspect.getdoc(getattr(numpy, name)) or "").split("\nExamples\n---")[0].strip()
        if len(text) > 600 and text not in found.values():
            found[name] = text
    return "\n\n".join(found[name] for name in list(found)[::8])


def aptitude_text() -> str:
    """Paragraphs of the manual: its menus, tables and short items are left out."""
    return "\n\n".join(text for text in manual_text().split("\n\n") if len(text) > 120)


TEXTS = {"eval": eval_text, "calibration": calibration_text, "numpy": numpy_text, "aptitude": aptitude_text}
