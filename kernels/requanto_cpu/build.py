"""Builds the library of CPU kernels from csrc/ with the system's C++ compiler, in a few seconds.

Each level (instruction set) is one file, compiled with its own flags; a level whose flags the compiler does not know is left
out. Everything else is compiled for the baseline of the platform and picks a level at run time.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"

#: -ffp-contract=off: a * b + c is two roundings unless the source says otherwise, so results equal the reference's.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=off",
)  # fmt: skip

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_X86 = {
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "vnni": (*_AVX512, "-mavx512vnni"),
    "bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
}
_ARM = {"neon": (), "dotprod": ("-march=armv8.2-a+dotprod",)}
#: Flags of each level, by the processor's name.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}

#: Most seconds for one call of the compiler: fifty times what it takes.
TIMEOUT = 300.0
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}


class BuildError(RuntimeError):
    """The library could not be built: no compiler, or one that failed; the message says which."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the words of its command, and the first line of what ``--version`` prints."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """The compiler of $CXX, else c++, g++ or clang++, whichever works first.

    Raises:
        BuildError: none works.
    """
    chosen = os.environ.get("CXX", "")
    tried = []
    for text in [chosen] if chosen else [] if os.name == "nt" else ["c++", "g++", "clang++"]:
        try:
            words = shlex.split(text)
        except ValueError:  # unbalanced quotation marks
            words = [text]
        found = shutil.which(words[0]) if words else None
        if found is None:
            tried.append(f"{text} (not found)")
            continue
        try:
            shown = _run([found, *words[1:], "--version"])
        except BuildError as error:
            tried.append(f"{text} ({str(error).splitlines()[0]})")
            continue
        return Compiler((found, *words[1:]), (shown.splitlines() or [""])[0].strip())
    raise BuildError(
        f"no C++ compiler works: {', '.join(tried) or 'on Windows set CXX to g++ or clang++'}. Install g++ or clang++, or "
        "set CXX to one"
    )


def level_flags(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """Flags of the levels of a processor (this one's by default).

    Raises:
        BuildError: there are no kernels for such processors.
    """
    name = (machine or platform.machine()).lower()
    if name not in LEVELS:
        raise BuildError(f"there are no kernels for {name} processors, only for {', '.join(sorted(LEVELS))}")
    return LEVELS[name]


def build(target: Path, compiler: Compiler, machine: str | None = None, more: tuple[str, ...] = ()) -> list[str]:
    """Compiles all files, as many at a time as there are CPUs, and links them.

    Args:
        target: file to write. Its folder must exist; intermediate files are written into a new folder beside it.
        machine: processor to build for, which the compiler must be for; None: this one.
        more: further flags for compiling and linking.

    Returns:
        Levels that were built.

    Raises:
        BuildError: a file could not be compiled or linked, with the compiler's messages.
        OSError: files cannot be written.
    """
    flags, wanted = [*FLAGS, *more], level_flags(machine)
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=target.parent))
    try:
        with ThreadPoolExecutor(_cpus()) as pool:
            known = dict(zip(wanted, pool.map(lambda extra: _accepts(compiler, extra, work), wanted.values())))
            levels = [level for level in wanted if known[level]]
            have = [f"-DRQ_HAVE_{level.upper()}" for level in levels]
            jobs = {f"level_{level}": wanted[level] for level in reversed(levels)} | {"pack": (), "dispatch": have}
            objects = pool.map(lambda job: _compile(compiler, job[0], [*flags, *job[1]], work), jobs.items())
            files = [str(file) for file in objects]
        static = [] if sys.platform == "darwin" else ["-Wl,--as-needed"]
        output = work / "linked"
        _run([*compiler.command, "-shared", *flags, "-o", str(output), *files, *static], work)
        output.replace(target)
        return levels
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accepts(compiler: Compiler, flags: tuple[str, ...], work: Path) -> bool:
    """True if the compiler knows these flags."""
    try:
        _run([*compiler.command, *flags, "-fsyntax-only", "-x", "c++", os.devnull], work)
    except BuildError:
        return False
    return True


def _compile(compiler: Compiler, name: str, flags: list[str], work: Path) -> Path:
    output = work / f"{name}.o"
    _run([*compiler.command, *flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(output)], work)
    return output


def _run(command: list[str], folder: Path | None = None) -> str:
    """Runs a compiler; returns its standard output.

    Raises:
        BuildError: it failed, took too long or does not start.
    """
    environment = {**os.environ, "LC_ALL": "C"} | ({"TMPDIR": str(folder)} if folder else {})
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish in {TIMEOUT:.0f} s: {shlex.join(command)}") from None
    except OSError as error:
        raise BuildError(f"{command[0]} did not start: {error}") from error
    if done.returncode:
        log = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        wrong = next((line for line in log if "error" in line.lower()), log[-1])
        raise BuildError("\n".join([f"{command[0]} failed: {wrong.strip()}", shlex.join(command), *log[-15:]]))
    return done.stdout.decode(errors="replace")
