"""Whether torch.compile or torch.export is tracing."""

from __future__ import annotations

import torch
from torch._guards import TracingContext


def is_tracing() -> bool:
    """True in code that is being traced, and where operators run on fake tensors on its behalf.

    For the latter, `torch.compiler.is_compiling` says False up to torch 2.11 at least: F.linear of a tensor subclass is one
    node of the graph, and its ``__torch_function__`` runs as ordinary Python while the compiler asks for the result's shape.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None
