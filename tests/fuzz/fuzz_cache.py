"""Damages the cache of the CPU kernels, forks beside threads that use it, and counts what comes of it.

    python tests/fuzz/fuzz_cache.py --count 400 --forks 200 --seed 0 --out summary.json

Each damaged file is met by a forked child, which looks for the kernels and computes with them. Outcomes:

torch         no kernels, and one line in the log
used          the kernels are used, and their result is right: the change did not concern them
crash, hang   the child was ended by a signal, or by the limit of 20 seconds
raised        looking for the kernels raised an error
silent, noisy no kernels without a line in the log, or with several
wrong         another result
foreign       a file outside of the cache was changed

Each fork happens while threads of its parent pack weights, load the library, build it (a stand-in) and compute. The child
does the same and must end: ``forked``, or ``hang``, ``crash``, ``raised``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import requanto_cpu
from requanto import QTensor
from requanto.linear.cpu import library
from requanto.runtime.settings import settings
from requanto_cpu import build, cache, load, trust

SECONDS = 20
ALLOWED = ("torch", "used", "forked")
OTHER = f"requanto-cpu-{'0' * 12}-{'1' * 8}{cache.SUFFIX}"  # a library of other sources

# ---------------------------------------------------------------------- damage


def truncated(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 8, 1000])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def header(path: Path, rng: random.Random) -> None:
    """Within the first bytes: the ELF header and its tables."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(min(1024, len(content)))
    content[place : place + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
    path.write_bytes(content)


def another_machine(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[18:20] = rng.choice([0xB7, 0x28, 0xF3, 0x16]).to_bytes(2, "little")
    path.write_bytes(content)


def zeroed(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    size = min(rng.choice([64, 4096, 10**6]), len(content) - start)
    content[start : start + size] = bytes(size)
    path.write_bytes(content)


def grown(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 4096])))


def replaced(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice([b"", b"\0", b"\x7fELF", b"#!/bin/sh\ntouch was-run\n", rng.randbytes(5000)]))


def gone(path: Path, rng: random.Random) -> None:
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def a_socket(path: Path, rng: random.Random) -> None:
    path.unlink()
    place = path.with_name("s")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(place))
    place.rename(path)


