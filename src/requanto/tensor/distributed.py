"""Quantized weights spread over processes: FSDP2, DTensor's collectives, DDP.

FSDP2 cuts a weight along its first axis, which for a quantized weight means whole rows (or experts) with their scales, so a
shard is a QTensor itself. Before a forward the codes, not float weights, travel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import return_and_correct_aliasing

from requanto.tensor.aten import aten, each
from requanto.tensor.dispatch import implements_aten
from requanto.tensor.qtensor import QTensor

# ---------------------------------------------------------------------- FSDP2


@implements_aten(aten.new_zeros.default, aten.new_empty.default)
def _new_zeros(func: Any, args: tuple, kwargs: dict) -> QTensor:
    """The same kind of weight with another number of rows (or experts): room for a padded shard."""
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

    shared = tensor.shared_along(0)
    whole = {n: func(t, list(t.shape), **kwargs) for n, t in tensor.inner_tensors().items() if n in shared}
    grown = {n: room(t) for n, t in tensor.inner_tensors().items() if n not in shared}
    return tensor.with_inner(whole | grown, shape=size, dtype=dtype)


@implements_aten(aten.as_strided.default)
def _as_strided(func: Any, args: tuple, kwargs: dict) -> QTensor:
    tensor, size, stride = args[:3]
    offset = args[3] if len(args) > 3 else kwargs.get("storage_offset")
    if torch.Size(size) != tensor.shape or tuple(stride) != tensor.stride() or offset not in (None, 0):
        raise NotImplementedError(f"{func} of a quantized weight: only its own size and stride are possible")
    return return_and_correct_aliasing(func, args, kwargs, tensor.over_same_storage())


def fsdp_pre_all_gather(
    self: QTensor, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
) -> tuple[tuple[torch.Tensor, ...], tuple]:
    """FSDP2 asks a shard what to gather: its stored tensors.

    Raises:
        NotImplementedError: the rows do not divide by the number of processes.
        ValueError: the processes hold differently quantized weights (looked at once, before the first forward).
    """
    if outer_size[0] % mesh.size():
        raise NotImplementedError(
            f"FSDP2: a quantized weight of {outer_size[0]} rows cannot be spread evenly over {mesh.size()} processes. Keep "
            f"that layer out with fully_shard(..., ignored_params={{weight}}) or choose a number that divides its rows."
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
    """FSDP2 hands over what was gathered: the whole weight, on codes."""
    names, shared, size = metadata
    parts = dict(zip(names, outputs, strict=False))
    # With a single process torch hands over the first tensor only; the shard is the whole weight then.
    own = self.inner_tensors()
    parts |= {name: own[name] for name in names[len(outputs) :] if self.shape == size}
    parts |= shared
    if out is not None:  # the same memory as the first time, filled again
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
        """Rows of all processes, one after the other."""
        tensor, world = args[0], args[1]
        if tensor.transposed and tensor.dim() == 2:
            raise NotImplementedError("all_gather of a quantized weight cut along its reduction axis")
        shape = (tensor.shape[0] * world, *tensor.shape[1:])
        return each(
            tensor,
            lambda part: func(part.contiguous(), *args[1:], **kwargs),
            keep=tensor.shared_along(0),
            shape=shape,
        )

    # Asynchronous results come wrapped in a tensor of their own; a QTensor is waited for at once instead.
    wrapping = [getattr(c10d, name).default for name in ("_wrap_tensor_autograd",) if hasattr(c10d, name)]

    @implements_aten(c10d.wait_tensor.default, *wrapping)
    def _wait(func: Any, args: tuple, kwargs: dict) -> QTensor:
        return each(args[0], c10d.wait_tensor.default)

    @implements_aten(c10d.broadcast.default)
    def _broadcast(func: Any, args: tuple, kwargs: dict) -> QTensor:
        return each(args[0], lambda part: func(part, *args[1:], **kwargs))

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
                received(tensor, parts)
        return tensors, work


def received(tensor: QTensor, parts: dict[str, torch.Tensor]) -> None:
    """Other processes have written into ``parts``, the stored tensors: what was derived from them is dropped."""
    if tensor.is_packed:  # the codes were a copy
        tensor._storage.write(tensor._spec, parts)
    else:
        tensor._storage.changed()


# ---------------------------------------------------------------------- DDP


def _sync_inner_tensors() -> None:
    """DDP sends all parameters of rank 0 to the others when it starts, flattened: of a QTensor the stored tensors."""
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
            received(weight, parts)

    utils._sync_params_and_buffers = _sync_params_and_buffers


def same_everywhere(group: Any, mine: list[str], what: str) -> None:
    """Refuses ranks whose weights were, or are to be, quantized in different ways. Every rank of the group must call it.

    Raises:
        ValueError: on every rank.
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
