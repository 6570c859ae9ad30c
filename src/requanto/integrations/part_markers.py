"""What config.json says in the config of each part of a quantized Transformers model: that Requanto is needed.

A class of a part (CLIPTextModel) reads only ``text_config``. Without Requanto it would load random weights, since the
``quantization_config`` is beside it. With Requanto the mark leads to the whole model's (`integrations.transformers_parts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from requanto.config.config import FORMAT, QuantoConfig
from requanto.config.stored_weights import stored_text


def is_mark(stored: Any) -> bool:
    """Whether a quantization_config is only the mark of a part."""
    return isinstance(stored, dict) and stored.get("part") is True


def parts_of(config: Any) -> Iterator[Any]:
    """The configs inside a config of Transformers, and those inside them."""
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            yield part
            yield from parts_of(part)


@contextmanager
def marked(config: Any, quantization: QuantoConfig) -> Iterator[None]:
    """Marks the parts of a config while it is written."""
    text = stored_text(quantization.weights)
    mark = {"quant_method": "quanto", "format": FORMAT, "part": True, "weights": text, "weights_dtype": text}
    parts = [part for part in parts_of(config) if not hasattr(part, "quantization_config")]
    try:
        for part in parts:
            part.quantization_config = dict(mark)
        yield
    finally:
        for part in parts:
            part.__dict__.pop("quantization_config", None)


def unmark(config: Any) -> None:
    """Removes the marks of a config and its parts."""
    for part in (config, *parts_of(config)):
        if is_mark(getattr(part, "quantization_config", None)):
            del part.quantization_config
