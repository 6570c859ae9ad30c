"""Who opens a checkpoint that another library quantized: that library, or Requanto."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from requanto.checkpoint.foreign.readers import OUT_OF_REACH, READERS
from requanto.checkpoint.format import CheckpointError
from requanto.config.config import QuantoConfig
from requanto.runtime.settings import settings

logger = logging.getLogger(__name__)


def method_of(stored: Any) -> str | None:
    """The ``quant_method`` of a ``quantization_config``, a dict or an object of a library; None if it has none."""
    found = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    return None if found is None else str(getattr(found, "value", found))


def as_dict(stored: Any) -> dict[str, Any]:
    """A ``quantization_config`` as plain values."""
    found = dict(stored) if isinstance(stored, Mapping) else dict(stored.to_dict())
    return {**found, "quant_method": method_of(stored)}


def is_known(method: str | None) -> bool:
    """Whether a reader knows the ``quant_method``, or knows why it cannot be read."""
    return method in READERS or method in OUT_OF_REACH


def takes_over(method: str, asked: Any, library: Callable[[], str | None]) -> bool:
    """Whether Requanto opens a checkpoint.

    Args:
        method: its ``quant_method``, one that a reader knows.
        asked: the caller's ``quantization_config``, or None.
        library: called if nobody decided; returns why the format's own library does not keep the weights quantized on this
            device, or None if it does.
    """
    if asked is not None and method_of(asked) != "quanto":
        return False
    if asked is not None or settings.foreign == "always":
        return True
    if settings.foreign == "never":
        return False
    reason = library()
    if reason is None or method in OUT_OF_REACH:
        return False
    logger.warning(
        "this checkpoint was quantized by another library (%s), which does not open it here: %s. Requanto opens it, with "
        "the same weights. (requanto.settings.foreign = 'never' turns that off)",
        method,
        reason.rstrip(". "),
    )
    return True


def refuse_pickles(files: Iterable[str | os.PathLike], method: Any) -> None:
    """Raises for files that are no safetensors files.

    Raises:
        CheckpointError: one is a pickle.
    """
    pickle = next((str(file) for file in files if not str(file).endswith(".safetensors")), None)
    if pickle is not None:
        raise CheckpointError(
            f"{os.path.basename(pickle)} is a pickle, which may run code when it is opened, and Requanto reads quantized "
            f"weights of other libraries from safetensors files only. Load it with the library that saved it ({method}) "
            f"and save it again with safe_serialization=True"
        )


def chosen(asked: QuantoConfig) -> list[str]:
    """The options of a config that are not the usual ones."""
    plain = QuantoConfig()
    return [key for key in plain.parameters() if getattr(asked, key) != getattr(plain, key) and key != "weights_dtype"]


def warn_of_choices(asked: Any) -> None:
    """Says which options of the caller's config have no effect on weights that are quantized already."""
    names = chosen(asked) if isinstance(asked, QuantoConfig) else []
    if names:
        logger.warning(
            "the checkpoint is quantized already and its weights stay as they are: %s of quantization_config is not used. "
            "To quantize it otherwise: model.dequantize(), then requanto.quantize(model, ...).",
            ", ".join(f"{name}={getattr(asked, name)!r}" for name in names),
        )
