"""CPU kernels compiled by AOTInductor, once per machine, and their cache on disk.

A kernel is a function of tensors, written in torch (`Source`). The first process that needs it starts a subprocess that
exports the function, compiles it with AOTInductor, compares it with its source and writes the library. Later processes load
the file in milliseconds, without importing the compiler. A call costs a quarter of one through torch.compile.

Libraries are in ``$REQUANTO_CACHE``, else ``$XDG_CACHE_HOME/requanto``, else ``~/.cache/requanto``. Their names include what
they depend on (torch's version, CPU features, the source), so machines can share a home directory.

If the cache is damaged, read-only, full or owned by another user, one line is logged and eager operators are used; with
``settings.compiled = True``, an error is raised instead. `requanto.linear.cpu.aot.trust` decides which files are loaded.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from requanto.linear.cpu.aot.package import Kernel, check
from requanto.linear.cpu.aot.processes import compiler
from requanto.linear.cpu.aot.processes import make as _make
from requanto.linear.cpu.aot.source import Source, digest_of, machine, plain_mode
from requanto.linear.cpu.aot.trust import (
    OR_DISABLE,
    CannotBeLoaded,
    CannotBeMade,
    KernelUnavailable,
    directory,
    first_line,
    intact,
)
from requanto.runtime.settings import registry_state, settings

__all__ = [
    "CannotBeLoaded",
    "CannotBeMade",
    "Kernel",
    "KernelUnavailable",
    "Source",
    "check",
    "compiler",
    "directory",
    "families",
    "kernel",
    "load",
    "make",
    "path_of",
    "plain_mode",
    "ready",
    "wanted",
]

logger = logging.getLogger(__name__)


def path_of(name: str, source: Source) -> Path:
    """Path of a kernel's library in the cache, whether it exists or not.

    Raises:
        CannotBeLoaded: there is no folder for the cache.
    """
    return directory() / f"{name}-{digest_of(source)}-{machine()}.so"


@dataclass
class _Build:
    """A compilation of kernels by a thread of this process."""

    thread: int = field(default_factory=threading.get_ident)
    done: threading.Event = field(default_factory=threading.Event)


#: Held while kernels are loaded (milliseconds), never while they are compiled.
_LOCK = threading.RLock()
_loaded: dict[str, Kernel] = {}
_building: dict[str, _Build] = {}
#: True if another thread used eager operators because a kernel was being compiled; implementations are then selected anew
#: after the compilation.
_build_was_skipped = False


def kernel(name: str, source: Source) -> Kernel:
    """The kernel of that name; loads it, and compiles it first if it is not in the cache.

    Raises:
        KernelUnavailable: it could not be compiled or loaded.
    """
    found = _loaded.get(name)
    if found is None:
        load({name: source})
        found = _loaded[name]
    return found


def load(wanted: dict[str, Source]) -> None:
    """Loads kernels; compiles, in parallel, those that are missing in the cache or damaged.

    Waits for kernels that another thread is compiling.

    Raises:
        KernelUnavailable: one could not be compiled or loaded. Intact files are not changed.
    """
    while True:
        this_build, mine = _Build(), {}
        try:
            with _LOCK:
                absent = _load_cached(wanted)
                others = [_building[name] for name in absent if name in _building]
                mine.update((name, path) for name, path in absent.items() if name not in _building)
                _building.update(dict.fromkeys(mine, this_build))
            make(mine)
            with _LOCK:
                if left := [str(path) for name, path in _load_cached(wanted).items() if name in mine]:
                    raise KernelUnavailable(f"{', '.join(left)}: missing or damaged right after compilation")
        finally:
            _finish_build(mine, this_build)
        if not others:
            return
        for build in others:
            build.done.wait()


def _load_cached(wanted: dict[str, Source]) -> dict[str, Path]:
    """Loads the kernels that are in the cache and intact; returns the paths of the others by name."""
    absent = {}
    for name, source in wanted.items():
        if name in _loaded:
            continue
        path = path_of(name, source)
        if intact(path):
            _loaded[name] = _load_and_check(name, source, path)
        else:
            absent[name] = path
    return absent


def _finish_build(names: dict[str, Path], build: _Build) -> None:
    global _build_was_skipped
    with _LOCK:
        for name in names:
            if _building.get(name) is build:
                del _building[name]
        again, _build_was_skipped = _build_was_skipped, _build_was_skipped and bool(_building)
    build.done.set()
    if again:
        registry_state.changed()


def _load_and_check(name: str, source: Source, path: Path) -> Kernel:
    try:
        fresh = Kernel(name, path)
    except (RuntimeError, OSError, AttributeError, TypeError) as error:
        raise CannotBeLoaded(
            f"{path} could not be loaded: {first_line(error)}. Set REQUANTO_CACHE to a directory from which code can be "
            f"loaded, {OR_DISABLE}."
        ) from error
    check(fresh, source, name)
    return fresh


def make(paths: dict[str, Path]) -> None:
    """Compiles kernels and writes them to ``paths``, each in a subprocess.

    Raises:
        CannotBeMade: no working compiler, or the cache cannot be written.
        KernelUnavailable: compiling one of the kernels failed or took too long.
    """
    if not paths:
        return
    for key, kind in ((_ALL_BUILDS, CannotBeMade), (_ALL_LOADS, CannotBeLoaded)):
        if key in _failed and not settings.compiled:
            raise kind(_failed[key])
    names = ", ".join(repr(name) for name in paths)
    if compiler() is None or not sys.executable:
        raise CannotBeMade(
            f"no C++ compiler for {names}: neither $CXX nor torch's default was found. Install g++, {OR_DISABLE}."
            if sys.executable
            else f"cannot compile {names}: sys.executable is empty. Compile them beforehand with `requanto kernels`."
        )
    start = time.monotonic()
    _make(paths)
    if why := _failed.get(_ALL_BUILDS):
        for family in [family for family, known in _failed.items() if known == why]:
            del _failed[family]  # failed for this reason only, without having been tried
        registry_state.changed()
    logger.info("compiled %s in %.0f s", names, time.monotonic() - start)


#: Reasons of failures in this process, by family; and, by the two keys below, why no kernel is compiled or loaded any more.
_failed: dict[str, str] = {}
_ALL_BUILDS, _ALL_LOADS = "", "nothing is loaded"
#: Sources of kernels by family.
families: dict[str, dict[str, Source]] = {}


def wanted(family: str) -> bool:
    """True if kernels of that family are to be used: required by the settings, or allowed and probably available.

    False while another thread compiles them; this thread uses eager operators until they are available.
    """
    if settings.compiled is not None:
        return settings.compiled
    if family in _failed or (_building and _made_by_another_thread(families.get(family, {}))):
        return False
    return _can_be_made() or _all_cached(family, os.environ.get("REQUANTO_CACHE")) or _log_missing_compiler()


def _made_by_another_thread(names: dict[str, Source]) -> bool:
    global _build_was_skipped
    with _LOCK:
        builds = [_building[name] for name in names if name in _building]
        found = any(build.thread != threading.get_ident() for build in builds)
        _build_was_skipped = _build_was_skipped or found
    return found


@functools.cache
def _can_be_made() -> bool:
    return compiler() is not None and bool(sys.executable)


@functools.cache
def _log_missing_compiler() -> bool:
    """Logs once that there is no compiler; returns False."""
    logger.info(
        "no C++ compiler was found: GEMMs with int8, int4 and float8 weights use only the compiled kernels that are in the "
        "cache"
    )
    return False


@functools.cache
def _all_cached(family: str, place: str | None) -> bool:
    """True if all kernels of a family are in the cache, which matters if there is no compiler."""
    del place  # only a key for functools.cache
    try:
        return all(path_of(name, source).exists() for name, source in families[family].items())
    except (OSError, KernelUnavailable, KeyError):
        return False


def ready(family: str, wanted: dict[str, Source]) -> bool:
    """Loads the kernels of a family, compiling them if necessary. If that fails, logs a warning and returns False.

    Also False while another thread compiles them, unless ``settings.compiled`` is True.

    Raises:
        KernelUnavailable: it fails and ``settings.compiled`` is True.
    """
    if wanted.keys() <= _loaded.keys():
        return True
    if settings.compiled is None and (family in _failed or (_building and _made_by_another_thread(wanted))):
        return False
    try:
        load(wanted)
    except Exception as error:  # any error: eager operators give the same result
        known = isinstance(error, KernelUnavailable)
        if settings.compiled:
            if known:
                raise
            raise KernelUnavailable(f"{family} kernels are not available: {type(error).__name__}: {error}") from error
        _record_failure(family, error, "" if known else f"{type(error).__name__}: ")
        return False
    with _LOCK:
        if _failed.pop(family, None) is not None:  # it failed before, and succeeded with settings.compiled = True
            registry_state.changed()
    return True


def _record_failure(family: str, error: Exception, kind: str) -> None:
    everywhere = {CannotBeMade: _ALL_BUILDS, CannotBeLoaded: _ALL_LOADS}
    with _LOCK:
        key = everywhere.get(type(error), family)
        if key not in _failed:  # one line per reason
            others = {_ALL_BUILDS: ", and all others whose kernels are not compiled yet,", family: ""}
            logger.warning(
                "requanto: %s GEMMs%s do not use compiled kernels in this process: %s%s",
                family,
                others.get(key, ", and all others,"),
                kind,
                first_line(error),
            )
            logger.debug("%s", error)  # with the compiler's output
        _failed[key] = _failed[family] = str(error)
        registry_state.changed()


def _after_fork() -> None:
    """In the child of a fork, no other thread exists that could hold the lock or compile a kernel."""
    global _LOCK, _build_was_skipped
    _LOCK, _build_was_skipped = threading.RLock(), False
    _building.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
