"""Sharding quantized weights by the placements of a DTensor, and gathering them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from requanto.tensor.qtensor import QTensor
from requanto.tensor.sharding import join_weights, slice_weight, with_groups


class Span(NamedTuple):
    """A range of indices along one axis."""

    start: int
    end: int


def local_quantized(parameter: Any) -> QTensor | None:
    """Returns this rank's shard of a quantized DTensor; None for any other parameter."""
    local = getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, QTensor) else None


@dataclass(frozen=True)
class Sharding:
    """One axis of a weight sharded over one axis of the device mesh.

    Attributes:
        dim: the axis that is sharded.
        blocks: number of equal blocks of the axis that are sharded separately: 2 for fused gate and up projections.
        ranks: size of the mesh axis.
        rank: this process's rank along it.
        group: process group of the mesh axis.
    """

    dim: int
    blocks: int
    ranks: int
    rank: int
    group: Any

    def spans(self, length: int, rank: int | None = None) -> list[Span]:
        """Returns the indices that a rank holds, one span per block; the last ranks' spans may be shorter or empty."""
        rank = self.rank if rank is None else rank
        found = []
        width = -(-length // self.blocks)
        for block in range(self.blocks):
            first, last = block * width, min((block + 1) * width, length)
            size = -(-(last - first) // self.ranks)
            found.append(Span(min(first + rank * size, last), min(first + (rank + 1) * size, last)))
        return found


def sharding(like: Any, name: str) -> Sharding | None:
    """Returns how a DTensor is sharded; None if it is replicated.

    Raises:
        NotImplementedError: it is sharded over more than one mesh axis, or has a partial placement.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    sharded = [(axis, p) for axis, p in enumerate(like.placements) if not isinstance(p, Replicate)]
    if not sharded:
        return None
    if len(sharded) > 1 or not isinstance(sharded[0][1], (Shard, _StridedShard)):
        raise NotImplementedError(
            f"{name}: a quantized weight can be sharded over one axis of the device mesh only, found placements "
            f"{like.placements}. Combine tensor parallelism with replication, or use FSDP2 alone."
        )
    axis, placement = sharded[0]
    blocks = getattr(placement, "split_factor", 1)
    mesh = like.device_mesh
    return Sharding(
        placement.dim % len(like.shape), blocks, mesh.size(axis), mesh.get_local_rank(axis), mesh.get_group(axis)
    )


def local_part(tensor: QTensor, like: Any, name: str) -> QTensor:
    """Returns this rank's shard of a full weight, by the placements of the DTensor ``like``."""
    found = sharding(like, name)
    if found is None:
        return tensor
    spans = found.spans(tensor.shape[found.dim])
    return join_weights([slice_weight(tensor, found.dim, start, end, name) for start, end in spans], found.dim)


def gather_weight(like: Any, name: str, group_size: int | None) -> QTensor | None:
    """Gathers a sharded weight to the CPU of rank 0; returns None on other ranks.

    Args:
        like: the DTensor. All of its ranks must call this together.
        name: for messages.
        group_size: of the full weight; groups that were split between ranks are joined again.
    """
    local, found = like._local_tensor, sharding(like, name)
    if found is None:
        return local.detach().to("cpu") if dist.get_rank() == 0 else None
    layouts: list[Any] = [None] * found.ranks
    dist.all_gather_object(layouts, (local.shape, local.group_size, layout(local)), group=found.group)
    pieces: list[QTensor] = []
    for rank, (shape, group, stored) in enumerate(layouts):
        parts = broadcast_parts(local if rank == found.rank else None, stored, rank, found.group, local.device)
        if found.rank == 0:
            pieces.append(local.with_inner(parts, shape=shape, group_size=group))
    if found.rank != 0:
        return None
    # In the order of the axis: all ranks' parts of the first block, then of the second.
    blocks: list[QTensor] = []
    for block in range(found.blocks):
        for rank, piece in enumerate(pieces):
            spans = found.spans(like.shape[found.dim], rank)
            start = sum(span.end - span.start for span in spans[:block])
            length = spans[block].end - spans[block].start
            if length:
                whole = length == piece.shape[found.dim]
                blocks.append(piece if whole else slice_weight(piece, found.dim, start, start + length, name))
    whole = join_weights(blocks, found.dim)
    return whole if whole.group_size == group_size or group_size is None else with_groups(whole, group_size)


def layout(tensor: QTensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Returns shape and dtype of each inner tensor."""
    return {part: (inner.shape, inner.dtype) for part, inner in tensor.inner_tensors().items()}


def broadcast_parts(
    source: QTensor | None, stored: dict[str, tuple], rank: int, group: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """Broadcasts the inner tensors of a weight; returns them on the CPU. Sent as uint8: not every backend has float8.

    Args:
        source: the weight, on ``device``, on rank ``rank``; None on other ranks.
        stored: its :func:`layout`.
        rank: the sending rank within the group.
        group: the process group; None: all ranks.
        device: device that the backend sends from.
    """
    parts = {}
    for name, (shape, dtype) in stored.items():
        if source is not None:
            sent = source.inner_tensors()[name].contiguous().view(-1).view(torch.uint8)
        else:
            sent = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8, device=device)
        dist.broadcast(sent, group=group, group_src=rank)
        parts[name] = sent.view(dtype).view(shape).to("cpu")
    return parts
