"""Quantized weights in distributed training: FSDP2, DTensor's collectives, DDP.

FSDP2 shards a weight along its first axis. For a quantized weight that gives whole rows (or experts) with their scales, so
a shard is a QTensor. The all-gather before a forward sends the codes, not float weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import return_and_correct_aliasing

from requanto.tensor.aten import aten, map_parts
from requanto.tensor.dispatch import implements_aten
from requanto.tensor.qtensor import QTensor

# ---------------------------------------------------------------------- FSDP2


@implements_aten(aten.new_zeros.default, aten.new_empty.default)
def _new_zeros(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """A weight of the same spec with another number of rows (or experts), for a padded shard."""
    tensor, size = args[0], torch.Size(args[1])
    dtype = kwargs.pop("dtype", None) or tensor.dtype
    if size[1:] != tensor.shape[1:] or (tensor.transposed and tensor.dim() == 2):
        raise NotImplementedError(
            f"{func} of a quantized weight of shape {tuple(tensor.shape)}: only the number of rows (the first axis) can "
            f"differ, found {tuple(size)}; call .dequantize() first"
        )
    kwargs = {key: value for key, value in kwargs.items() if key in ("device", "pin_memory")}

    def room(inner: torch.Tensor) -> torch.Tensor:
        return func(inner, [size[0], *inner.shape[1:]], **kwargs)

    # Parts that do not grow with the rows are those of the weight: FSDP2 copies shards of it into slices of this one.
    shared = tensor.shared_along(0)
    device = kwargs.get("device", tensor.device)
    whole = {n: t.to(device, copy=True) for n, t in tensor.inner_tensors().items() if n in shared}
    grown = {n: room(t) for n, t in tensor.inner_tensors().items() if n not in shared}
    return tensor.with_inner(whole | grown, shape=size, dtype=dtype)


@implements_aten(aten.as_strided.default)
def _as_strided(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if torch.Size(size) != tensor.shape or tuple(stride) != tensor.stride() or offset not in (None, 0):
        raise NotImplementedError(f"{func} of a quantized weight: only its own size and stride are possible")
    return return_and_correct_aliasing(func, args, kwargs, tensor.view_of_storage())


def fsdp_pre_all_gather(
    self: QTensor, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
) -> tuple[tuple[torch.Tensor, ...], tuple]:
    """FSDP2's hook: the tensors of a shard to all-gather, and metadata for `fsdp_post_all_gather`.

    Raises:
        NotImplementedError: the number of rows is not divisible by the number of processes.
        ValueError: the processes hold differently quantized weights (checked once, before the first forward).
    """
    if outer_size[0] % mesh.size():
        raise NotImplementedError(
            f"FSDP2: a quantized weight of {outer_size[0]} rows cannot be sharded evenly over {mesh.size()} processes. "
            f"Exclude that layer with fully_shard(..., ignored_params={{weight}}) or use a number that divides its rows."
        )
    if mesh.size() > 1 and not self.__dict__.get("_same_everywhere"):
        same_everywhere(mesh.get_group(), [self._spec.text(self.rank)], "FSDP2")
        self.__dict__["_same_everywhere"] = True
    inner = self.inner_tensors()
    shared = {name: inner.pop(name) for name in self.shared_along(0) if name in inner}
    return tuple(part.contiguous() for part in inner.values()), (tuple(inner), shared, outer_size)


def fsdp_post_all_gather(
    self: QTensor, outputs: tuple[torch.Tensor, ...], metadata: tuple, param_dtype: torch.dtype, *, out: Any = None
) -> Any:
    """FSDP2's hook: the whole quantized weight from the gathered tensors."""
    names, shared, size = metadata
    parts = dict(zip(names, outputs, strict=False))
    # With a single process torch passes only the first tensor; the shard is the whole weight then.
    own = self.inner_tensors()
    parts |= {name: own[name] for name in names[len(outputs) :] if self.shape == size}
    parts |= shared
    if out is not None:  # the buffers of the first all-gather, filled again
        local = getattr(out, "_local_tensor", out)
        local.set_inner(parts)
        return None
    return self.with_inner(parts, shape=size, dtype=param_dtype), outputs


QTensor.fsdp_pre_all_gather = fsdp_pre_all_gather  # type: ignore[attr-defined]
QTensor.fsdp_post_all_gather = fsdp_post_all_gather  # type: ignore[attr-defined]


