"""accelerate's FSDP2 with ``cpu_ram_efficient_loading``: rank 0 loads the model and broadcasts it to all ranks.

accelerate broadcasts every weight as a float tensor of its shape. For a quantized weight, its stored tensors are broadcast
instead, and each rank keeps its rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from requanto.integrations.patching import replace_everywhere
from requanto.integrations.shards import broadcast_parts, layout, local_part, local_quantized
from requanto.tensor.qtensor import QTensor


def register() -> None:
    """Patches accelerate's FSDP2; called after accelerate is imported."""
    from accelerate.utils import fsdp_utils

    if hasattr(fsdp_utils, "fsdp2_load_full_state_dict"):  # older versions have only FSDP1
        replace_everywhere(fsdp_utils.fsdp2_load_full_state_dict, _wrap_load_full_state_dict)


def _wrap_load_full_state_dict(original: Callable) -> Callable:
    @functools.wraps(original)
    def fsdp2_load_full_state_dict(
        accelerator: Any, model: nn.Module, full_sd: dict[str, Any], cpu_offload: bool = False
    ) -> nn.Module:
        state = model.state_dict()
        if not any(local_quantized(tensor) is not None for tensor in state.values()):
            return original(accelerator, model, full_sd, cpu_offload)
        layouts: list[Any] = [None]
        if dist.get_rank() == 0:
            layouts = [{n: layout(full_sd[n]) for n, t in state.items() if local_quantized(t) is not None}]
        dist.broadcast_object_list(layouts, src=0)
        for name, like in state.items():
            part = _quantized(like, name, full_sd, layouts[0], accelerator.device) if name in layouts[0] else None
            if part is None:
                part = _float(like, full_sd.get(name), accelerator.device)
            state[name] = part.to("cpu") if cpu_offload else part
        model.load_state_dict(state, assign=True)
        return model

    return fsdp2_load_full_state_dict


def _quantized(like: Any, name: str, full: dict[str, Any], layouts: dict[str, dict], device: torch.device) -> Any:
    from torch.distributed.tensor import DTensor

    source = full[name].detach().to(device) if dist.get_rank() == 0 else None
    parts = broadcast_parts(source, layouts[name], 0, None, device)
    whole: QTensor = like._local_tensor.with_inner(parts, shape=like.shape)
    local = local_part(whole, like, name).to(device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _float(like: Any, full: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Broadcasts a float parameter or buffer from rank 0; returns this rank's shard of a DTensor, else the whole tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if dist.get_rank() == 0 and full is not None:
        whole = full.detach().to(device, like.dtype).contiguous()
    else:
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    dist.broadcast(whole, src=0)
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements)
