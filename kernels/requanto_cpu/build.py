"""Builds the library of CPU kernels from csrc/ with the system's C++ compiler, in a few seconds.

Each level (instruction set) is one file, compiled with flags of its own; a level whose flags the compiler does not know is
left out. Everything else is compiled for the baseline of the platform, and picks a level at run time.

Imports nothing but the standard library: setup.py runs it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

#: -ffp-contract=off: a * b + c is two roundings unless the source says otherwise, so results equal the reference's.
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno",
    "-ffp-contract=off",
)  # fmt: skip
#: For a library that reports every access outside of a buffer. Python must run with LD_PRELOAD=libasan.so.
SANITIZER = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=alignment")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi")
_X86 = {
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),
    "avx512": _AVX512,
    "vnni": (*_AVX512, "-mavx512vnni"),
    "bf16": _BF16,
    "amx": (*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
_ARM = {"neon": (), "dotprod": ("-march=armv8.2-a+dotprod",)}
#: Flags of each level, by the processor's name.
LEVELS: dict[str, dict[str, tuple[str, ...]]] = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}

#: Features in /proc/cpuinfo that a level needs: on x86 those that the operating system has enabled.
_NEEDS_AVX2 = frozenset(("avx2", "fma", "f16c"))
_NEEDS_AVX512 = _NEEDS_AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_NEEDS_BF16 = _NEEDS_AVX512 | {"avx512_vnni", "avx512_bf16", "avx512vbmi"}
NEEDS = {
    "avx2": _NEEDS_AVX2,
    "avxvnni": _NEEDS_AVX2 | {"avx_vnni"},
    "avx512": _NEEDS_AVX512,
    "vnni": _NEEDS_AVX512 | {"avx512_vnni"},
    "bf16": _NEEDS_BF16,
    "amx": _NEEDS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "neon": frozenset(("asimd",)),
    "dotprod": frozenset(("asimd", "asimddp")),
}

#: Most seconds for a build: fifty times what it takes.
TIMEOUT = 300.0
#: Seconds of waiting for a build after which the log says why.
PATIENCE = 3.0
#: Name of the folder of intermediate files, beside the library.
FOLDER = ".build-"
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}


class BuildError(RuntimeError):
    """The library could not be built: no compiler, or one that failed; the message says which."""


class UnknownLevels(BuildError):
    """The compiler works, but knows none of the levels."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the words of its command, the first of which is the path of a program."""

    command: tuple[str, ...]

    @property
    def identity(self) -> str:
        """8 digits for this command and this version of its program. No process is started for it."""
        facts: list[object] = list(self.command)
        for word in self.command:
            found = shutil.which(word)
            if found is None:
                break
            real = os.path.realpath(found)
            info = os.stat(real)
            facts += [real, info.st_size, info.st_mtime_ns]
            if Path(word).stem not in _LAUNCHERS:
                break
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]

    def version(self) -> str:
        """First line of what ``--version`` prints; "unknown" where it fails."""
        with tempfile.TemporaryDirectory() as folder:
            code, text = _run([[*self.command, "--version"]], Path(folder))[0]
        return (text.splitlines() or ["unknown"])[0].strip() if code == 0 else "unknown"


def compilers() -> list[Compiler]:
    """The compilers to try, best first: $CXX if it is set (it may have options), else c++, g++ and clang++.

    Raises:
        BuildError: none is installed.
    """
    chosen = os.environ.get("CXX", "")
    # On Windows the usual compiler is MSVC, which takes other options.
    names = [chosen] if chosen else [] if os.name == "nt" else ["c++", "g++", "clang++"]
    found: dict[tuple[str, ...], Compiler] = {}
    for name in names:
        try:
            words = shlex.split(name)
        except ValueError:  # unbalanced quotation marks
            words = [name]
        program = shutil.which(words[0]) if words else None
        if program is not None:
            found.setdefault((os.path.realpath(program), *words[1:]), Compiler((program, *words[1:])))
    if not found:
        tried = f"$CXX ({chosen})" if chosen else ", ".join(names) or "$CXX"
        raise BuildError(f"no C++ compiler was found: {tried}. Install g++ or clang++, or set CXX to one")
    return list(found.values())


def level_flags(machine: str | None = None) -> dict[str, tuple[str, ...]]:
    """Flags of the levels of a processor (this one's by default).

    Raises:
        BuildError: there are no kernels for such processors.
    """
    name = (machine or platform.machine()).lower()
    if name not in LEVELS:
        raise BuildError(f"there are no kernels for {name} processors, only for {', '.join(sorted(LEVELS))}")
    return LEVELS[name]


def processor_levels() -> list[str] | None:
    """The levels that this processor has, best last, by /proc/cpuinfo; None where there is no such file.
    AMX only if the system lets this process use it.

    The library asks the processor itself; this is to build only what is needed.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):
            here = set(features.split())
            levels = [level for level in LEVELS.get(platform.machine().lower(), ()) if NEEDS[level] <= here]
            return [level for level in levels if level != "amx" or _may_use_tiles()]
    return None


def _may_use_tiles() -> bool:
    """Whether Linux gives this process AMX's tiles, asked as in dispatch.cpp: kernels before 5.16 and sandboxes may not."""
    with contextlib.suppress(OSError, AttributeError):
        arguments = 158, 0x1023, 18  # arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments)) == 0  # type: ignore[no-any-return]
    return False