# ---------------------------------------------------------------------- collectives


def _collectives() -> None:
    import torch.distributed._functional_collectives  # defines operators among these

    c10d = torch.ops._c10d_functional

    @implements_aten(c10d.all_gather_into_tensor.default)
    def _all_gather(func: Any, args: tuple, kwargs: dict) -> QTensor:
        """The rows of all processes, concatenated."""
        tensor, world = args[0], args[1]
        if tensor.transposed and tensor.dim() == 2:
            raise NotImplementedError("all_gather of a quantized weight sharded along its reduction axis")
        shape = (tensor.shape[0] * world, *tensor.shape[1:])
        return map_parts(
            tensor,
            lambda part: func(part.contiguous(), *args[1:], **kwargs),
            keep=tensor.shared_along(0),
            shape=shape,
        )

    # Torch wraps asynchronous results in a tensor subclass; for a QTensor the wrapper waits at once instead.
    wrapping = [getattr(c10d, name).default for name in ("_wrap_tensor_autograd",) if hasattr(c10d, name)]

    @implements_aten(c10d.wait_tensor.default, *wrapping)
    def _wait(func: Any, args: tuple, kwargs: dict) -> QTensor:
        return map_parts(args[0], c10d.wait_tensor.default)

    @implements_aten(c10d.broadcast.default)
    def _broadcast(func: Any, args: tuple, kwargs: dict) -> QTensor:
        return map_parts(args[0], lambda part: func(part, *args[1:], **kwargs))

    c10d_ops = torch.ops.c10d

    @implements_aten(c10d_ops.broadcast_.default)
    def _broadcast_(func: Any, args: tuple, kwargs: dict) -> Any:
        tensors, *rest = args
        work = None
        for tensor in tensors:
            quantized = isinstance(tensor, QTensor)
            parts = tensor.inner_tensors() if quantized else {"": tensor}
            for part in parts.values():
                if work is not None:  # the caller waits for the last one only
                    torch._C._distributed_c10d.Work.unbox(work).wait()
                _, work = func([part], *rest, **kwargs)
            if quantized:
                torch._C._distributed_c10d.Work.unbox(work).wait()
                after_receive(tensor, parts)
        return tensors, work


def after_receive(tensor: QTensor, parts: dict[str, torch.Tensor]) -> None:
    """Updates a weight after a collective wrote into ``parts``, its stored tensors."""
    if tensor.is_packed:  # the received codes are in an unpacked copy
        tensor._storage.write(tensor._spec, parts)
    else:
        tensor._storage.changed()


# ---------------------------------------------------------------------- DDP


def _sync_inner_tensors() -> None:
    """Patches DDP's initial broadcast of flattened parameters to send the stored tensors of each QTensor."""
    from torch.distributed import utils

    original = utils._sync_params_and_buffers

    def _sync_params_and_buffers(process_group: Any, module_states: list, size: int, src: int) -> None:
        quantized = [(state, state.inner_tensors()) for state in module_states if isinstance(state, QTensor)]
        plain = [state for state in module_states if not isinstance(state, QTensor)]
        if quantized:
            weights = [weight._spec.text(weight.rank) for weight, _ in quantized]
            same_everywhere(process_group, weights, "DistributedDataParallel")
        original(process_group, plain + [part for _, parts in quantized for part in parts.values()], size, src)
        for weight, parts in quantized:
            after_receive(weight, parts)

    utils._sync_params_and_buffers = _sync_params_and_buffers


def same_everywhere(group: Any, mine: list[str], what: str) -> None:
    """Checks that all ranks have the same descriptions of quantized weights. Every rank of the group must call it.

    Args:
        mine: this rank's descriptions.
        what: name of the caller for the message.

    Raises:
        ValueError: the descriptions differ; raised on every rank.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            pairs = zip(theirs, found[0])
            one, two = next((pair for pair in pairs if pair[0] != pair[1]), (len(theirs), len(found[0])))
            raise ValueError(
                f"rank {rank} and rank 0 hold differently quantized weights ({what}): {one} and {two}. Give every rank the "
                f"same QuantoConfig and checkpoint."
            )


if dist.is_available():
    _collectives()
    _sync_inner_tensors()
