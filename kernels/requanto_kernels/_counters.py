"""Counters of programs: int32 zeros on the device, which a kernel counts up and leaves zero.

By them the last program of a tile knows that it is the last (the sum of a split GEMM in one launch). They are kept, since
zeros of their own would be a second launch in every call: one tensor for each device and stream, whose kernels run one after
the other. While a CUDA graph is captured they are new, and zeroed by the graph: graphs may run on any stream.
"""

from __future__ import annotations

import torch
import triton

from ._device import is_interpreted, kept
from ._launch import local

_SMALLEST = 4096
_kept: dict[tuple, torch.Tensor] = {}


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream captures a graph."""
    ask = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return device.type in ("cuda", "xpu") and ask is not None and ask()


def _stream(device: torch.device) -> object:
    if is_interpreted():
        return 0
    driver = triton.runtime.driver.active
    return driver, driver.get_current_stream(driver.get_current_device())


def counters(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` int32 zeros for the current stream, which must be zeros again when the kernel ends.

    device: the current one, whose stream it is. A cached plan asks for counters anew at each call.
    """
    with torch._C._DisableTorchDispatch():  # in a recording this is no operator of the call
        found = _zeros(count, device)
    if local.recording is not None:
        local.recording.counters.append((found, count))
    return found


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    if is_capturing(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, _stream(device)
    found = _kept.get(key)
    if found is None or found.numel() < count:
        size = max(_SMALLEST, triton.next_power_of_2(count))
        found = _kept[key] = kept(lambda: torch.zeros(size, dtype=torch.int32, device=device), device)
    return found
