"""`Kernel`: a loaded library that AOTInductor compiled; `check` compares it with its source."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from requanto.linear.cpu.aot.source import Source, plain_mode
from requanto.linear.cpu.aot.trust import KernelUnavailable, first_line


class Kernel:
    """A loaded kernel library.

    Raises:
        RuntimeError: the library cannot be loaded.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._lock = threading.Lock()
        self._open()
        _kernels.add(self)

    def _open(self) -> None:
        # Only the library: torch's loader of .pt2 packages unpacks them into TMPDIR, which may be noexec, and leaves files.
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(self.path), 1)
        self._run: Callable[[list[torch.Tensor]], list[torch.Tensor]] = runner.run
        self._stale = False

    def run(self, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the kernel on a list of arguments and returns the list of its results.

        One thread at a time: a second thread would wait for the library's only runner without releasing the GIL, which the
        first thread may need to finish.
        """
        with self._lock:
            if self._stale:  # fast, the library is already in memory
                self._open()
            return self._run(arguments)

    def after_fork(self) -> None:
        """For the child of a fork: replaces the runner if a thread of the parent was using it, as that call never ends."""
        if self._lock.locked():
            self._lock, self._stale = threading.Lock(), True
            _abandoned.append(self._run)  # never freed: its destructor would wait for that call

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor | None:
        returned = self.run(list(arguments))
        return returned[0] if returned else None


_kernels: weakref.WeakSet[Kernel] = weakref.WeakSet()
_abandoned: list[object] = []


def check(kernel: Callable[..., torch.Tensor | None], source: Source, name: str) -> None:
    """Compares the results of a kernel and of its source for the example arguments.

    Raises:
        KernelUnavailable: they differ, or the kernel raises an error.
    """
    with plain_mode():
        arguments = source.example()
        again = tuple(t.clone() if place in source.written else t for place, t in enumerate(arguments))
        try:
            got = kernel(*arguments)
        except RuntimeError as error:
            raise KernelUnavailable(f"the kernel {name!r} raises an error: {first_line(error)}") from error
        want = source.function(*again)
        pairs = [(arguments[place], again[place]) for place in source.written] or [(got, want)]
        for found, expected in pairs:
            if not _close(found, expected, source.largest_error):
                raise KernelUnavailable(
                    f"the kernel {name!r} computes other values than its source: a bug of torch's compiler. "
                    "Disable compiled kernels (requanto.settings.compiled = False, REQUANTO_COMPILE=0)."
                )


def _close(found: torch.Tensor | None, expected: torch.Tensor | None, largest_error: float) -> bool:
    if found is None or expected is None or found.shape != expected.shape:
        return False
    # int32 results are pairs of bfloat16.
    values = [t.view(torch.bfloat16) if t.dtype == torch.int32 else t for t in (found, expected)]
    got, want = (t.double().nan_to_num(0, 0, 0) for t in values)
    # A fused multiply-add may change the last bit.
    return bool(((got - want).abs() <= largest_error * want.abs() + largest_error / 64 * want.abs().max()).all())


def _after_fork() -> None:
    for kernel in list(_kernels):
        kernel.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
