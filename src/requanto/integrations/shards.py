"""Which part of a quantized weight a rank holds, by the placements of a DTensor, and the whole put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from requanto.tensor.qtensor import QTensor
from requanto.tensor.sharding import cut, join, with_groups


class Span(NamedTuple):
    """A run of indices along one axis."""

    start: int
    end: int


def local_quantized(parameter: Any) -> QTensor | None:
    """The local part of a parameter that is spread over ranks and quantized, or None."""
    local = getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, QTensor) else None


@dataclass(frozen=True)
class Sharding:
    """One axis cut over the ranks of one mesh axis.

    Attributes:
        dim: the axis that is cut.
        blocks: runs that the axis consists of, each cut by itself: 2 for the packed gate and up of fused experts.
        ranks, rank: of the mesh axis, and this one.
        group: its processes.
    """

    dim: int
    blocks: int
    ranks: int
    rank: int
    group: Any

    def spans(self, length: int, rank: int | None = None) -> list[Span]:
        """What a rank holds of an axis, one span a block. The last ranks' may be shorter, or empty."""
        rank = self.rank if rank is None else rank
        found = []
        width = -(-length // self.blocks)
        for block in range(self.blocks):
            first, last = block * width, min((block + 1) * width, length)
            size = -(-(last - first) // self.ranks)
            found.append(Span(min(first + rank * size, last), min(first + (rank + 1) * size, last)))
        return found


def sharding(like: Any, name: str) -> Sharding | None:
    """How a DTensor is cut; None: every rank holds all of it.

    Raises:
        NotImplementedError: it is cut over more than one mesh axis, or holds sums that are still to be made.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    cuts = [(axis, p) for axis, p in enumerate(like.placements) if not isinstance(p, Replicate)]
    if not cuts:
        return None
    if len(cuts) > 1 or not isinstance(cuts[0][1], (Shard, _StridedShard)):
        raise NotImplementedError(
            f"{name}: a quantized weight is cut over one axis of the device mesh, found placements {like.placements}. "
            f"Combine tensor parallelism with replicas, or use FSDP2 alone."
        )
    axis, placement = cuts[0]
    blocks = getattr(placement, "split_factor", 1)
    mesh = like.device_mesh
    return Sharding(
        placement.dim % len(like.shape), blocks, mesh.size(axis), mesh.get_local_rank(axis), mesh.get_group(axis)
    )


def local_part(tensor: QTensor, like: Any, name: str) -> QTensor:
    """The part of a whole weight that belongs to this rank by the placement of ``like``."""
    found = sharding(like, name)
    if found is None:
        return tensor
    spans = found.spans(tensor.shape[found.dim])
    return join([cut(tensor, found.dim, start, end, name) for start, end in spans], found.dim)


def gathered(like: Any, name: str, group_size: int | None) -> QTensor | None:
    """The whole of a weight that is spread over ranks, on the CPU of the first of them; None on the others.

    Args:
        like: the DTensor. All of its ranks must call this together.
        name: for messages.
        group_size: of the whole weight: groups that a cut made smaller are put together again.
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
    # By block: each rank's part of the first, then each rank's part of the second.
    blocks: list[QTensor] = []
    for block in range(found.blocks):
        for rank, piece in enumerate(pieces):
            spans = found.spans(like.shape[found.dim], rank)
            start = sum(span.end - span.start for span in spans[:block])
            length = spans[block].end - spans[block].start
            if length:
                whole = length == piece.shape[found.dim]
                blocks.append(piece if whole else cut(piece, found.dim, start, start + length, name))
    whole = join(blocks, found.dim)
    return whole if whole.group_size == group_size or group_size is None else with_groups(whole, group_size)


def layout(tensor: QTensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each inner tensor."""
    return {part: (inner.shape, inner.dtype) for part, inner in tensor.inner_tensors().items()}


def broadcast_parts(
    source: QTensor | None, stored: dict[str, tuple], rank: int, group: Any, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inner tensors that one rank has, on every rank's CPU. Bytes travel: not every backend knows float8.

    Args:
        source: on ``rank`` its tensor, on ``device``; None on the others.
        stored: its :func:`layout`.
        rank: within the group.
        group: the processes; None: all.
        device: where the backend wants what it sends.
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
