"""Kernels that torch.compile's backend makes ahead of time: once on a machine, in a process of their own, kept as files.

A kernel is a function of tensors, written in torch (`Source`). The first process that needs it starts a Python that exports
the function, has AOTInductor compile it, compares it with its source and writes the package; every later one loads the file
in milliseconds, without the compiler's modules, and calls it at a quarter of the cost of a call through torch.compile.

Packages lie in ``$REQUANTO_CACHE``, else ``$XDG_CACHE_HOME/requanto``, else ``~/.cache/requanto``. Their names hold what
they depend on: torch's version, the processor's instructions, the source. So a home directory may be shared by machines.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from requanto.runtime.settings import choices, settings

logger = logging.getLogger(__name__)

#: Seconds that making a kernel may take: ten times what it takes on two busy cores.
PATIENCE = 600.0
_LOCK = threading.RLock()


class KernelUnavailable(RuntimeError):
    """A kernel could not be made or loaded on this machine; the message says why, and what to do."""


class CannotBeMade(KernelUnavailable):
    """No kernel can, as far as is known: there is no compiler that works, or no place to write."""


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


def directory() -> Path:
    """Where packages are kept."""
    chosen = os.environ.get("REQUANTO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "requanto"


def compiler() -> str | None:
    """The C++ compiler that torch would take, if it is there."""
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    return shutil.which(os.environ.get("CXX") or usual)


@functools.cache
def machine() -> str:
    """A digest of what code for this processor depends on, with this process's bound on vectors."""
    features = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    capability = torch.backends.cpu.get_cpu_capability()
    facts = torch.__version__, platform.system(), platform.machine(), platform.processor(), features, capability
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def vector_options() -> dict[str, int]:
    """The width of this process's vectors: torch's compiler takes the processor's own, whatever ATEN_CPU_CAPABILITY says,
    and code for longer vectors, built with shorter ones, writes half of the numbers."""
    capability = torch.backends.cpu.get_cpu_capability()
    width = 512 if capability.startswith("AVX512") else 256 if capability == "AVX2" else None
    return {} if width is None else {"cpp.simdlen": width}


def digest_of(source: Source) -> str:
    """Of the function, of all that it calls in its module, and of how it is compiled."""
    module = sys.modules[source.function.__module__]
    how = Path(__file__).with_name("build.py").read_text()
    return hashlib.sha256((inspect.getsource(module) + how).encode()).hexdigest()[:12]


def path_of(name: str, source: Source) -> Path:
    """Where the package of that kernel is, or would be."""
    return directory() / f"{name}-{digest_of(source)}-{machine()}.pt2"


@contextlib.contextmanager
def plain_mode() -> Iterator[None]:
    """Whatever modes the caller is in (inference, a default device): tensors are made as anywhere."""
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        yield


