"""Transformers' tensor parallelism (``tp_plan="auto"``) over quantized weights.

Each rank ends with its share of the codes. A weight cut between rows is cut without loss. One cut along its rows is too, as
long as the cut falls between bytes: where it falls inside a group, both halves keep the group's scale. So a checkpoint, or
a model quantized on the fly, gives the same numbers for any number of ranks, up to the order of a sum.

For this every rank reads whole the weights that have to be cut so, one at a time, and keeps its part.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from requanto.ops.aten import narrow
from requanto.qtensor import QTensor

#: attribute that names the quantizer on a model that is being loaded; the library sets its own only afterwards
LOADING = "_requanto_loading"


def local_quantized(parameter: Any) -> QTensor | None:
    """The local part of a parameter that is spread over ranks and quantized, or None."""
    local = getattr(parameter, "_local_tensor", None)
    return local if isinstance(local, QTensor) else None


def register() -> None:
    """Looks at models between their distribution over ranks and the loading of their weights."""
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.maybe_distribute_model.__func__

    @functools.wraps(original)
    def maybe_distribute_model(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, model, *args, **kwargs)
        quantizer = model.__dict__.get(LOADING)
        if quantizer is not None:
            quantizer.sharded = take_whole(model, quantizer)
        return model

    PreTrainedModel.maybe_distribute_model = classmethod(maybe_distribute_model)


def take_whole(model: nn.Module, quantizer: Any) -> dict[str, Any]:
    """Makes the library load whole every weight that will be quantized, and returns how each is to be cut.

    Raises:
        NotImplementedError: a kind of weight whose parallel forward is not covered.
    """
    from torch.distributed.tensor import DTensor

    cuts: dict[str, Any] = {}
    for name, parameter in list(model.named_parameters()):
        planned = name in quantizer.planned or (quantizer.pre_quantized and quantizer._spec(model, name) is not None)
        if not planned or not isinstance(parameter, DTensor):
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not isinstance(module, nn.Linear):
            raise NotImplementedError(
                f"tensor parallelism over the quantized {name} ({type(module).__name__}): only Linear weights are covered. "
                f"Leave it float with modules_to_not_convert, or use FSDP2 or a device map."
            )
        cuts[name] = parameter
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        module._parameters[leaf] = nn.Parameter(whole, requires_grad=False)
    return cuts


def place(model: nn.Module, name: str, tensor: QTensor, like: Any) -> None:
    """Puts this rank's part of a weight where the whole one was to go."""
    from transformers.distributed.sharding_utils import _dtensor_from_local_like

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    local = local_part(tensor, like, name)
    parameter = nn.Parameter(_dtensor_from_local_like(local, like), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter
    # The library then multiplies with local tensors; through a DTensor the weight would be dequantized, or not run.
    module._hf_quantized_needs_local_tp = True


def local_part(tensor: QTensor, like: Any, name: str) -> QTensor:
    """The part of a whole weight that belongs to this rank by the placement of ``like``."""
    from torch.distributed.tensor import Shard

    for axis, placement in enumerate(like.placements):
        if not isinstance(placement, Shard):
            continue
        dim = placement.dim % tensor.dim()
        ranks, rank = like.device_mesh.size(axis), like.device_mesh.get_local_rank(axis)
        length = tensor.shape[dim]
        size = -(-length // ranks)
        start, end = min(rank * size, length), min((rank + 1) * size, length)
        tensor = cut(tensor, dim, start, end, name)
    return tensor


def cut(tensor: QTensor, dim: int, start: int, end: int, name: str = "weight") -> QTensor:
    """``tensor[start:end]`` along ``dim``, also inside a group; always a copy, so that the rest can be freed.

    Raises:
        NotImplementedError: the cut falls inside a byte.
    """
    group = tensor.group_size or tensor.row_length
    if dim == tensor.dim() - 1 and not tensor.transposed and (start % group or end % group):
        finer = math.gcd(math.gcd(start, end - start), group)
        if (finer * tensor.qtype.bits) % 8:
            raise NotImplementedError(
                f"{name}: rows of {tensor.row_length} {tensor.qtype.name} weights in groups of {group} cannot be cut at "
                f"{start}: it falls inside a byte. Use another number of ranks."
            )
        if tensor.group_size is not None or tensor.scale.shape[-1] > 1:
            tensor = _regrouped(tensor, finer)
    return narrow(tensor, dim, start, end).clone()


def _regrouped(tensor: QTensor, group: int) -> QTensor:
    """The same values in smaller groups: each scale is written once for every part of its group."""
    times = (tensor.group_size or tensor.row_length) // group
    scale = tensor.scale.repeat_interleave(times, -1)
    shift = None if tensor.shift is None else tensor.shift.repeat_interleave(times, -1)
    return tensor.replace(tensor.qdata, scale, shift, group_size=group)
