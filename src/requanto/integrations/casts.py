"""``model.to(dtype)``, ``half()`` and ``float()`` of quantized models, which Transformers and Diffusers refuse.

A cast changes the float parameters and the dtype that a quantized weight shows, in which its GEMMs compute. Codes and scales
stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def allow_casts(model_class: Any) -> None:
    """Patches ``to``, ``half`` and ``float`` of the base class of a library's models."""
    for name in ("to", "half", "float"):
        method = getattr(model_class, name)
        if not hasattr(method, "_requanto"):
            setattr(model_class, name, _wrap(method))


def _wrap(original: Callable) -> Callable:
    @functools.wraps(original)
    def cast(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not type(getattr(self, "hf_quantizer", None)).__module__.startswith("requanto."):
            return original(self, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and not (value.is_floating_point and value.itemsize > 1):
                raise ValueError(
                    f"{type(self).__name__} is quantized and cannot be cast to {value}: its float parameters, and the dtype "
                    f"that its GEMMs compute in, need 16 bits or more. To quantize it to another type, load the float "
                    f"checkpoint with another QuantoConfig, or see requanto.requantize."
                )
        with _not_quantized(self):
            return original(self, *args, **kwargs)

    cast._requanto = True  # type: ignore[attr-defined]
    return cast


@contextlib.contextmanager
def _not_quantized(model: nn.Module) -> Iterator[None]:
    """Hides from the library's method that the model is quantized."""
    kept = model.__dict__.pop("is_quantized", None)
    model.__dict__["is_quantized"] = False
    try:
        yield
    finally:
        del model.__dict__["is_quantized"]
        if kept is not None:
            model.__dict__["is_quantized"] = kept
