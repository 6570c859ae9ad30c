"""Compiles one kernel; `requanto.linear.cpu.aot.processes` runs this module in a subprocess.

python -m requanto.linear.cpu.aot.build FILE NAME [PARENT]
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path

import torch
from torch import nn

from requanto.linear.cpu.aot.kernels import SOURCES
from requanto.linear.cpu.aot.package import Kernel, check
from requanto.linear.cpu.aot.source import Source, compile_options


class _Module(nn.Module):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        returned = self.source.function(*arguments)
        return () if returned is None else (returned,)


def main(file: str, name: str, parent: str = "") -> None:
    """Exports and compiles a kernel, compares it with its source and writes the library to ``file``.

    Args:
        parent: id of the process that waits for it. When that ends, this process removes the folder of ``file`` and ends.
    """
    if parent:
        threading.Thread(target=_end_with, args=(int(parent), Path(file).parent), daemon=True).start()
    import torch._inductor

    source = SOURCES[name]
    sizes: dict[str, torch.export.Dim] = {}
    arguments = source.example()
    dynamic = tuple(
        {axis: sizes.setdefault(size, torch.export.Dim(size, min=2)) for axis, size in source.dynamic[place].items()}
        if place in source.dynamic
        else None
        for place in range(len(arguments))
    )
    with torch.no_grad():
        program = torch.export.export(_Module(source), arguments, dynamic_shapes=(dynamic,))
    package = f"{file}.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=compile_options())
    fresh = Path(f"{file}.fresh")
    fresh.write_bytes(_library(package))
    check(Kernel(name, fresh), source, name)
    fresh.replace(file)


def _library(package: str) -> bytes:
    """The library in torch's package. Loading it alone avoids that every process unpacks the package into TMPDIR."""
    with zipfile.ZipFile(package) as parts:
        names = [name for name in parts.namelist() if name.endswith((".so", ".dylib", ".pyd", ".dll"))]
        if len(names) != 1:
            raise RuntimeError(f"torch's package has {len(names)} libraries, expected 1: {parts.namelist()}")
        return parts.read(names[0])


def _end_with(parent: int, folder: Path) -> None:
    """Ends this process when the parent ends.

    The parent's end of the pipe is closed then, unless a fork of the parent inherited it; so its id is checked too.
    """
    with contextlib.suppress(OSError):
        if os.name == "posix":
            while os.getppid() == parent and not (select.select([0], [], [], 1.0)[0] and os.read(0, 1) == b""):
                pass
        else:
            os.read(0, 1)
    for _ in range(5):  # compilers may still write into it
        shutil.rmtree(folder, ignore_errors=True)
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