def library_name() -> str:
    """``requanto-cpu-`` and 12 digits for the sources, the flags and the platform."""
    facts = FLAGS, LEVELS, platform.system(), platform.machine(), platform.libc_ver()[0]
    found = hashlib.sha256(repr(facts).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            found.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return f"requanto-cpu-{found.hexdigest()[:12]}"


def build(
    target: Path,
    compiler: Compiler,
    machine: str | None = None,
    more: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
) -> list[str]:
    """Compiles all files, several at a time, and links them.

    Args:
        target: file to write. Its folder must exist; intermediate files are written into a new folder beside it.
        machine: processor to build for, which the compiler must be for; None: this one.
        more: further flags for compiling and linking.
        only: levels to build; None: all that the compiler knows.

    Returns:
        Levels that were built.

    Raises:
        BuildError: a file could not be compiled or linked, with the compiler's messages.
        UnknownLevels: the compiler works, but knows none of the levels.
        OSError: files cannot be written.
    """
    wanted = level_flags(machine)
    if only is not None:
        if unknown := ", ".join(level for level in only if level not in wanted):
            raise BuildError(f"there is no level {unknown}, only {', '.join(wanted)}")
        wanted = {level: wanted[level] for level in only}
    # RQ_ALONE: a level has all its functions itself, and shares none with levels that may be missing.
    command = [*compiler.command, *FLAGS, *more, *(["-DRQ_ALONE"] if only else [])]
    work = Path(tempfile.mkdtemp(prefix=FOLDER, dir=target.parent))
    try:
        probes = [
            [*compiler.command, *flags, "-fsyntax-only", "-x", "c++", os.devnull] for flags in ((), *wanted.values())
        ]
        (code, text), *known = _run(probes, work)
        if code:
            raise _failed(probes[0], code, text)
        levels = [level for level, (code, _) in zip(wanted, known) if code == 0]
        if not levels:
            raise UnknownLevels(f"{compiler.command[0]} does not know the instructions of: {', '.join(wanted)}")
        if left_out := ", ".join(level for level in wanted if level not in levels):
            logger.info("%s does not know the instructions of: %s", compiler.command[0], left_out)
        have = [f"-DRQ_HAVE_{level.upper()}" for level in levels]
        # The levels first, since they take the longest, and of them the longest. Each is built in two parts (kernels.h).
        parts = [
            (f"level_{level}", [*wanted[level], f"-D{part}"])
            for level in reversed(levels)
            for part in ("RQ_FLOATS_APART", "RQ_FLOATS_ONLY")
        ]
        parts += [("pack", []), ("dispatch", have)]
        files = [str(work / f"{number}-{name}.o") for number, (name, _) in enumerate(parts)]
        jobs = [
            [*command, *own, "-c", str(SOURCES / f"{name}.cpp"), "-o", file] for (name, own), file in zip(parts, files)
        ]
        linked = str(work / "linked")
        libraries = [] if sys.platform == "darwin" else ["-Wl,--as-needed"]
        for commands in (jobs, [[*command, "-shared", "-o", linked, *libraries, *files]]):
            for job, (code, text) in zip(commands, _run(commands, work)):
                if code:
                    raise _failed(job, code, text)
        if not os.path.exists(linked):
            raise BuildError(f"{compiler.command[0]} succeeded, but wrote no library")
        os.replace(linked, target)
        return levels
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Waiting:
    """Time spent waiting for a build: after PATIENCE seconds the log says why, once.

    Args:
        line, values: of the log.
    """

    def __init__(self, line: str, *values: object) -> None:
        self._start, self._told, self._line = time.monotonic(), False, (line, *values)

    def is_too_long(self) -> bool:
        """Whether TIMEOUT is over."""
        seconds = time.monotonic() - self._start
        if seconds > PATIENCE and not self._told:
            self._told = True
            logger.warning(*self._line)
        return seconds > TIMEOUT


def _failed(command: list[str], code: int, text: str) -> BuildError:
    lines = text.strip().splitlines() or ["it printed no message"]
    wrong = next((line for line in lines if "error" in line.lower()), lines[-1])
    return BuildError("\n".join([f"{command[0]} failed ({code}): {wrong.strip()}", shlex.join(command), *lines[-15:]]))


def _run(commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Runs programs, as many at a time as there are CPUs; returns the exit status and the output of each.

    Polls them at short intervals, so that KeyboardInterrupt works and no further thread is needed.

    Raises:
        BuildError: one did not start, or all together took too long.
        OSError: their output cannot be written.
    """
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)}
    patience = Waiting("requanto: building the CPU kernels with %s, which is done once", commands[0][0])
    waiting, codes = list(enumerate(commands)), [0] * len(commands)
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < most:
                number, command = waiting.pop(0)
                with open(folder / f"log{number}", "wb") as log:
                    running[number] = _start(command, environment, folder, log)
            for number, process in list(running.items()):
                if process.poll() is not None:
                    codes[number] = running.pop(number).returncode
            if patience.is_too_long():
                raise BuildError(f"{commands[0][0]} did not finish in {TIMEOUT:.0f} s")
            if running:
                time.sleep(0.005)
    finally:
        for process in running.values():
            _kill(process)
    return [(code, (folder / f"log{number}").read_text(errors="replace")) for number, code in enumerate(codes)]


def _start(command: list[str], environment: dict[str, str], folder: Path, log: object) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,  # type: ignore[call-overload]
            stderr=log,
            start_new_session=True,  # its own process group, so that what it starts can be killed with it
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: the interpreter is ending
        raise BuildError(f"{command[0]} did not start: {error}") from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
