"""A GPU that is none: Triton and the kernels believe in an sm_90 device whose memory is CPU tensors, and nothing runs.

    with fake_gpu() as gpu:
        wq_gemm(x, qdata, scale, bits=4)
    gpu.launches        # [Launched(name="wq_gemm_kernel", grid=(64, 4, 1), args=(...))]

Everything on the host is real: checks, selection, allocation, Triton's binding of arguments, the caches. Nothing is compiled
(that takes 1 to 3 seconds a kernel), and a launch only notes its arguments. So host time can be measured, launches,
allocations and synchronizations counted (`watch`), and scripts for a GPU run dry. Results are whatever is in the memory. Not
for use under TRITON_INTERPRET=1, where kernels are other objects.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

#: Device numbers under which Triton caches what this driver's devices compiled, apart from real ones.
_numbers = itertools.count(10_000)


class Launched(NamedTuple):
    """One launch: the kernel's name, its grid and its arguments, constants included."""

    name: str
    grid: tuple[int, int, int]
    args: tuple


class FakeKernel:
    """What `triton.compile` returns, as far as a launch uses it."""

    def __init__(self, src: Any, gpu: FakeGPU, options: dict) -> None:
        self.src, self.name, self.gpu, self.options = src, src.fn.__name__, gpu, options
        self.function, self.packed_metadata = id(self), (4, 1, 0)

    def run(self, x: int, y: int, z: int, stream: int, function: int, packed: tuple, metadata: Any, enter: Any,
            leave: Any, *args: Any) -> None:  # fmt: skip
        if function != self.function:
            raise AssertionError(f"{self.name} was started with the function of another kernel")
        if enter is not None:
            enter(metadata)
        self.gpu.launches.append(Launched(self.name, (x, y, z), args))
        self.gpu.streams.append(stream)
        if leave is not None:
            leave(metadata)

    def launch_metadata(self, grid: tuple, stream: int, *args: Any) -> dict | None:
        if triton.knobs.runtime.launch_enter_hook is None:
            return None
        return {"name": self.name, "function": self.function, "stream": stream}


class _Utils:
    """Properties of the device; nothing is loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "sm_clock_rate": 1980000}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return 1, 1, 64, 0, 1024


class FakeGPU:
    """The driver, and what was asked of it. stream: what kernels are started on."""

    def __init__(self, arch: int) -> None:
        self.arch, self.utils, self.stream = arch, _Utils(), 7
        self.device = next(_numbers)
        self.launches: list[Launched] = []
        self.streams: list[int] = []
        self.compiled: list[str] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        self.device = device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def compile(self, src: Any, target: Any = None, options: dict | None = None, **more: Any) -> FakeKernel:
        """In place of `triton.compile`."""
        self.compiled.append(src.fn.__name__)
        return FakeKernel(src, self, options or {})

    def names(self) -> list[str]:
        """The names of the kernels that were launched, in order."""
        return [one.name for one in self.launches]


@contextlib.contextmanager
def fake_gpu(arch: int = 90, processors: int = 132) -> Iterator[FakeGPU]:
    """Makes `requanto_kernels` run on CPU tensors as if they were on a GPU. Compute capability `arch`, e.g. 90."""
    from requanto_kernels import _check, _device, _launch

    gpu, before = FakeGPU(arch), triton.runtime.driver._active
    patches = contextlib.ExitStack()
    with patches:
        _set(patches, _device, "_arch", lambda kind, index: f"sm_{arch}")
        _set(patches, _device, "_processors", lambda kind, index: processors)
        _set(patches, _check, "is_interpreted", lambda: True)  # takes CPU tensors; `_device` still knows better
        _set(patches, triton.compiler, "compile", gpu.compile)
        _set(patches, triton.compiler, "CompiledKernel", FakeKernel)
        triton.runtime.driver.set_active(gpu)
        patches.callback(triton.runtime.driver.set_active, before)
        patches.callback(_launch.forget)
        yield gpu


@contextlib.contextmanager
def fake_gpu_layers(arch: int = 90, processors: int = 132) -> Iterator[FakeGPU]:
    """`fake_gpu` for `requanto.linear` too: its GPU implementations take CPU tensors."""
    from requanto.linear import prepack, registry
    from requanto.linear.gpu import conditions as rules
    from requanto.linear.gpu import dequantize, layout
    from requanto.runtime.settings import registry_state, settings
    from requanto.tensor import qtensor

    with fake_gpu(arch, processors) as gpu, contextlib.ExitStack() as patches:
        _set(patches, rules, "DEVICES", ("cpu",))
        _set(patches, rules, "capability", lambda kind: arch)
        _set(patches, rules, "available", lambda: True)
        first = sorted(registry._REGISTRY, key=lambda one: not one.name.startswith(("triton", "gpu", "torch-")))
        _set(patches, registry, "_REGISTRY", first)
        # Nothing of what a CPU has: neither its kernels nor a layout for what stays plain on a GPU.
        _set(patches, settings, "compiled", False)
        _set(patches, qtensor, "value_kernels", {"cpu": dequantize.values})
        fits = layout.fits
        _set(patches, prepack, "layout_for", lambda w, dtype=None, a=None: layout.EXEC if fits(w, a) else None)
        registry_state.changed()
        patches.callback(registry_state.changed)
        yield gpu


def _set(patches: contextlib.ExitStack, place: Any, name: str, value: Any) -> None:
    patches.callback(setattr, place, name, getattr(place, name))
    setattr(place, name, value)


class Counts(NamedTuple):
    """What one call did: kernels, operators that allocate, and operators that read a value back to the host."""

    launches: list[str]
    allocations: list[str]
    reads: list[str]
    operators: list[str]


#: Operators that wait for the device, because a value or a size is read back.
READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "tolist")
ALLOCATES = ("empty", "empty_strided", "empty_like", "new_empty", "zeros", "new_zeros", "full", "clone", "resize_")


def watch(gpu: FakeGPU, call: Any) -> Counts:
    """Counts what `call()` does on the host, by torch's profiler: no mode is active that would change what runs."""
    from torch.profiler import ProfilerActivity, profile

    before = len(gpu.launches)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    names = [event.name[6:] for event in found.events() if event.name.startswith("aten::")]
    allocations = [name for name in names if name in ALLOCATES[:2]]  # all others allocate through these
    reads = [name for name in names if name in READS]
    return Counts([one.name for one in gpu.launches[before:]], allocations, reads, names)
