"""Products and their scaling in this thread's buffers: fresh pages for every result would cost a tenth of the product."""

from __future__ import annotations

import torch

from requanto.runtime.buffers import workspace
from requanto.runtime.settings import settings

#: Bytes below which the allocator reuses memory by itself.
SMALL = 64 * 1024


def matmul(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``x @ matrix``, in this thread's buffer where that is of use and bounded; valid until the next call."""
    shape = (x.shape[0], matrix.shape[1])
    wanted = shape[0] * shape[1] * x.dtype.itemsize
    if wanted < SMALL or wanted > settings.workspace_bytes // 8:
        return torch.mm(x, matrix)
    return torch.mm(x, matrix, out=workspace(shape, x.dtype, slot=8))


def scaled_into(out: torch.Tensor, product: torch.Tensor, scale: torch.Tensor) -> None:
    """``out = product * scale``, multiplied in float32. scale: float32 ``[columns]``.

    In three passes: torch takes more than three times as long for a bfloat16 tensor times a float32 one.
    """
    if product.dtype == torch.float32:
        torch.mul(product, scale, out=out)
        return
    # By rows, so that the float32 numbers stay in the cache.
    step = max(1, min(len(product), settings.workspace_bytes // 16 // max(1, 4 * product.shape[1])))
    for part, into in zip(product.split(step), out.split(step)):
        into.copy_(workspace(tuple(part.shape), torch.float32, slot=9).copy_(part).mul_(scale))
