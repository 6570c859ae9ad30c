"""The current device, where a question is about the device of a tensor."""

from __future__ import annotations

import contextlib

import torch


def made_current(kind: str, index: int | None) -> contextlib.AbstractContextManager:
    """A context in which that GPU is the current one; one that does nothing if it is already, or no GPU is in use.

    In a model on several GPUs most layers run while the first is the current device, and two GPUs may differ in what they
    compute.
    """
    if kind not in ("cuda", "xpu") or index is None:
        return contextlib.nullcontext()
    module = getattr(torch, kind)
    if not module.is_initialized() or module.current_device() == index:
        return contextlib.nullcontext()
    return module.device(index)
