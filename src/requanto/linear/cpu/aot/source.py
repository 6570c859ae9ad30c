"""`Source`, from which a CPU kernel is compiled, and the digests that are part of its file name in the cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import platform
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from requanto.runtime.tracing import outside_tracing

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Source:
    """The source of a kernel.

    Attributes:
        function: takes tensors; returns a tensor, or writes into its arguments and returns None.
        written: positions of the arguments that it writes.
        example: returns example arguments, all contiguous, with dynamic axes of length 2 or more.
        dynamic: dynamic axes, by position of the argument: the name of each axis.
        largest_error: tolerance when the kernel is compared with ``function``, relative to the value.
    """

    function: Callable[..., torch.Tensor | None]
    written: tuple[int, ...]
    example: Callable[[], tuple[torch.Tensor, ...]]
    dynamic: dict[int, dict[int, str]]
    largest_error: float = 2**-7


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Disables the caller's modes (inference mode, fake tensors, default device), for tensors made inside."""
    with outside_tracing(), torch._C.DisableTorchFunction():
        yield


@functools.cache
def machine() -> str:
    """A digest of what compiled code depends on: torch's version, the CPU's features, ATEN_CPU_CAPABILITY."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    capability = torch.backends.cpu.get_cpu_capability()
    version = torch.__version__, torch.version.git_version
    facts = version, platform.system(), platform.machine(), platform.processor(), features, capability
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def vector_options() -> dict[str, int]:
    """Sets the vector width of ATEN_CPU_CAPABILITY, which inductor ignores.

    It generates code for the CPU's widest vectors; built with shorter ones, that code writes only half of the values.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    width = 512 if capability.startswith("AVX512") else 256 if capability == "AVX2" else None
    return {} if width is None else {"cpp.simdlen": width}


def compile_options() -> dict[str, object]:
    """Options of inductor, by their names in ``torch._inductor.config``."""
    return {
        **vector_options(),
        # Shortens compilation: precompiled headers pay only for several kernels, the wrapper is not worth optimizing, and
        # vector instructions need no test program because the kernel is compared with its source.
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": True,
        # Use as many threads as the process has at run time, although the example arguments are small.
        "cpp.dynamic_threads": True,
        # Allow fused multiply-add.
        "cpp.enable_floating_point_contract_flag": "fast",
    }


def digest_of(source: Source) -> str:
    """Digest of the function, its example, all that they use from Requanto (functions, constants), and compiler options."""
    how = Path(__file__).with_name("build.py").read_text(), sorted(compile_options().items())
    facts = how, source.written, source.dynamic, source.largest_error
    digest = hashlib.sha256(repr(facts).encode())
    for function in (source.function, source.example):
        for part in _parts(function):
            digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _parts(function: Callable[..., object]) -> Iterator[str]:
    """Yields the texts of a function and of those it calls, and the constants that they read, from all of Requanto."""
    start = inspect.unwrap(function)
    ours = {"requanto", start.__module__.partition(".")[0]}
    seen, left = set(), [start]
    while left:
        function = left.pop()
        if function in seen:
            continue
        seen.add(function)
        if not isinstance(function, types.FunctionType):  # a builtin
            yield repr(function)
            continue
        yield _text(function)
        yield repr((function.__defaults__, function.__kwdefaults__))
        for name, value in sorted(_values(function, ours), key=lambda pair: pair[0]):
            value = inspect.unwrap(value) if callable(value) else value
            if isinstance(value, types.FunctionType):
                if value.__module__.partition(".")[0] in ours:
                    left.append(value)
            elif _is_plain(value):
                yield f"{name} = {value!r}"


def _values(function: types.FunctionType, ours: set[str]) -> Iterator[tuple[str, object]]:
    """Yields names in a function and their values: globals, attributes of Requanto's modules, closure variables."""
    names = _names(function.__code__)
    spaces = [function.__globals__]
    for name in sorted(names & function.__globals__.keys()):  # the same order in every process
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in ours:
            spaces.append(vars(value))
    for space in spaces:
        yield from ((name, space[name]) for name in names & space.keys())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # the variable has no value yet
            yield name, cell.cell_contents


def _names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))


def _text(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # installed without source files
        code = function.__code__
        return repr((code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, types.CodeType)]))


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, _PLAIN)
