"""Finds the library of CPU kernels, builds it where there is none, and loads it once for the process."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import threading
from pathlib import Path

import torch

from requanto_cpu import build, interface


class LibraryUnavailable(RuntimeError):
    """The CPU kernels cannot be used here; the message says why, and what to do."""


_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """The loaded library; all functions of csrc/requanto_cpu.h with their types. Built first where there is none.

    Raises:
        LibraryUnavailable: it could be neither loaded nor built.
    """
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def levels() -> list[str]:
    """The levels that were built and that this processor has, best last."""
    return library().rq_levels().decode().split(",")


def level() -> str:
    """The level in use."""
    return library().rq_level().decode()


def set_level(name: str) -> None:
    """Uses another level from now on. No kernel may run meanwhile.

    Raises:
        ValueError: there is no such level here.
    """
    if library().rq_set_level(name.encode()):
        raise ValueError(f"this processor and library have no level {name!r}, only {', '.join(levels())}")


def check(code: int) -> None:
    """Raises RuntimeError for an error code of the library."""
    if code < 0:
        raise RuntimeError(f"CPU kernel: {library().rq_error(code).decode()} (code {code}, level {level()})")


def _load() -> ctypes.CDLL:
    folder = Path(os.environ.get("REQUANTO_CACHE") or "~/.cache/requanto").expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        compiler = build.find_compiler()
        path = folder / f"requanto-cpu-{_digest(compiler)}.so"
        if not path.exists():
            build.build(path, compiler)
        loaded = ctypes.CDLL(str(path))
        interface.declare(loaded)
    except (OSError, AttributeError, build.BuildError) as error:
        raise LibraryUnavailable(f"the CPU kernels are not available: {error}") from error
    if loaded.rq_abi() != interface.ABI:
        raise LibraryUnavailable(f"{path} has version {loaded.rq_abi()} of the interface, expected {interface.ABI}")
    _use_threads_of_torch(loaded)
    if (wanted := os.environ.get("REQUANTO_CPU")) and loaded.rq_set_level(wanted.encode()):
        raise LibraryUnavailable(f"REQUANTO_CPU={wanted}, but there are only {loaded.rq_levels().decode()}")
    return loaded


def _use_threads_of_torch(loaded: ctypes.CDLL) -> None:
    torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    loaded.rq_set_parallel(
        ctypes.cast(torch_library.torch_parallel_for, ctypes.c_void_p),
        ctypes.cast(torch_library.torch_get_num_threads, ctypes.c_void_p),
    )


def _digest(compiler: build.Compiler) -> str:
    found = hashlib.sha256(repr((build.FLAGS, build.LEVELS, compiler.version, platform.machine())).encode())
    for source in sorted(build.SOURCES.iterdir()):
        found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return found.hexdigest()[:16]
