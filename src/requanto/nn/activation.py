"""QActivation: an activation quantized per tensor, on its way between two modules."""

from __future__ import annotations

import torch

from requanto.qtypes import qtype


class QActivation(torch.Tensor):
    """Placeholder; filled in by the next commit of this file."""


def quantize_activation(t: torch.Tensor, qtype: qtype, scale: torch.Tensor) -> QActivation:
    raise NotImplementedError
