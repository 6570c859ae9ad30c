"""Records what a launcher would start on an architecture that is not there, and compiles it.

The launchers themselves run, on tensors without data (device "meta"), and Triton's own binder decides what it
specializes on. So a compiled program is the one that a model starts: with its strides, dtypes, alignments and tile.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import requanto_kernels
from requanto_kernels import _check, _device, config

#: Every architecture that programs are compiled for, the goal's first.
ARCHS = (
    "sm_90", "sm_80", "sm_89", "sm_100", "sm_120", "sm_75", "gfx942", "gfx90a", "gfx950", "gfx1100", "gfx1201",
)  # fmt: skip
#: Multiprocessors of one common device: they decide the number of splits.
PROCESSORS = {
    "sm_75": 40, "sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170,
    "gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96, "gfx1201": 64,
}  # fmt: skip


#: The version of Triton whose tiles are used, as `config` names it.
TRITON = config.served_triton()


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 32 if arch.startswith(("gfx10", "gfx11", "gfx12")) else 64)
    return GPUTarget("cuda", int(arch[3:]), 32)


@dataclass(frozen=True)
class Program:
    """One kernel with everything that its machine code depends on, except Triton's version."""

    arch: str
    kernel: object
    signature: dict[str, str]
    constants: dict[tuple[int, ...], object]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def constant(self, name: str, default: object = None) -> object:
        """The value of a constexpr argument, or of one that Triton made a constant since it is 1."""
        return self.constants.get((self.kernel.arg_names.index(name),), default) if name in self.signature else default

    def key(self, sources: str = "") -> str:
        """A digest; `sources` is the text of the kernel and of what it calls."""
        parts = [self.arch, self.name, sources, repr(sorted(self.options.items()))]
        parts += [repr(sorted(part.items())) for part in (self.signature, self.constants, self.attributes)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def compile(self):
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target_of(self.arch), options=self.options)


class _Driver:
    """As much of a driver as a launch asks for before it compiles."""

    arch = ARCHS[0]

    def get_current_target(self) -> GPUTarget:
        return target_of(self.arch)

    def get_current_device(self) -> int:
        return ARCHS.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


_driver = _Driver()


def _common_device(**tensors: torch.Tensor | None) -> torch.device:
    return next(tensor.device for tensor in tensors.values() if tensor is not None)


def _families_of(version: str) -> None:
    """From now on tiles are those for this version of Triton, whatever the installed one."""
    if config.served_triton() != version:
        config.served_triton = lambda: version
        config._family_rows.cache_clear()
        config._select.cache_clear()


@contextlib.contextmanager
def device(arch: str) -> Iterator[None]:
    """Launchers take tensors without data, and see a device of this architecture."""
    saved = _device._arch, _device._processors, _check.check_devices, triton.runtime.driver._active
    _driver.arch = arch
    _device._arch = lambda kind, index: arch
    _device._processors = lambda kind, index: PROCESSORS[arch]
    _check.check_devices = _common_device
    triton.runtime.driver.set_active(_driver)
    try:
        yield
    finally:
        _device._arch, _device._processors, _check.check_devices, triton.runtime.driver._active = saved


def record(arch: str, call: Callable[[], object], version: str = TRITON) -> list[Program]:
    """The programs that `call` starts, in order, with the tiles for a version of Triton; nothing is compiled or runs."""
    found: list[Program] = []
    _families_of(version)

    def hook(*, fn, compile: dict, **_: object) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        attributes = {place: value for place, value in compile["configs"][0].items() if value}
        found.append(Program(arch, fn.jit_function, compile["signature"], compile["constants"], attributes, options))
        return True  # Triton then neither compiles nor launches

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        with device(arch):
            call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return found


__all__ = ["ARCHS", "Program", "record", "requanto_kernels", "target_of"]
