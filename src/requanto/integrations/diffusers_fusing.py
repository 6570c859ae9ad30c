"""Fusing LoRA into quantized Diffusers models is all or nothing (`peft_undo`), over one model and over all of a pipeline."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from requanto.integrations.peft_undo import all_or_nothing


def register_models() -> None:
    """Wraps ``fuse_lora`` and ``unfuse_lora`` of models."""
    from diffusers.loaders.peft import PeftAdapterMixin

    _wrap(PeftAdapterMixin, lambda model: [model])


def register_pipelines() -> None:
    """Wraps ``fuse_lora`` and ``unfuse_lora`` of pipelines: if the second model fails, the first is not fused either."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    _wrap(LoraBaseMixin, lambda pipe: [getattr(pipe, name, None) for name in pipe._lora_loadable_modules])


def _wrap(cls: type, models: Callable[[Any], list[Any]]) -> None:
    for name in ("fuse_lora", "unfuse_lora"):
        original = getattr(cls, name)
        if not hasattr(original, "_requanto"):
            setattr(cls, name, _fusing(original, models))


def _fusing(original: Callable, models: Callable[[Any], list[Any]]) -> Callable:
    @functools.wraps(original)
    def fuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for model in models(self):
                if isinstance(model, nn.Module):
                    stack.enter_context(all_or_nothing(model, values=True))
            return original(self, *args, **kwargs)

    fuse._requanto = True  # type: ignore[attr-defined]
    return fuse
