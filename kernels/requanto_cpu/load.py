"""Loads the library of CPU kernels, once for the process, and selects its level."""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from pathlib import Path

from requanto_cpu import build, cache, interface
from requanto_cpu.trust import LibraryUnavailable, first_line

logger = logging.getLogger(__name__)

#: The value of REQUANTO_CPU for no kernels at all.
TORCH = "torch"
#: Names that REQUANTO_CPU may have.
NAMES = (*dict.fromkeys(name for levels in build.LEVELS.values() for name in levels), TORCH)

_lock = threading.Lock()
_loaded: ctypes.CDLL | None = None
_path: Path | None = None
#: Why the library cannot be had, and the environment for which that was found.
_failed: tuple[tuple[str | None, ...], LibraryUnavailable] | None = None


def library() -> ctypes.CDLL:
    """The loaded library: all functions of csrc/requanto_cpu.h with their types. Built first where there is none.

    The level is that of REQUANTO_CPU, else the best that the processor has. A failure is remembered, until
    REQUANTO_CACHE, REQUANTO_CPU or CXX changes.

    Raises:
        LibraryUnavailable: it could be neither loaded nor built, the processor lacks AVX2, or REQUANTO_CPU is "torch".
        ValueError: REQUANTO_CPU names no level, or none that there is here.
    """
    return _loaded if _loaded is not None else _load_once()


def path() -> Path:
    """The file of the loaded library.

    Raises:
        LibraryUnavailable, ValueError: as `library`.
    """
    library()
    assert _path is not None
    return _path


def build_all() -> Path:
    """The file of a library with all levels that the compiler knows, built if there is none; it is not loaded.

    At its first use only the level of this processor is built.

    Raises:
        LibraryUnavailable: as `library`.
    """
    return cache.find()


def levels() -> list[str]:
    """The levels that were built and that this processor has, best last."""
    return _names(library().rq_levels())


def level() -> str:
    """The level in use."""
    return library().rq_level().decode()  # type: ignore[no-any-return]


def set_level(name: str) -> None:
    """Uses another level from now on. No kernel may run meanwhile.

    Raises:
        ValueError: there is no such level here.
        LibraryUnavailable: as `library`.
    """
    _select(library(), name, "set_level")


def check(code: int) -> None:
    """Raises RuntimeError for an error code of the library."""
    if code < 0:
        raise RuntimeError(f"CPU kernel: {library().rq_error(code).decode()} (code {code}, level {level()})")


def _load_once() -> ctypes.CDLL:
    global _loaded, _path, _failed
    with _lock:  # other threads wait: a build takes a few seconds
        if _loaded is not None:
            return _loaded
        environment = tuple(os.environ.get(name) for name in ("REQUANTO_CPU", "REQUANTO_CACHE", "CXX"))
        if _failed is not None and _failed[0] == environment:
            raise LibraryUnavailable(str(_failed[1]))
        wanted = environment[0] or ""
        if wanted and wanted not in NAMES:
            raise ValueError(f"REQUANTO_CPU is {wanted!r}, expected one of {', '.join(NAMES)}, or nothing for the best")
        try:
            if wanted == TORCH:
                raise LibraryUnavailable(f"REQUANTO_CPU is {TORCH!r}: no kernels are wanted. Unset it to use them")
            file, found = _open(_needed(wanted))
        except LibraryUnavailable as error:
            _failed = environment, error
            raise
        if wanted:
            _select(found, wanted, "REQUANTO_CPU")
        _loaded, _path, _failed = found, file, None
        logger.debug("CPU kernels: %s, level %s", file, found.rq_level().decode())
        return found


def _open(level: str | None) -> tuple[Path, ctypes.CDLL]:
    """Finds the library and loads it; once more if somebody removes the file in between."""
    file = cache.find(level)
    try:
        return file, open_library(file)
    except LibraryUnavailable:
        if file.exists():
            raise
    file = cache.find(level)
    return file, open_library(file)


def _needed(wanted: str) -> str | None:
    """The level that a library must have: that of REQUANTO_CPU, else this processor's best; None: all.

    Raises:
        ValueError: this processor lacks it.
        LibraryUnavailable: it lacks all of them.
    """
    here = build.processor_levels()
    if here is None:
        return None
    level = wanted or (here[-1] if here else "")
    if level in here:
        return level
    if not wanted:
        known = ", ".join(build.level_flags())
        raise LibraryUnavailable(f"this processor has none of the instruction sets that they are built for: {known}")
    names = ", ".join([*here, TORCH])
    raise ValueError(
        f"REQUANTO_CPU is {wanted!r}, but this processor does not have its instructions. There are {names}"
    )


def open_library(file: Path) -> ctypes.CDLL:
    """Loads a library, checks its version and its processor, and gives it torch's threads.

    Raises:
        LibraryUnavailable: it cannot be loaded, or does not run here.
    """
    try:
        found = ctypes.CDLL(str(file))
        interface.declare(found)
    except (OSError, AttributeError) as error:
        why = first_line(error).removeprefix(f"{file}: ")
        raise LibraryUnavailable(
            f"{file} could not be loaded: {why}. Set REQUANTO_CACHE to a directory from which code can be loaded"
        ) from error
    if found.rq_abi() != interface.ABI:
        raise LibraryUnavailable(f"{file} has version {found.rq_abi()} of the interface, expected {interface.ABI}")
    if not found.rq_levels():
        raise LibraryUnavailable(
            "this processor has none of the instruction sets that they are built for: "
            f"{', '.join(_names(found.rq_built()))}"
        )
    _use_threads_of_torch(found)
    return found


def _use_threads_of_torch(found: ctypes.CDLL) -> None:
    import torch

    if os.name == "nt":
        place = str(Path(torch.__file__).parent / "lib" / "torch_cpu.dll")
    else:
        place = torch._C.__file__  # symbols are also looked up in the libraries that it is linked with
    try:
        functions = ctypes.CDLL(place)
        addresses = [
            ctypes.cast(function, ctypes.c_void_p)
            for function in (functions.torch_parallel_for, functions.torch_get_num_threads)
        ]
    except (OSError, AttributeError) as error:
        raise LibraryUnavailable(
            f"torch {torch.__version__} has no torch_parallel_for ({first_line(error)}); it came with torch 2.10"
        ) from error
    found.rq_set_parallel(*addresses)


def _select(found: ctypes.CDLL, name: str, what: str) -> None:
    if found.rq_set_level(name.encode()) == 0:
        return
    built, here = _names(found.rq_built()), _names(found.rq_levels())
    if name in built:
        why = "this processor does not have its instructions"
    else:
        why = (
            "this library was built without it (for another kind of processor, or by a compiler that does not know it)"
        )
    raise ValueError(f"{what} is {name!r}, but {why}. There are {', '.join(here)} and {TORCH}")


def _names(text: bytes) -> list[str]:
    return text.decode().split(",") if text else []


def _after_fork() -> None:
    """In the child of a fork, no other thread exists: none that could hold the lock, and none that kernels could use."""
    global _lock
    _lock = threading.Lock()
    if _loaded is not None and _loaded.rq_forked():
        logger.info(
            "a fork of a process whose CPU kernels ran on several threads: here they run on one, since OpenMP's threads do "
            "not survive a fork. Start processes by spawn or forkserver to use more"
        )


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
