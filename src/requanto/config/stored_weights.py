"""How ``weights`` is written into config.json: so that a library without Requanto stops and says what is needed.

Transformers and Diffusers know the ``quant_method`` "quanto" themselves, and their own QuantoConfig accepts four types. Any
other text is an error that shows it, whether optimum-quanto is installed or not. (They only warn about an unknown
``quant_method``, and then load random weights.)
"""

from __future__ import annotations

import re

_NOTE = "(stored by Requanto; to load it: pip install requanto, import requanto)"
_STORED = re.compile(r"(?P<type>\S+) \(stored by Requanto\b[^()]*\)")


def stored_text(weights: str) -> str:
    """Returns the text for config.json: "int8" -> "int8 (stored by Requanto: ...)"."""
    return f"{weights} {_NOTE}"


def is_stored(weights: object) -> bool:
    """Whether a value is a text of :func:`stored_text`."""
    return isinstance(weights, str) and _STORED.fullmatch(weights) is not None


def plain_type(weights: object) -> object:
    """Returns the type in a text of :func:`stored_text`, of this or a later version; any other value unchanged."""
    found = _STORED.fullmatch(weights) if isinstance(weights, str) else None
    return found["type"] if found else weights
