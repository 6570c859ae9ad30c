"""Builds `kernels/tests/cpu_main.cpp` with the library of CPU kernels, for this processor or another, and runs it."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import cpu_cases

from requanto_cpu import build, load

_MAIN = Path(__file__).resolve().parents[2] / "kernels" / "tests" / "cpu_main.cpp"
#: The library at -O3 is for its users: these take a fifth of the time to compile, and the cases are small.
QUICK = ("-O0",)
SANITIZE = (*build.SANITIZER, "-fno-sanitize-recover=undefined", "-g1", *QUICK)


@dataclass(frozen=True)
class Program:
    """`before`: words of the command in front of the program's path, of an emulator."""

    path: Path
    before: tuple[str, ...] = ()

    def run(self, *arguments: str) -> str:
        """Standard output, without the line's end; AssertionError with all that it printed if it fails."""
        # Under qemu the cross compiler's libraries are found by -L; leaks are no fault of a program that exits.
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
        words = [*self.before, str(self.path), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, f"{words}: code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def levels(self) -> list[str]:
        return [level for level in self.run().split(",") if level]

    def compare(self, cases: list[cpu_cases.Case], level: str, folder: Path, threads: int = 1, *mode: str) -> None:
        """Runs all cases at a level; AssertionError names the first wrong one."""
        given, results = folder / "cases", folder / f"results-{level}"
        cpu_cases.write(cases, given)
        self.run(level, str(given), str(results), str(threads), *mode)
        cpu_cases.check(cases, results)

    def emulated(self, *before: str) -> Program:
        return Program(self.path, before)


def program(command: str, machine: str | None = None, more: tuple[str, ...] = ()) -> Program:
    """Builds the library and the program with a compiler, once for these sources (beside pytest's cache, see conftest)."""
    compiler = build.Compiler((shutil.which(command) or command,))
    digest = hashlib.sha256(repr((command, machine, more, build.FLAGS, build.LEVELS, platform.machine())).encode())
    for source in [*sorted(build.SOURCES.iterdir()), *sorted(_MAIN.parent.glob("*.h")), _MAIN]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = Path(os.environ["REQUANTO_CACHE"]) / "cpu-programs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{command}-{digest.hexdigest()[:16]}"
    if not path.exists():
        library = path.with_name(f"lib{path.name}.so")
        build.build(library, compiler, machine, more)
        _link(compiler, library, path, more)
    return Program(path)


def native_program() -> Program:
    """The program with the library that Requanto itself uses here."""
    library = load.path()
    path = Path(os.environ["REQUANTO_CACHE"]) / "cpu-programs" / f"{library.stem}-{_MAIN.stat().st_mtime_ns}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _link(build.Compiler((shutil.which("g++") or "g++",)), library, path, ())
    return Program(path)


def _link(compiler: build.Compiler, library: Path, path: Path, more: tuple[str, ...]) -> None:
    made = path.with_name(f"{path.name}.{os.getpid()}")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", *more, f"-I{build.SOURCES}"]
    subprocess.run([*compiler.command, *flags, str(_MAIN), str(library), "-o", str(made)], check=True)
    made.replace(path)
