"""``generate(cache_implementation="quantized")``: Transformers' QuantizedCache with Requanto's layers."""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import cache_utils

logger = logging.getLogger(__name__)

#: Options of Transformers' QuantizedCache that say how scales are grouped. Keys have them per channel, values per token.
_AXES = ("axis_key", "axis_value")


def register() -> None:
    """Gives Transformers' QuantizedCache the backend "requanto", and Requanto's layers for "quanto".

    "hqq" has them too where the package hqq is not installed. "fp8" is Transformers' own.
    """
    theirs = cache_utils.QuantizedCache
    if hasattr(theirs.__init__, "_requanto"):
        return
    original = theirs.__init__

    def make() -> Any:
        # Not before: these modules import Transformers' caches, and this one is imported while those are.
        from requanto.integrations.transformers_cache import QuantizedCache

        return QuantizedCache

    @functools.wraps(original)
    def init(self: Any, backend: str, config: Any, *args: Any, **options: Any) -> None:
        if backend == "requanto":
            ours = make()(config, *args, **options)
        elif backend == "quanto" or (backend == "hqq" and not cache_utils.is_hqq_available()):
            if backend == "hqq":
                logger.warning("the package hqq is not installed: the cache is quantized by Requanto")
            names = ("nbits", *_AXES, "q_group_size", "residual_length")
            ours = make()(config, **_translated(dict(zip(names, args)) | options))
        else:
            return original(self, backend, config, *args, **options)
        cache_utils.Cache.__init__(self, layers=ours.layers)
        self.settings = ours.settings

    init._requanto = True  # type: ignore[attr-defined]
    theirs.__init__ = init


def _translated(options: dict[str, Any]) -> dict[str, Any]:
    """Requanto's options for those of Transformers' QuantizedCache."""
    left = dict(options)
    bits = left.pop("nbits", None)
    group = left.pop("q_group_size", None)
    residual = left.pop("residual_length", None)
    axes = {name: left.pop(name) for name in _AXES if left.get(name) is not None}
    bits, group, residual = (default if value is None else value for value, default in
                             ((bits, 4), (group, 64), (residual, 128)))  # fmt: skip
    if bits not in (2, 4, 8):
        raise ValueError(f"nbits of a quantized cache can be 2, 4 or 8, found {bits!r}")
    if axes:
        logger.info("%s are not used: keys have a scale per channel, values one per token", " and ".join(axes))
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"q_group_size must be a positive number of channels, found {group!r}")
    if isinstance(residual, bool) or not isinstance(residual, int) or residual < 0:
        raise ValueError(f"residual_length must be a number of tokens, 0 or more, found {residual!r}")
    # At most residual_length tokens stay float, where it is larger than a block.
    kind = f"int{bits}"
    return {"keys": kind, "values": kind, "window": max(0, residual - group), "block": group, "group": group} | left
