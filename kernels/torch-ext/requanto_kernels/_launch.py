"""Launches with little Python: `launch(kernel, grid, ...)` in place of `kernel[grid](...)`.

Triton's own launch binds the arguments, and makes a text of the constants and options to look the compiled kernel up.
`launch` looks it up by a tuple of what Triton specializes on, computed by Triton's own function: dtype and alignment of
tensors, and of integers the size, divisibility by 16, and the value 1. The first launch of each kind is Triton's own, so
compiling, its caches and its hooks are as ever. `_plan.py` goes one step further, and looks nothing up.

Where Triton's internals are not as known (`KNOWN`), where the kernel is interpreted, or where a hook wants to see every call
before the launch, all launches are Triton's own. Hooks of the launch itself (profilers) are called either way.
"""

from __future__ import annotations

import logging
import threading
from functools import cache
from typing import Any

import triton
from triton import knobs

logger = logging.getLogger(__name__)

#: Versions of Triton whose `JITFunction.run` was read: they start a compiled kernel in the same way.
KNOWN = ("3.6", "3.7", "3.8", "3.9")


class Local(threading.local):
    """What is particular to a thread: the recording that its launches are added to, if any (`_plan.py`)."""

    recording: Any = None


local = Local()


@cache
def is_known() -> bool:
    """Whether Triton's internals are as this file knows them; else one line is logged."""
    try:
        from triton._C.libtriton import native_specialize_impl  # noqa: F401
    except ImportError:
        known = False
    else:
        known = triton.__version__.startswith(KNOWN)
    if not known:
        logger.info(
            "kernels are launched through Triton's own Python: the launch of Triton %s is not known here (%s are)",
            triton.__version__, ", ".join(KNOWN),
        )  # fmt: skip
    return known


def settings() -> tuple[Any, ...]:
    """Triton's settings that change how a kernel is compiled, which a program may change at any time."""
    runtime, compilation = knobs.runtime, knobs.compilation
    return (
        runtime.debug,
        compilation.instrumentation_mode,
        getattr(compilation, "fpsan_homomorphic_casts", None),
        runtime.add_stages_inspection_hook,
    )


class Signature:
    """The parameters of a kernel as `launch` needs them; `plain` if its kind of parameters is known."""

    def __init__(self, kernel: Any) -> None:
        self.names = [p.name for p in kernel.params]
        self.constants = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default}
        first = next((i for i, p in enumerate(kernel.params) if p.is_constexpr), len(self.names))
        self.count = first
        self.plain = not any(
            p.annotation_type or p.is_const or p.do_not_specialize or p.do_not_specialize_on_alignment or p.has_default
            for p in kernel.params[:first]
        ) and all(p.is_constexpr for p in kernel.params[first:])

    def tail(self, constexprs: dict[str, Any]) -> tuple:
        """The values of constexprs in the kernel's order."""
        given = {**self.constants, **constexprs}
        return tuple(given[name] for name in self.names[self.count :])


class Compiled:
    """A compiled kernel with its constants, to be started on the current device."""

    __slots__ = ("function", "kernel", "packed", "run", "tail")

    def __init__(self, kernel: Any, tail: tuple) -> None:
        self.kernel, self.tail = kernel, tail
        self.run, self.function, self.packed = kernel.run, kernel.function, kernel.packed_metadata

    def start(self, grid: tuple[int, int, int], stream: int, args: Any) -> None:
        """Starts it. args: the arguments that are no constants, in the kernel's order."""
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if _is_quiet(enter) and _is_quiet(leave):
            self.run(*grid, stream, self.function, self.packed, None, None, None, *args, *self.tail)
            return
        args = (*args, *self.tail)
        metadata = self.kernel.launch_metadata(grid, stream, *args)
        self.run(*grid, stream, self.function, self.packed, metadata, enter, leave, *args)


def _is_quiet(hook: Any) -> bool:
    """Whether nothing would be called: no hook, or an empty chain of them."""
    return hook is None or getattr(hook, "calls", True) == []


_signatures: dict[Any, Signature] = {}
_compiled: dict[tuple, Compiled] = {}


def signature_of(kernel: Any) -> Signature | None:
    """The kernel's signature; None if `launch` leaves it to Triton."""
    found = _signatures.get(kernel)
    if found is None:
        if not isinstance(kernel, triton.runtime.JITFunction) or not is_known():
            return None
        found = _signatures[kernel] = Signature(kernel)
    return found if found.plain else None


def whole(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """The grid with three axes."""
    return (*grid, *(1,) * (3 - len(grid)))  # type: ignore[return-value]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constexprs: Any) -> None:
    """`kernel[grid](*args, **constexprs)` on the current device and stream.

    args: all arguments that are no constexprs, in the kernel's order. constexprs: all constexprs without a default, and
    options such as num_warps.
    """
    if local.recording is not None:
        local.recording.launch(kernel, grid, args, constexprs)
        return
    found = compiled(kernel, grid, args, constexprs)
    if found is not None:
        driver = triton.runtime.driver.active
        found.start(whole(grid), driver.get_current_stream(driver.get_current_device()), args)


def by_triton(kernel: Any, grid: tuple[int, ...], args: Any, constexprs: dict[str, Any]) -> Any:
    """Triton's own launch; the compiled kernel, or None where a hook kept it from compiling.

    Products and sums are contracted to fma whatever Triton's version: 3.9 warns that 3.10 leaves them apart by default,
    which would add an instruction for each weight.
    """
    return kernel[grid](*args, enable_fp_fusion=True, **constexprs)


def compiled(kernel: Any, grid: tuple[int, ...], args: tuple, constexprs: dict[str, Any]) -> Compiled | None:
    """The compiled kernel for these arguments; None if Triton has launched it now, and perhaps compiled it."""
    signature = signature_of(kernel)
    if signature is None or kernel.pre_run_hooks or len(args) != signature.count:
        by_triton(kernel, grid, args, constexprs)
        return None
    key = key_of(kernel, args, constexprs)
    found = _compiled.get(key)
    if found is None:
        result = by_triton(kernel, grid, args, constexprs)
        # Not remembered: a kernel that is still being compiled elsewhere, and one that a hook may change next time.
        if type(result) is kernel.CompiledKernel and knobs.runtime.add_stages_inspection_hook is None:
            _compiled[key] = Compiled(result, signature.tail(constexprs))
    return found


def known(kernel: Any, args: tuple, constexprs: dict[str, Any]) -> Compiled | None:
    """The compiled kernel for these arguments, if it is remembered."""
    signature = signature_of(kernel)
    return None if signature is None else _compiled.get(key_of(kernel, args, constexprs))


def key_of(kernel: Any, args: tuple, constexprs: dict[str, Any]) -> tuple:
    """What Triton would compile a kernel by."""
    from triton._C.libtriton import native_specialize_impl as specialize

    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    backend = kernel.device_caches[device][3]
    kinds = [specialize(backend, arg, False, True, True) for arg in args]
    return kernel, driver, device, settings(), *kinds, *constexprs, *constexprs.values()


def forget() -> None:
    """Forgets all compiled kernels; Triton keeps its own."""
    _compiled.clear()
