"""Transformers' tensor and expert parallelism (``tp_plan="auto"``, ``DistributedConfig``) for quantized weights.

Each rank holds a shard of the codes. Sharding loses nothing: between rows it is always exact, and along rows as long as the
boundary is a byte boundary (if it is inside a group, both shards get the group's scale). A checkpoint, or a model quantized
while it is loaded, therefore gives the same results for any number of ranks, up to the summation order.

To do this, every rank loads the full weights one at a time and keeps its shard.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from requanto.integrations.shards import Span, gather_weight, local_part, local_quantized, sharding
from requanto.tensor.distributed import same_everywhere
from requanto.tensor.qtensor import QTensor

#: attribute of a model with its quantizer while it is loaded; Transformers sets ``hf_quantizer`` only afterwards
LOADING = "_requanto_loading"


@dataclass
class ShardInfo:
    """How one weight is sharded.

    Attributes:
        like: Transformers' placeholder DTensor: mesh, placements and full shape.
        group_size: of the full weight; a shard whose boundary is inside a group has smaller groups.
    """

    like: Any
    group_size: int | None = None


def register() -> None:
    """Patches Transformers to call `plan_shards` after it has distributed a model and before it loads weights."""
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.maybe_distribute_model.__func__

    @functools.wraps(original)
    def maybe_distribute_model(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, model, *args, **kwargs)
        quantizer = model.__dict__.get(LOADING)
        if quantizer is not None:
            quantizer.sharded = plan_shards(model, quantizer)
        return model

    PreTrainedModel.maybe_distribute_model = classmethod(maybe_distribute_model)


def plan_shards(model: nn.Module, quantizer: Any) -> dict[str, ShardInfo]:
    """Makes Transformers load every quantized weight in full, and returns how each is to be sharded.

    Raises:
        NotImplementedError: this kind of weight or distribution is not supported.
        ValueError: ranks have different configs or checkpoints.
    """
    from torch.distributed.tensor import DTensor

    shards: dict[str, ShardInfo] = {}
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
        sharding(parameter, name)  # raises for unsupported placements before anything is loaded
        shards[name] = ShardInfo(parameter)
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(full, requires_grad=False)
    if getattr(model, "_device_mesh", None) is not None:
        same_everywhere(None, lines, "tensor parallelism")
    return shards


def _refuse_fsdp(model: nn.Module, name: str) -> None:
    if getattr(model, "_is_fsdp_managed_module", False):
        raise NotImplementedError(
            f"from_pretrained(distributed_config=...) with fsdp_size > 1 does not support quantized weights ({name}): "
            f"Transformers would load float shards. Load the quantized model on every rank, then call fully_shard on it, or "
            f"let Trainer or accelerate do it (fsdp_version=2)."
        )


def place_shard(model: nn.Module, name: str, tensor: QTensor, info: ShardInfo) -> None:
    """Sets this rank's shard of a full weight as the module's parameter."""
    from transformers.distributed.sharding_utils import _dtensor_from_local_like

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    info.group_size = tensor.group_size
    local = local_part(tensor, info.like, name)
    parameter = nn.Parameter(_dtensor_from_local_like(local, info.like), requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter


def finish_sharding(model: nn.Module) -> None:
    """Makes every module with a sharded weight compute with its local shard; called after tied weights are tied."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if local_quantized(parameter) is None:
                continue
            # Makes Transformers use local tensors. Operators on a DTensor would dequantize the weight, or fail.
            module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]
            found = sharding(parameter, "weight")
            if isinstance(module, nn.Embedding) and found is not None and found.dim == 0:
                _look_up_own_rows(module, parameter, found.spans(parameter.shape[0])[0])


def _look_up_own_rows(module: nn.Embedding, parameter: Any, own: Span) -> None:
    """Makes each rank look up the ids whose rows it has and return zeros for others; Transformers sums over ranks."""
    from transformers.distributed.tensor_parallel import EmbeddingParallel

    module.__dict__.pop("forward", None)  # Transformers' own, which passes ids that this rank has no rows for
    look_up = module.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        mine = (ids >= own.start) & (ids < own.end)
        found = look_up(torch.where(mine, ids - own.start, 0))
        return torch.where(mine.unsqueeze(-1), found, 0)

    module.forward = forward  # type: ignore[method-assign]
    EmbeddingParallel(shard_dim=0).install_forward(module, parameter.device_mesh)


def full_state_dict(model: nn.Module, shards: dict[str, ShardInfo]) -> dict[str, torch.Tensor]:
    """Returns the state dict with sharded quantized weights gathered on the CPU of rank 0; other ranks' dicts lack them.

    Every rank must call it.

    Raises:
        RuntimeError: torch.distributed is not initialized.
    """
    if not dist.is_initialized():
        raise RuntimeError("saving a sharded model needs all ranks, but torch.distributed is not initialized")
    state_dict = model.state_dict()
    # Float weights: Transformers gathers them if it has distributed the model; after fully_shard they are gathered here.
    by_transformers = getattr(model.config, "distributed_config", None) is not None
    state: dict[str, torch.Tensor] = {}
    done: dict[int, QTensor | None] = {}
    for name, tensor in state_dict.items():
        local = local_quantized(tensor)
        if local is None:
            gather = hasattr(tensor, "full_tensor") and not by_transformers
            state[name] = tensor.full_tensor().cpu() if gather else tensor  # type: ignore[operator]
            continue
        if id(local._storage) not in done:  # tied weights are two entries with the same tensors
            info = shards.get(name)
            done[id(local._storage)] = gather_weight(
                tensor, name, local.group_size if info is None else info.group_size
            )
        if (weight := done[id(local._storage)]) is not None:
            state[name] = weight
    return state
