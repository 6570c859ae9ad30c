"""The C library of CPU kernels (the package `requanto_cpu`), where the settings allow it and it can be loaded.

It is loaded, or built from its sources in a few seconds, when a weight is first multiplied, packed or dequantized on a CPU;
never by an import. Where it cannot be, one line is logged and torch's operators run; with ``settings.compiled = True`` that
is an error.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from types import ModuleType
from typing import Any

import torch

from requanto.runtime import fork
from requanto.runtime.settings import registry_state, settings
from requanto.runtime.tracing import is_fake

logger = logging.getLogger(__name__)

_PLAIN = (torch.Tensor, torch.nn.Parameter)
#: dtypes of x, of a bias, of a column scale and of dequantized values
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
#: Levels whose processor multiplies bfloat16 faster than float32.
_BFLOAT16_LEVELS = ("bf16", "amx")


class Library:
    """The functions of requanto_cpu/csrc/requanto_cpu.h. Those of this class raise RuntimeError for an error code.

    Attributes:
        functions: the ctypes library; its functions return codes.
        interface: structs and constants.
        level: the instruction set in use, such as ``"vnni"``.
    """

    def __init__(self, package: ModuleType, functions: ctypes.CDLL, interface: ModuleType) -> None:
        self._package, self.functions, self.interface = package, functions, interface

    @property
    def level(self) -> str:
        return self._package.level()  # type: ignore[no-any-return]

    @property
    def has_bfloat16(self) -> bool:
        """Whether the level in use multiplies bfloat16 faster than float32."""
        return self.level in _BFLOAT16_LEVELS

    @property
    def has_tiles(self) -> bool:
        """Whether the level in use multiplies bfloat16 with AMX."""
        return self.level == "amx"

    @functools.cached_property
    def lacks_amx(self) -> bool:
        """Whether the processor has AMX, and the compiler that built the library does not know it."""
        here = self._package.build.processor_levels() or ()
        return "amx" in here and "amx" not in self._package.levels() and not os.environ.get("REQUANTO_CPU")

    def check(self, code: int) -> None:
        """Raises RuntimeError for an error code."""
        if code < 0:
            self._package.check(code)

    def pack(self, plain: int, bits: int, rows: int, length: int, flip: int, strips: int) -> None:
        """`rq_pack` with addresses of tensors."""
        self.check(self.functions.rq_pack(plain, bits, rows, length, flip, strips))

    def unpack(
        self, strips: int, bits: int, rows: int, length: int, flip: int, start: int, stop: int, plain: int
    ) -> None:
        """`rq_unpack`."""
        self.check(self.functions.rq_unpack(strips, bits, rows, length, flip, start, stop, plain))

    def codes(
        self,
        strips: int,
        bits: int,
        rows: int,
        length: int,
        flip: int,
        start: int,
        stop: int,
        index: int | None,
        out: int,
    ) -> None:
        """`rq_codes`."""
        self.check(self.functions.rq_codes(strips, bits, rows, length, flip, start, stop, index, out))


_lock = fork.new_in_child(threading.Lock())
_library: Library | None = None
#: Why there is none, for the log and for `explain`; None before the first try.
why_not: str | None = None
#: Variables that decide whether there is one. A failure is final only for the values that it was found with.
_VARIABLES = ("REQUANTO_CPU", "REQUANTO_CACHE", "CXX")
_tried: list[str | None] = []


def find() -> Library | None:
    """The library; None where settings forbid it or it cannot be loaded.

    Threads that come while another one builds it wait, a few seconds.

    Raises:
        RuntimeError: it cannot be loaded, and ``settings.compiled`` requires it.
        ValueError: REQUANTO_CPU names an instruction set that does not exist, or that this processor does not have.
    """
    compiled = settings.compiled
    if compiled is False:
        return None
    found = _library
    if found is None and (why_not is None or compiled or _is_another_environment()):
        found = _load()
    if found is None and compiled:
        raise RuntimeError(
            f"requanto.settings.compiled is True, but the CPU kernels are not available: {why_not}. Set it to None (or "
            f"REQUANTO_COMPILE to nothing), to run torch's operators instead."
        )
    return found


def _is_another_environment() -> bool:
    """Whether a variable has changed since the last try, as the line in the log may have advised."""
    return not torch.compiler.is_compiling() and _tried != [os.environ.get(name) for name in _VARIABLES]


def _load() -> Library | None:
    global _library, why_not, _tried
    with _lock:
        changed = _is_another_environment()
        if _library is not None or (why_not is not None and not settings.compiled and not changed):
            return _library
        before, why_not = why_not, None
        _tried = [os.environ.get(name) for name in _VARIABLES]
        try:
            _library = _loaded()
        except ValueError:  # a wrong REQUANTO_CPU
            raise
        except Exception as error:  # whatever it is: torch's operators compute the same
            name = "" if type(error).__name__ == "LibraryUnavailable" else f"{type(error).__name__}: "
            why_not = f"{name}{error}".partition("\n")[0]
        if _library is None or before is not None:
            registry_state.changed()
        if why_not is None or (before is not None and not changed) or settings.compiled:  # then `find` raises
            return _library
        if os.environ.get("REQUANTO_CPU") == "torch":
            logger.info("REQUANTO_CPU=torch: no CPU kernels, torch's operators run")
        else:
            logger.warning(
                "requanto: torch's operators run instead of the CPU kernels, several times slower: %s; REQUANTO_COMPILE=0 "
                "does without them",
                why_not,
            )
        return None


def _loaded() -> Library:
    import requanto_cpu
    from requanto_cpu import interface

    functions = requanto_cpu.library()
    return Library(requanto_cpu, functions, interface)


def structs() -> Any:
    """The structs and constants of the interface; only where there is a library."""
    found = find()
    assert found is not None
    return found.interface


def reads_floats(vector: torch.Tensor) -> bool:
    """Whether kernels can read a vector where it is: a bias or a column scale, besides its shape and strides."""
    plain = type(vector) in _PLAIN and vector.is_cpu and not vector.is_neg()  # a negated view has the original's memory
    return plain and vector.dtype in FLOATS


def for_tensors(*tensors: torch.Tensor) -> Library | None:
    """The library, if it can read and write all these tensors: ordinary ones, on the CPU, and no trace is recorded."""
    if torch._C._get_tracing_state() is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # in a transform a new tensor has no memory
    if torch._C._len_torch_dispatch_stack():
        return None  # what a mode records (make_fx) would lack the call
    for tensor in tensors:
        if not tensor.is_cpu or (type(tensor) not in _PLAIN and is_fake(tensor)) or torch._is_functional_tensor(tensor):
            return None
    return find()