class Kernel:
    """A loaded package."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        # torch._inductor.aoti_load_package does the same after it has imported the compiler, which takes seconds.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        self._run: Callable[[list[torch.Tensor]], list[torch.Tensor]] = loader.boxed_run
        self._lock = threading.Lock()

    def run(self, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
        """The kernel: takes a list of its arguments, which it empties, and gives one of its results.

        One thread at a time: a package has one runner, and a second thread would wait for it without letting go of Python's
        lock, which the first one may need before it is done.
        """
        with self._lock:
            return self._run(arguments)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor | None:
        returned = self.run(list(arguments))
        return returned[0] if returned else None


def check(kernel: Callable[..., torch.Tensor | None], source: Source, name: str) -> None:
    """Compares a kernel with its source.

    Raises:
        KernelUnavailable: it computes something else.
    """
    with plain_mode():
        arguments = source.example()
        again = tuple(t.clone() if place in source.written else t for place, t in enumerate(arguments))
        got, want = kernel(*arguments), source.function(*again)
        pairs = [(arguments[place], again[place]) for place in source.written] or [(got, want)]
        for found, expected in pairs:
            if not _close(found, expected, source.largest_error):
                raise KernelUnavailable(
                    f"the kernel {name!r} computes something else than its source: a mistake of torch's compiler, or a "
                    "file from another machine. Do without (requanto.settings.compiled = False, REQUANTO_COMPILE=0)."
                )


def _close(found: torch.Tensor | None, expected: torch.Tensor | None, largest_error: float) -> bool:
    if found is None or expected is None:
        return False
    # Words of 32 bits are pairs of bfloat16.
    numbers = [t.view(torch.bfloat16) if t.dtype == torch.int32 else t for t in (found, expected)]
    got, want = (t.double().nan_to_num(0, 0, 0) for t in numbers)
    # A multiplication rounded together with the addition after it may move the last place.
    return bool(((got - want).abs() <= largest_error * want.abs() + largest_error / 64 * want.abs().max()).all())


_loaded: dict[str, Kernel] = {}


def kernel(name: str, source: Source) -> Kernel:
    """The kernel of that name: loaded, or made first.

    Raises:
        KernelUnavailable: it could not be made.
    """
    found = _loaded.get(name)
    if found is None:
        load({name: source})
        found = _loaded[name]
    return found


def load(wanted: dict[str, Source]) -> None:
    """Loads kernels by name; those that have never been made are made side by side.

    Raises:
        KernelUnavailable: one could not be made.
    """
    with _LOCK:
        missing = {name: source for name, source in wanted.items() if name not in _loaded}
        paths = {name: path_of(name, source) for name, source in missing.items()}
        old = {name for name, path in paths.items() if path.exists()}
        make({name: path for name, path in paths.items() if name not in old})
        for name, source in missing.items():
            try:
                _loaded[name] = _checked(name, source, paths[name])
            except KernelUnavailable as error:
                if name not in old:
                    raise
                logger.warning("requanto: a kept kernel is of no use and made anew: %s", error)
                paths[name].unlink(missing_ok=True)
                make({name: paths[name]})
                _loaded[name] = _checked(name, source, paths[name])


def _checked(name: str, source: Source, path: Path) -> Kernel:
    try:
        fresh = Kernel(name, path)
    except (RuntimeError, AttributeError) as error:
        raise KernelUnavailable(f"{path} could not be loaded: {str(error).splitlines()[0]}") from error
    check(fresh, source, name)
    return fresh


def make(paths: dict[str, Path]) -> None:
    """Has other processes write the packages of kernels, one for each.

    Raises:
        CannotBeMade: no compiler that works, or no place to write.
        KernelUnavailable: one of these kernels failed, by its own fault or for lack of time.
    """
    if not paths:
        return
    if _NOTHING_MADE in _failed and not settings.compiled:
        raise CannotBeMade(_failed[_NOTHING_MADE])
    names = ", ".join(repr(name) for name in paths)
    if compiler() is None:
        raise CannotBeMade(
            f"no C++ compiler for {names}: neither $CXX nor torch's usual one was found. Install g++, or do without "
            "(requanto.settings.compiled = False, REQUANTO_COMPILE=0)."
        )
    logger.warning(
        "requanto: compiling %s for the CPU, once on this machine: 20 s or more. They are kept in %s; REQUANTO_COMPILE=0 "
        "does without.",
        names,
        directory(),
    )
    start = time.monotonic()
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1)) as pool:
        list(pool.map(_make, paths, paths.values()))
    if why := _failed.get(_NOTHING_MADE):
        for family in [family for family, known in _failed.items() if known == why]:
            del _failed[family]  # the others were not even tried
        choices.changed()
    logger.info("compiled %s in %.0f s", names, time.monotonic() - start)


def _make(name: str, path: Path) -> None:
    from filelock import FileLock  # torch needs it too

    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # native code: nobody else writes here
        with FileLock(f"{path}.lock", timeout=PATIENCE):  # one process makes it, whoever asks
            if not path.exists():
                _run(name, path)
    except OSError as error:
        raise CannotBeMade(
            f"the kernel {name!r} cannot be kept in {path.parent}: {error}. Set REQUANTO_CACHE to a directory that can "
            "be written."
        ) from error


def _run(name: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="requanto-") as work:
        fresh = Path(work) / "kernel.pt2"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(work) / "inductor"),
            "CUDA_VISIBLE_DEVICES": "",  # nothing here is an accelerator's business
            "REQUANTO_COMPILE": "0",
        }
        command = [sys.executable, "-m", "requanto.linear.cpu.aot.build", str(fresh), name]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=work
            )
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"making the kernel {name!r} took longer than {PATIENCE:.0f} s") from error
        except OSError as error:
            raise CannotBeMade(f"making the kernel {name!r} failed: {sys.executable} did not start: {error}") from error
        if done.returncode or not fresh.exists():
            last = "\n".join(done.stderr.strip().splitlines()[-15:])
            why = f"making the kernel {name!r} failed (exit status {done.returncode}):\n{last}"
            raise KernelUnavailable(why) if _compiles(work) else CannotBeMade(why)
        # Written beside its place first: a process that looks meanwhile sees all of it or nothing.
        part = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.copyfile(fresh, part)
        part.replace(path)


def _compiles(work: str) -> bool:
    """Whether the compiler does at all: then it was this kernel's fault."""
    source = Path(work) / "nothing.cpp"
    source.write_text("int main() { return 0; }\n")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = [compiler() or "", str(source)]
        return not subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, cwd=work).returncode
    return False


#: Families of kernels that failed in this process, and why; under the second name, why none is made any more.
_failed: dict[str, str] = {}
_NOTHING_MADE = ""


def wanted(family: str) -> bool:
    """True where kernels of that family are to be used: asked for, or not forbidden and likely to be had."""
    if settings.compiled is not None:
        return settings.compiled
    return family not in _failed and _can_be_made()


@functools.cache
def _can_be_made() -> bool:
    found = compiler() is not None and bool(sys.executable)
    if not found:
        logger.info(
            "no C++ compiler was found: products with int8, int4 and float8 weights do without compiled kernels"
        )
    return found


def ready(family: str, wanted: dict[str, Source]) -> bool:
    """Loads kernels of a family. False, and a warning, if that fails and nobody has asked for it in particular.

    Raises:
        KernelUnavailable: ``settings.compiled`` is True.
    """
    if wanted.keys() <= _loaded.keys():
        return True
    if family in _failed and settings.compiled is None:
        return False
    try:
        load(wanted)
    except KernelUnavailable as error:
        if settings.compiled:
            raise
        with _LOCK:
            key = _NOTHING_MADE if isinstance(error, CannotBeMade) else family
            if key not in _failed:
                others = "" if key == family else ", and all others whose kernels have yet to be made,"
                logger.warning(
                    "requanto: %s products%s do without compiled kernels in this process: %s", family, others, error
                )
            _failed[key] = _failed[family] = str(error)
            choices.changed()
        return False
    with _LOCK:
        if _failed.pop(family, None) is not None:  # asked for in particular, it came off this time
            choices.changed()
    return True
