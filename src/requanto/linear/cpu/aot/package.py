"""A kernel's package, loaded: a library that AOTInductor compiled, and its comparison with its source."""

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
    """A loaded package.

    Raises:
        RuntimeError: the system does not load it.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._lock = threading.Lock()
        self._open()
        _kernels.add(self)

    def _open(self) -> None:
        # The library alone: torch's loader of packages unpacks them into TMPDIR, where they may stay, or not be run.
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(self.path), 1)
        self._run: Callable[[list[torch.Tensor]], list[torch.Tensor]] = runner.run
        self._stale = False

    def run(self, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        """The kernel: takes a list of its arguments and gives one of its results.

        One thread at a time: a package has one runner, and a second thread would wait for it without letting go of Python's
        lock, which the first one may need before it is done.
        """
        with self._lock:
            if self._stale:  # the library is loaded already, this is quick
                self._open()
            return self._run(arguments)

    def after_fork(self) -> None:
        """In the child: a thread that is not here may have been in the midst of a call, and its runner never comes back."""
        if self._lock.locked():
            self._lock, self._stale = threading.Lock(), True
            _abandoned.append(self._run)  # its end would wait for the call that never ends

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor | None:
        returned = self.run(list(arguments))
        return returned[0] if returned else None


_kernels: weakref.WeakSet[Kernel] = weakref.WeakSet()
_abandoned: list[object] = []


def check(kernel: Callable[..., torch.Tensor | None], source: Source, name: str) -> None:
    """Compares a kernel with its source.

    Raises:
        KernelUnavailable: it computes something else.
    """
    with plain_mode():
        arguments = source.example()
        again = tuple(t.clone() if place in source.written else t for place, t in enumerate(arguments))
        try:
            got = kernel(*arguments)
        except RuntimeError as error:
            raise KernelUnavailable(f"the kernel {name!r} does not run: {first_line(error)}") from error
        want = source.function(*again)
        pairs = [(arguments[place], again[place]) for place in source.written] or [(got, want)]
        for found, expected in pairs:
            if not _close(found, expected, source.largest_error):
                raise KernelUnavailable(
                    f"the kernel {name!r} computes something else than its source: a mistake of torch's compiler. "
                    "Do without (requanto.settings.compiled = False, REQUANTO_COMPILE=0)."
                )


def _close(found: torch.Tensor | None, expected: torch.Tensor | None, largest_error: float) -> bool:
    if found is None or expected is None or found.shape != expected.shape:
        return False
    # Words of 32 bits are pairs of bfloat16.
    numbers = [t.view(torch.bfloat16) if t.dtype == torch.int32 else t for t in (found, expected)]
    got, want = (t.double().nan_to_num(0, 0, 0) for t in numbers)
    # A multiplication rounded together with the addition after it may move the last place.
    return bool(((got - want).abs() <= largest_error * want.abs() + largest_error / 64 * want.abs().max()).all())


def _after_fork() -> None:
    for kernel in list(_kernels):
        kernel.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
