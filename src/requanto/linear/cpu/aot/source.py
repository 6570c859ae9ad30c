"""What a CPU kernel is made from, and the digests that a package is kept under."""

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

from requanto.runtime.tracing import unwatched

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Source:
    """What a kernel is made from.

    Attributes:
        function: of tensors, in torch's operators; it returns one, or writes into its arguments and returns nothing.
        written: positions of the arguments that it writes.
        example: makes arguments, all contiguous, whose dynamic axes are two long or longer.
        dynamic: axes whose lengths may change from call to call, by position of the argument: a name for each axis.
        largest_error: of the kernel beside its source, relative to the largest number.
    """

    function: Callable[..., torch.Tensor | None]
    written: tuple[int, ...]
    example: Callable[[], tuple[torch.Tensor, ...]]
    dynamic: dict[int, dict[int, str]]
    largest_error: float = 2**-7


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Whatever modes the caller is in (inference, fake tensors, a default device): tensors are made as anywhere."""
    with unwatched(), torch._C.DisableTorchFunction():
        yield


@functools.cache
def machine() -> str:
    """A digest of what code for this processor depends on, with this process's bound on vectors."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    capability = torch.backends.cpu.get_cpu_capability()
    version = torch.__version__, torch.version.git_version
    facts = version, platform.system(), platform.machine(), platform.processor(), features, capability
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def vector_options() -> dict[str, int]:
    """The width of this process's vectors: torch's compiler takes the processor's own, whatever ATEN_CPU_CAPABILITY says,
    and code for longer vectors, built with shorter ones, writes half of the numbers."""
    capability = torch.backends.cpu.get_cpu_capability()
    width = 512 if capability.startswith("AVX512") else 256 if capability == "AVX2" else None
    return {} if width is None else {"cpp.simdlen": width}


def compile_options() -> dict[str, object]:
    """Options of torch's compiler, by the names of ``torch._inductor.config``."""
    return {
        **vector_options(),
        # Headers compiled beforehand serve many kernels, this is one; what calls it is not worth optimizing; and the
        # processor's instructions need no trial by compiling, since the result is compared with its source.
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": True,
        # The examples are small; what is really computed is worth several threads, as many as the process has then.
        "cpp.dynamic_threads": True,
        # A product and the sum after it are one operation, and rounded once.
        "cpp.enable_floating_point_contract_flag": "fast",
    }


def digest_of(source: Source) -> str:
    """Of the function and its example, of all they take from Requanto (functions, constants), and of how it is compiled."""
    how = Path(__file__).with_name("build.py").read_text(), sorted(compile_options().items())
    facts = how, source.written, source.dynamic, source.largest_error
    digest = hashlib.sha256(repr(facts).encode())
    for function in (source.function, source.example):
        for part in _parts(function):
            digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:12]


def _parts(function: Callable[..., object]) -> Iterator[str]:
    """Texts of a function and of those it calls, and the constants that they read, wherever those are defined."""
    start = inspect.unwrap(function)
    ours = {"requanto", start.__module__.partition(".")[0]}
    seen, left = set(), [start]
    while left:
        function = left.pop()
        if function in seen:
            continue
        seen.add(function)
        if not isinstance(function, types.FunctionType):  # torch's own, or Python's
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
    """What the names in a function stand for: globals, attributes of Requanto's modules, variables of an outer function."""
    names = _names(function.__code__)
    spaces = [function.__globals__]
    for name in sorted(names & function.__globals__.keys()):  # the same order in every process
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in ours:
            spaces.append(vars(value))
    for space in spaces:
        yield from ((name, space[name]) for name in names & space.keys())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # not bound yet
            yield name, cell.cell_contents


def _names(code: types.CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*(_names(part) for part in inner))


def _text(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # installed without its text
        code = function.__code__
        return repr((code.co_code, code.co_names, [c for c in code.co_consts if not isinstance(c, types.CodeType)]))


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return isinstance(value, _PLAIN)
