"""Makes one kernel's package; `requanto.linear.cpu.aot.cache` starts it.

python -m requanto.linear.cpu.aot.build FILE NAME
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from requanto.linear.cpu.aot.cache import Kernel, Source, check, vector_options
from requanto.linear.cpu.aot.kernels import SOURCES


class _Module(nn.Module):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        returned = self.source.function(*arguments)
        return () if returned is None else (returned,)


def main(file: str, name: str) -> None:
    """Exports, compiles, writes the package to ``file`` and compares what it computes with its source."""
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
    options = {
        **vector_options(),
        # Headers compiled beforehand serve many kernels, this is one; what calls it is not worth optimizing; and the
        # processor's instructions need no trial by compiling, since the result is compared with its source.
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "cpp.vec_isa_ok": True,
        # The examples are small; what is really computed is worth several threads, as many as the process has then.
        "cpp.dynamic_threads": True,
        # A product and the sum after it are one operation, and rounded once.
        "cpp.enable_floating_point_contract_flag": "fast",
    }
    torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=options)
    check(Kernel(name, Path(file)), source, name)


if __name__ == "__main__":
    main(*sys.argv[1:])
