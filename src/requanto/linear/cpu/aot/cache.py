"""Kernels that torch.compile's backend makes ahead of time: once on a machine, in a process of their own, kept as files.

A kernel is a function of tensors, written in torch (`Source`). The first process that needs it starts a Python that exports
the function, has AOTInductor compile it, compares it with its source and writes the library; every later one loads the file
in milliseconds, without the compiler's modules, and calls it at a quarter of the cost of a call through torch.compile.

Packages lie in ``$REQUANTO_CACHE``, else ``$XDG_CACHE_HOME/requanto``, else ``~/.cache/requanto``. Their names hold what
they depend on: torch's version, the processor's instructions, the source. So a home directory may be shared by machines.

A cache may be damaged, read-only, somebody else's or full: then a line in the log says so once, and eager operators run
(``settings.compiled`` True: it is an error). Which files are opened at all: `requanto.linear.cpu.aot.trust`.
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
    WITHOUT,
    CannotBeLoaded,
    CannotBeMade,
    KernelUnavailable,
    directory,
    first_line,
    intact,
)
from requanto.runtime.settings import choices, settings

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
    """Where the package of that kernel is, or would be.

    Raises:
        CannotBeLoaded: there is no place for a cache.
    """
    return directory() / f"{name}-{digest_of(source)}-{machine()}.so"


@dataclass
class _Build:
    """Kernels that a thread of this process is making."""

    thread: int = field(default_factory=threading.get_ident)
    done: threading.Event = field(default_factory=threading.Event)


#: Held while kernels are loaded, milliseconds; never while they are made.
_LOCK = threading.RLock()
_loaded: dict[str, Kernel] = {}
_building: dict[str, _Build] = {}
#: Whether another thread went on without a kernel that was being made: its choices are made again afterwards.
_passed_by = False


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
    """Loads kernels by name; those that have never been made, and those whose files are damaged, are made side by side.

    Waits for those that another thread makes.

    Raises:
        KernelUnavailable: one could not be made or loaded. Files that are whole are left as they are.
    """
    while True:
        own, mine = _Build(), {}
        try:
            with _LOCK:
                absent = _load_kept(wanted)
                others = [_building[name] for name in absent if name in _building]
                mine.update((name, path) for name, path in absent.items() if name not in _building)
                _building.update(dict.fromkeys(mine, own))
            make(mine)
            with _LOCK:
                if left := [str(path) for name, path in _load_kept(wanted).items() if name in mine]:
                    raise KernelUnavailable(f"{', '.join(left)}: not there, or damaged, right after it was made")
        finally:
            _built(mine, own)
        if not others:
            return
        for build in others:
            build.done.wait()


def _load_kept(wanted: dict[str, Source]) -> dict[str, Path]:
    """Loads what is kept, in one piece and this user's own; the others' paths by name."""
    absent = {}
    for name, source in wanted.items():
        if name in _loaded:
            continue
        path = path_of(name, source)
        if intact(path):
            _loaded[name] = _checked(name, source, path)
        else:
            absent[name] = path
    return absent


def _built(names: dict[str, Path], build: _Build) -> None:
    global _passed_by
    with _LOCK:
        for name in names:
            if _building.get(name) is build:
                del _building[name]
        again, _passed_by = _passed_by, _passed_by and bool(_building)
    build.done.set()
    if again:
        choices.changed()


def _checked(name: str, source: Source, path: Path) -> Kernel:
    try:
        fresh = Kernel(name, path)
    except (RuntimeError, OSError, AttributeError, TypeError) as error:
        raise CannotBeLoaded(
            f"{path} could not be loaded: {first_line(error)}. Set REQUANTO_CACHE to a directory that code may be loaded "
            f"from, {WITHOUT}."
        ) from error
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
    for key, kind in ((_NOTHING_MADE, CannotBeMade), (_NOTHING_LOADED, CannotBeLoaded)):
        if key in _failed and not settings.compiled:
            raise kind(_failed[key])
    names = ", ".join(repr(name) for name in paths)
    if compiler() is None or not sys.executable:
        raise CannotBeMade(
            f"no C++ compiler for {names}: neither $CXX nor torch's usual one was found. Install g++, {WITHOUT}."
            if sys.executable
            else f"no Python to make {names} with: sys.executable is empty. Make them beforehand (`requanto kernels`)."
        )
    start = time.monotonic()
    _make(paths)
    if why := _failed.get(_NOTHING_MADE):
        for family in [family for family, known in _failed.items() if known == why]:
            del _failed[family]  # the others were not even tried
        choices.changed()
    logger.info("compiled %s in %.0f s", names, time.monotonic() - start)


#: Families of kernels that failed in this process, and why; under the other names, why none is made, or loaded, any more.
_failed: dict[str, str] = {}
_NOTHING_MADE, _NOTHING_LOADED = "", "nothing is loaded"
#: Kernels by the families that are made, or fail, together.
families: dict[str, dict[str, Source]] = {}


def wanted(family: str) -> bool:
    """True where kernels of that family are to be used: asked for, or not forbidden and likely to be had.

    False as well while another thread makes them: this one goes on without, until they are there.
    """
    if settings.compiled is not None:
        return settings.compiled
    if family in _failed or (_building and _made_by_another_thread(families.get(family, {}))):
        return False
    return _can_be_made() or _kept(family, os.environ.get("REQUANTO_CACHE")) or _without_compiler()


def _made_by_another_thread(names: dict[str, Source]) -> bool:
    global _passed_by
    with _LOCK:
        builds = [_building[name] for name in names if name in _building]
        found = any(build.thread != threading.get_ident() for build in builds)
        _passed_by = _passed_by or found
    return found


@functools.cache
def _can_be_made() -> bool:
    return compiler() is not None and bool(sys.executable)


@functools.cache
def _without_compiler() -> bool:
    """False, and a line in the log, once."""
    logger.info(
        "no C++ compiler was found: products with int8, int4 and float8 weights do without compiled kernels, but for those "
        "that were made before"
    )
    return False


@functools.cache
def _kept(family: str, place: str | None) -> bool:
    """Whether all kernels of a family were made before; of use where there is no compiler."""
    del place  # what was found there is remembered
    try:
        return all(path_of(name, source).exists() for name, source in families[family].items())
    except (OSError, KernelUnavailable, KeyError):
        return False


def ready(family: str, wanted: dict[str, Source]) -> bool:
    """Loads kernels of a family. False, and a warning, if that fails and nobody has asked for it in particular.

    False as well while another thread makes them, unless they were asked for.

    Raises:
        KernelUnavailable: ``settings.compiled`` is True.
    """
    if wanted.keys() <= _loaded.keys():
        return True
    if settings.compiled is None and (family in _failed or (_building and _made_by_another_thread(wanted))):
        return False
    try:
        load(wanted)
    except Exception as error:  # whatever it is: without a kernel, the product is the same
        known = isinstance(error, KernelUnavailable)
        if settings.compiled:
            if known:
                raise
            raise KernelUnavailable(f"{family} kernels could not be had: {type(error).__name__}: {error}") from error
        _give_up(family, error, "" if known else f"{type(error).__name__}: ")
        return False
    with _LOCK:
        if _failed.pop(family, None) is not None:  # asked for in particular, it came off this time
            choices.changed()
    return True


def _give_up(family: str, error: Exception, kind: str) -> None:
    everywhere = {CannotBeMade: _NOTHING_MADE, CannotBeLoaded: _NOTHING_LOADED}
    with _LOCK:
        key = everywhere.get(type(error), family)
        if key not in _failed:  # one line for each reason
            others = {_NOTHING_MADE: ", and all others whose kernels have yet to be made,", family: ""}
            logger.warning(
                "requanto: %s products%s do without compiled kernels in this process: %s%s",
                family,
                others.get(key, ", and all others,"),
                kind,
                first_line(error),
            )
            logger.debug("%s", error)  # all of it, the compiler's words too
        _failed[key] = _failed[family] = str(error)
        choices.changed()


def _after_fork() -> None:
    """In a child of fork only the thread that forked is left: nobody else holds a lock, or makes a kernel."""
    global _LOCK, _passed_by
    _LOCK, _passed_by = threading.RLock(), False
    _building.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
