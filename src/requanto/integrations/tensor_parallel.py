"""Transformers' tensor and expert parallelism (``tp_plan="auto"``, ``DistributedConfig``) over quantized weights.

Each rank ends with its share of the codes. A weight cut between rows is cut without loss. One cut along its rows is too, as
long as the cut falls between bytes: where it falls inside a group, both halves keep the group's scale. So a checkpoint, or
a model quantized on the fly, gives the same numbers for any number of ranks, up to the order of a sum.

For this every rank reads whole the weights that have to be cut so, one at a time, and keeps its part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from requanto.integrations.shards import Span, gathered, local_part, local_quantized, sharding
from requanto.tensor.distributed import same_everywhere
from requanto.tensor.qtensor import QTensor

#: attribute that names the quantizer on a model that is being loaded; the library sets its own only afterwards
LOADING = "_requanto_loading"


@dataclass
class Share:
    """What one weight's part of this rank goes by.

    Attributes:
        like: the library's placeholder: mesh, placements and whole shape.
        group_size: of the whole weight; a part that was cut inside a group has smaller ones.
    """

    like: Any
    group_size: int | None = None


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


def take_whole(model: nn.Module, quantizer: Any) -> dict[str, Share]:
    """Makes the library load whole every weight that will be quantized, and returns how each is to be cut.

    Raises:
        NotImplementedError: a kind of weight or of distribution that is not covered.
        ValueError: ranks were given different configs or checkpoints.
    """
    from torch.distributed.tensor import DTensor

    shares: dict[str, Share] = {}
    lines = []
    for name, parameter in list(model.named_parameters()):
        text = quantizer._spec(model, name) if quantizer.pre_quantized else quantizer.planned.get(name)
        if text is None:
            continue
        lines.append(f"{name}: {text}")
        if not isinstance(parameter, DTensor):
            continue
        _refuse_fsdp(model, name)
        owner, _, leaf = name.rpartition(".")
        sharding(parameter, name)  # refuses what cannot be cut, before anything is read
        shares[name] = Share(parameter)
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(whole, requires_grad=False)
    if getattr(model, "_device_mesh", None) is not None:
        same_everywhere(None, lines, "tensor parallelism")
    return shares


def _refuse_fsdp(model: nn.Module, name: str) -> None:
    if getattr(model, "_is_fsdp_managed_module", False):
        raise NotImplementedError(
            f"from_pretrained(distributed_config=...) with fsdp_size > 1 over the quantized {name}: the library reads float "
            f"shards of it. Load the quantized model on every rank, then call fully_shard on it, or let Trainer or "
            f"accelerate do it (fsdp_version=2)."
        )


def place(model: nn.Module, name: str, tensor: QTensor, share: Share) -> None:
    """Puts this rank's part of a weight where the whole one was to go."""
    from transformers.distributed.sharding_utils import _dtensor_from_local_like

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    share.group_size = tensor.group_size
    local = local_part(tensor, share.like, name)
    parameter = nn.Parameter(_dtensor_from_local_like(local, share.like), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter


def finish(model: nn.Module) -> None:
    """Makes every module with a share multiply with it; called when tied weights are tied."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if local_quantized(parameter) is None:
                continue
            # The library then multiplies with local tensors; through a DTensor the weight would be dequantized, or not run.
            module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
            found = sharding(parameter, "weight")
            if isinstance(module, nn.Embedding) and found is not None and found.dim == 0:
                _look_up_own_rows(module, parameter, found.spans(parameter.shape[0])[0])


def _look_up_own_rows(module: nn.Embedding, parameter: Any, own: Span) -> None:
    """An embedding cut by its rows: each rank looks up the ids it has, the others are zero in the library's sum."""
    from transformers.distributed.tensor_parallel import EmbeddingParallel

    module.__dict__.pop("forward", None)  # the library's, which gives the module ids it has no rows for
    look_up = module.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        mine = (ids >= own.start) & (ids < own.end)
        found = look_up(torch.where(mine, ids - own.start, 0))
        return torch.where(mine.unsqueeze(-1), found, 0)

    module.forward = forward  # type: ignore[method-assign]
    EmbeddingParallel(shard_dim=0).install_forward(module, parameter.device_mesh)


def whole_state_dict(model: nn.Module, shares: dict[str, Share]) -> dict[str, torch.Tensor]:
    """The state dict with every quantized weight whole, on the CPU of rank 0; other ranks get it without them.

    Every rank must call it.

    Raises:
        RuntimeError: torch.distributed has been shut down.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "saving a model that is spread over ranks needs them all: torch.distributed is not initialized"
        )
    state_dict = model.state_dict()
    # Float weights are put together by the library where it has spread the model, here where fully_shard has.
    library = getattr(model.config, "distributed_config", None) is not None
    state: dict[str, torch.Tensor] = {}
    done: dict[int, QTensor | None] = {}
    for name, tensor in state_dict.items():
        local = local_quantized(tensor)
        if local is None:
            whole = hasattr(tensor, "full_tensor") and not library
            state[name] = tensor.full_tensor().cpu() if whole else tensor  # type: ignore[operator]
            continue
        if id(local._storage) not in done:  # tied weights are two entries over the same tensors
            share = shares.get(name)
            done[id(local._storage)] = gathered(tensor, name, local.group_size if share is None else share.group_size)
        if (weight := done[id(local._storage)]) is not None:
            state[name] = weight
    return state
