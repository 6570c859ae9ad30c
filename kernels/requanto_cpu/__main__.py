"""Builds the library of CPU kernels where there is none, and prints its path and levels.

python -m requanto_cpu                          in the cache, with all levels
python -m requanto_cpu --output FILE            at another place
python -m requanto_cpu --output FILE --sanitize reports accesses outside of buffers; Python needs LD_PRELOAD=libasan.so
python -m requanto_cpu --output FILE --levels avx2,vnni          only these levels, in less time
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import requanto_cpu
from requanto_cpu import build


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m requanto_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the library to this file")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer, for tests (needs --output)")
    parser.add_argument("--levels", metavar="NAMES", help="build only these levels (needs --output)")
    options = parser.parse_args(arguments)
    if (options.sanitize or options.levels) and options.output is None:
        parser.error("--sanitize and --levels need --output FILE: such a library is never loaded from the cache")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if options.output is None:
            requanto_cpu.build_all()
            print(f"{requanto_cpu.path()}: {', '.join(requanto_cpu.levels())}; in use: {requanto_cpu.level()}")
            return 0
        start = time.monotonic()
        target = options.output.absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        more = build.SANITIZER if options.sanitize else ()
        only = tuple(options.levels.split(",")) if options.levels else None
        levels = build.build(target, build.compilers()[0], more=more, only=only)
        print(f"{target}: {', '.join(levels)}, built in {time.monotonic() - start:.1f} s")
        return 0
    except (requanto_cpu.LibraryUnavailable, build.BuildError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