def device(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full", "/dev/urandom", "/proc/self/mem"]))


def link(path: Path, rng: random.Random) -> None:
    target = path.with_name("target")
    kind = rng.choice(["loop", "dangling", "moved"])
    if kind == "moved":
        path.rename(target)
    else:
        path.unlink()
    path.symlink_to(path if kind == "loop" else target)


def mode(path: Path, rng: random.Random) -> None:
    path.chmod(rng.choice([0o666, 0o777, 0o620, 0o602, 0o4755]))


def owner(path: Path, rng: random.Random) -> None:
    os.chown(path, rng.choice([1000, 65534]), -1)


def lock(path: Path, rng: random.Random) -> None:
    """A missing file, and a lock that is no file."""
    place = path.with_name(path.name.removesuffix(".sha256") + ".lock")
    rng.choice([os.mkfifo, os.mkdir, lambda place: os.symlink(place, place)])(place)
    path.unlink()


def folders(path: Path, rng: random.Random) -> None:
    """The folder is writable by others, unreadable, or not this user's."""
    if rng.random() < 0.3 and os.geteuid() == 0:
        os.chown(path.parent, 1000, -1)
    else:
        path.parent.chmod(rng.choice([0o777, 0o1777, 0o775]))


def other_sources(path: Path, rng: random.Random) -> None:
    """The library of other sources, or its digest, under this one's name."""
    shutil.copy(path.with_name(f"{OTHER}.sha256" if path.suffix == ".sha256" else OTHER), path)


def with_its_digest(path: Path, rng: random.Random) -> None:
    """The library of other sources under this one's name, with a digest that somebody made for it."""
    trust.write(path.with_name(path.name.removesuffix(".sha256")), path.with_name(OTHER).read_bytes())


def swapped(path: Path, rng: random.Random) -> None:
    """Library and digest in each other's place."""
    other = path.with_suffix("") if path.suffix == ".sha256" else path.with_name(f"{path.name}.sha256")
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


FILES: list[Callable[[Path, random.Random], None]] = [
    *(truncated, flipped, header, another_machine, zeroed, grown, replaced, gone, folder, fifo, a_socket, device, link),
    *(mode, other_sources, with_its_digest, swapped, lock, folders),
]
if hasattr(os, "geteuid") and os.geteuid() == 0:
    FILES.append(owner)


def damage(path: Path, rng: random.Random) -> str:
    """Changes the library ``path`` or its digest; returns what was changed."""
    how = rng.choice(FILES)
    digest = path.with_name(f"{path.name}.sha256")
    which = rng.choice([path, path, digest])
    how(which, rng)
    return f"{how.__name__} {'library' if which is path else 'digest'}"


# ---------------------------------------------------------------------- children


def forget() -> None:
    """Makes this process one that has loaded nothing."""
    settings.compiled = None
    load._loaded = load._path = load._failed = None
    library._library = library.why_not = None
    library._is_whole = lambda *_: True


def write(content: bytes) -> Path:
    """Writes the library into the cache; returns its path."""
    path = cache.path_of(build.compilers()[0], load._needed(""))
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    trust.write(path, content + trust.mark(path.name))
    return path


def example() -> torch.Tensor:
    """Plain codes of 8 bits."""
    return torch.arange(70 * 100, device="cpu").remainder(251).to(torch.uint8).view(70, 100)


def strips(codes: torch.Tensor) -> torch.Tensor | None:
    """The codes as strips, by the kernels, and from them as codes again; None where there are no kernels."""
    found = library.find()
    if found is None:
        return None
    rows, length = codes.shape
    packed = torch.empty(-(-rows // 16) * -(-length // 32) * 512, dtype=torch.uint8, device="cpu")
    found.pack(codes.data_ptr(), 8, rows, length, 0, packed.data_ptr())
    back = torch.empty_like(codes)
    found.codes(packed.data_ptr(), 8, rows, length, 0, 0, rows, None, back.data_ptr())
    return back


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def in_child(function: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Outcome and text of ``function`` in a forked child."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        told = "crash", "no outcome"
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            if os.environ.get("REQUANTO_FUZZ_TRACE"):
                faulthandler.dump_traceback_later(SECONDS - 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            torch.set_num_threads(1)
            told = function()
        except BaseException as error:
            told = "raised", f"{type(error).__name__}: {error}"[:300]
        finally:
            with contextlib.suppress(BaseException):
                os.write(write, json.dumps(told).encode()[:4000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang" if number == signal.SIGALRM else "crash"), signal.Signals(number).name
    return tuple(json.loads(told)) if told else ("crash", "it ended without a word")


def meets(place: Path) -> tuple[str, str]:
    """What a process makes of the cache at ``place``."""
    os.environ["REQUANTO_CACHE"] = str(place)
    os.environ["CXX"] = build.compilers()[0].command[0]  # no others are tried, which is a line in the log
    forget()

    def fails(target: Path, compiler: build.Compiler, only: tuple[str, ...] | None = None) -> list[str]:
        raise build.BuildError("nothing is built here")

    build.build = fails
    handler = Lines()
    for name in ("requanto", "requanto_cpu"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    os.chdir(place)
    back = strips(EXAMPLE)
    if back is not None:
        return ("used", "") if torch.equal(back, EXAMPLE) else ("wrong", "")
    if len(handler.lines) != 1:
        return ("noisy" if handler.lines else "silent"), " | ".join(handler.lines)
    return "torch", handler.lines[0]


def one(content: bytes, scratch: Path, seed: int) -> dict[str, Any]:
    """Damages a cache and meets it, all drawn from the seed."""
    rng = random.Random(seed)
    place = scratch / "cache"
    shutil.rmtree(place, ignore_errors=True)
    os.environ["REQUANTO_CACHE"] = str(place)
    path = write(content)
    trust.write(place / OTHER, content + trust.mark(OTHER))
    told = damage(path, rng)
    started = time.monotonic()
    outcome, text = in_child(lambda: meets(place))
    if (place / "was-run").exists():
        outcome = "foreign"
    return {"seed": seed, "damage": told, "outcome": outcome, "text": text, "seconds": time.monotonic() - started}


# ---------------------------------------------------------------------- forks


EXAMPLE = example()


class Busy:
    """Threads that pack weights, load the library, build it (a stand-in) and compute, until it is closed."""

    def __init__(self, content: bytes) -> None:
        self.content, self.stop, self.failed = content, threading.Event(), []
        work = (self._pack, self._load, self._build, self._compute)
        self.threads = [threading.Thread(target=self._repeat, args=(function,), daemon=True) for function in work]

    def __enter__(self) -> Busy:
        build.build = self._write
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads)
        assert not self.failed, self.failed[0]

    def _repeat(self, function: Callable[[], None]) -> None:
        try:
            while not self.stop.is_set():
                function()
        except BaseException as error:
            self.failed.append(repr(error))

    def _write(self, target: Path, compiler: build.Compiler, only: tuple[str, ...] | None = None) -> list[str]:
        self.stop.wait(0.002)
        target.write_bytes(self.content)
        return ["avx2"]

    def _pack(self) -> None:
        for kind in ("int4", "int8", "float8"):
            weight = QTensor.quantize(torch.ones(64, 128, dtype=torch.bfloat16, device="cpu"), kind)
            # No random numbers: torch's own generator stays locked in a fork beside a thread that draws from it.
            layer = torch.nn.Linear(128, 64, bias=False, device="meta")
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            with torch.no_grad():
                layer(torch.ones(3, 128, dtype=torch.bfloat16, device="cpu"))
            weight.unpack()

    def _load(self) -> None:
        load._loaded = library._library = None
        load.library()

    def _build(self) -> None:
        with contextlib.suppress(OSError):
            cache.path_of(build.compilers()[0], load._needed("")).unlink()
        cache.find(load._needed(""))

    def _compute(self) -> None:
        assert torch.equal(strips(EXAMPLE), EXAMPLE)


def after_fork(place: Path, content: bytes) -> tuple[str, str]:
    """What a fork can do, with a cache of its own: the parent removes and writes files in the other."""
    os.environ["REQUANTO_CACHE"] = str(place)
    busy = Busy(content)
    build.build = busy._write
    busy._pack()
    busy._build()
    forget()
    back = strips(EXAMPLE)
    if back is None:
        return "raised", str(library.why_not)
    return ("forked", "") if torch.equal(back, EXAMPLE) else ("wrong", "")


def forks(content: bytes, scratch: Path, count: int, rng: random.Random) -> list[dict]:
    """Forks at random times beside busy threads."""
    os.environ["REQUANTO_CACHE"] = str(scratch / "busy")
    forget()
    results, usual = [], build.build
    try:
        with Busy(content):
            for number in range(count):
                time.sleep(rng.random() * 0.02)
                started = time.monotonic()
                outcome, text = in_child(functools.partial(after_fork, scratch / f"child{number}", content))
                shutil.rmtree(scratch / f"child{number}", ignore_errors=True)
                seconds = time.monotonic() - started
                results.append({"seed": number, "damage": "fork", "outcome": outcome, "text": text, "seconds": seconds})
    finally:
        build.build = usual
    return results


# ---------------------------------------------------------------------- all


def summary(results: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Counts of the outcomes, by kind of damage, with the seeds of those that are not as promised."""
    by_kind: dict[str, Counter] = defaultdict(Counter)
    for result in results:
        by_kind[result["damage"]][result["outcome"]] += 1
    return {
        "seed": seed,
        "damaged": sum(result["damage"] != "fork" for result in results),
        "forks": sum(result["damage"] == "fork" for result in results),
        "outcomes": dict(Counter(result["outcome"] for result in results).most_common()),
        "longest_seconds": round(max((result["seconds"] for result in results), default=0.0), 2),
        "damage": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
        "faults": [result for result in results if result["outcome"] not in ALLOWED][:50],
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the harness; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=400, help="number of damaged caches")
    parser.add_argument("--forks", type=int, default=200, help="number of forks")
    parser.add_argument("--seed", type=int, default=0, help="first seed; each damaged cache has its own")
    parser.add_argument("--minutes", type=float, default=10, help="stop after this time")
    parser.add_argument("--out", type=Path, help="write the summary here as well")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    content = requanto_cpu.path().read_bytes()
    packaged, cache.PACKAGED = cache.PACKAGED, Path(os.devnull) / "none"
    results, until = [], time.monotonic() + 60 * options.minutes
    before = os.environ.get("REQUANTO_CACHE")
    try:
        with tempfile.TemporaryDirectory(prefix="requanto-fuzz-") as scratch:
            for seed in range(options.seed, options.seed + options.count):
                results.append(one(content, Path(scratch), seed))
                if time.monotonic() > until:
                    break
            results += forks(content, Path(scratch), options.forks, random.Random(options.seed))
    finally:
        cache.PACKAGED = packaged
        os.environ.pop("REQUANTO_CACHE", None)
        os.environ.update({} if before is None else {"REQUANTO_CACHE": before})
    found = summary(results, options.seed)
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    return int(any(outcome not in ALLOWED for outcome in found["outcomes"]))


if __name__ == "__main__":
    sys.exit(main())
