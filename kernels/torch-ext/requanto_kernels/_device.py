"""Cached properties of devices that the launchers need."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import TypeVar

import torch
import triton

T = TypeVar("T")


def is_interpreted() -> bool:
    """True if the kernels of this process run in Triton's interpreter, on CPU tensors."""
    from ._decode import load_codes

    return not isinstance(load_codes, triton.runtime.JITFunction)


@cache
def _arch(kind: str, index: int | None) -> str:
    if kind == "cuda":
        if torch.version.hip:
            return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(index)
        return f"sm_{major}{minor}"
    return kind


def arch_of(device: torch.device) -> str:
    """`sm_90`, `gfx942`, `xpu`, or `interpreter`: the first key of every configuration table."""
    return "interpreter" if is_interpreted() else _arch(device.type, device.index)


def is_cuda(arch: str) -> bool:
    return arch.startswith("sm_")


def capability(arch: str) -> int:
    """Compute capability, 90 for `sm_90`; 0 for devices that are not NVIDIA GPUs."""
    return int(arch[3:]) if is_cuda(arch) else 0


@cache
def _processors(kind: str, index: int | None) -> int:
    if kind == "cuda":
        return torch.cuda.get_device_properties(index).multi_processor_count
    if kind == "xpu":
        return torch.xpu.get_device_properties(index).gpu_subslice_count
    return 8


def processors(device: torch.device) -> int:
    """Number of multiprocessors, i.e. of programs that run in parallel."""
    return _processors(device.type, device.index)


def on_device(tensor: torch.Tensor):
    """Context that makes the tensor's device current, since Triton launches on the current device."""
    if tensor.device.type in ("cuda", "xpu"):
        return getattr(torch, tensor.device.type).device(tensor.device)
    return nullcontext()


def kept(make: Callable[[], T], device: torch.device) -> T:
    """`make()` on the current stream, by another thread: for tensors that outlive the call in which they are made.

    The CUDA graphs of torch.compile(mode="reduce-overhead") take all that a thread allocates in its first call from a pool
    of their own, and raise an error for whatever is neither freed nor returned (`check_memory_pool` in
    torch/_inductor/cudagraph_trees.py). `torch.cuda.use_mem_pool` goes by the thread, too. Inference mode, autocast, default
    devices and dispatch modes of this thread do not hold in the other one either.
    Not for use while a graph is captured.
    """
    module = getattr(torch, device.type)
    stream = module.current_stream(device)

    def run() -> T:
        with module.stream(stream):
            made = make()
        if device.type in ("cuda", "xpu"):
            stream.synchronize()  # threads that run on other streams may read it at once
        return made

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def fp8_decoder(kind: str, arch: str) -> str:
    """KIND argument of `fp8_to_float` for a float8 kind: the hardware conversion where it exists and is faster."""
    if kind != "e4m3fn":
        return kind
    from . import config

    # Triton 3.6 converts to bf16 by way of an instruction that sm_89 lacks.
    least = 90 if config.served_triton() == "3.6" else 89
    return "native e4m3fn" if capability(arch) >= least else kind
