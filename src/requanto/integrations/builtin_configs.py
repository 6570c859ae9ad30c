"""Keywords of the libraries' own ``QuantoConfig``.

Transformers' takes ``weights``, Diffusers' ``weights_dtype``, and both drop every keyword that they do not know:
``diffusers.QuantoConfig(weights="float8")``, as its page writes it, is int8. Here each keyword of `requanto.QuantoConfig`
means what it says, and any other is refused.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from requanto.config.config import QuantoConfig, refuse_unknown

_NAMES = ("weights", "weights_dtype")


def register_transformers() -> None:
    """Patches ``transformers.QuantoConfig``."""
    _take_all_keywords("transformers.utils.quantization_config")


def register_diffusers() -> None:
    """Patches ``diffusers.QuantoConfig``."""
    _take_all_keywords("diffusers.quantizers.quantization_config")


def _take_all_keywords(module: str) -> None:
    found = getattr(importlib.import_module(module), "QuantoConfig", None)  # Diffusers is to drop its class
    if found is not None and not hasattr(found.__init__, "_requanto"):
        found.__init__ = _wrap_init(found.__init__, f"{module.partition('.')[0]}.QuantoConfig")


def _wrap_init(original: Any, where: str) -> Any:
    own = tuple(inspect.signature(original).parameters)[1:]
    name = next(name for name in _NAMES if name in own)
    other = next(key for key in _NAMES if key != name)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        more = {key: kwargs.pop(key) for key in list(kwargs) if key not in own}
        refuse_unknown(
            {key: more[key] for key in more if key not in (*QuantoConfig.parameters(), "quant_method")},
            QuantoConfig.parameters(),
            where,
        )
        more.pop("quant_method", None)
        value = more.pop(other, None)
        if value is not None:
            given = args[0] if args else kwargs.setdefault(name, value)
            if given != value:
                raise ValueError(f"{where}: {name}={given!r} and {other}={value!r} differ; give one of them")
        original(self, *args, **kwargs)
        QuantoConfig(weights=getattr(self, name), **more)  # raises for a value out of range
        for key, entry in more.items():
            setattr(self, key, entry)

    __init__._requanto = True  # type: ignore[attr-defined]
    return __init__
