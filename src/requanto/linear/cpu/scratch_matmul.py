"""Matmuls with their result in scratch buffers: page faults of a new tensor would cost a tenth of the matmul."""

from __future__ import annotations

import torch

from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.settings import settings

#: Below this size in bytes, torch's allocator reuses memory.
SMALL = 64 * 1024


def matmul(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Computes ``x @ matrix``, in a scratch buffer unless it is small or too large; valid until the next call."""
    shape = (x.shape[0], matrix.shape[1])
    wanted = shape[0] * shape[1] * x.dtype.itemsize
    if wanted < SMALL or wanted > settings.workspace_bytes // 8:
        return torch.mm(x, matrix)
    return torch.mm(x, matrix, out=scratch_buffer(shape, x.dtype, slot=8))


def scaled_into(out: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    """Writes ``values * scale`` into ``out``, computed in float32. scale: float32 ``[columns]``.

    In three passes, because torch takes more than three times as long to multiply a bfloat16 with a float32 tensor.
    """
    if values.dtype == torch.float32:
        torch.mul(values, scale, out=out)
        return
    # A few rows at a time, so that the float32 values stay in the cache.
    step = max(1, min(len(values), settings.workspace_bytes // 16 // max(1, 4 * values.shape[1])))
    for part, into in zip(values.split(step), out.split(step)):
        into.copy_(scratch_buffer(tuple(part.shape), torch.float32, slot=9).copy_(part).mul_(scale))
