"""Layers on a CPU other than matrices of whole blocks: speed relative to bf16 of the same run, and optimum-quanto's.

    python benchmarks/cpu_layers.py                                 # Requanto
    python benchmarks/cpu_layers.py --peers-python VENV/bin/python  # and optimum-quanto, in its own process
    python benchmarks/cpu_layers.py --table                         # the table of docs/cpu.md

Convolutions of an image model (by image size), embeddings (by tokens), matrices whose sizes are no multiples of 64, and
matrices that are stored transposed. Writes benchmarks/results/cpu_layers.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from common import RESULTS, interleaved, write
from torch import nn

FILE = RESULTS / "cpu_layers.json"
#: Approximate bytes of bf16 weights that one round reads, and the maximum number of copies of a layer.
READ, COPIES = 100e6, 12
TYPES = ("int8", "int4", "float8")
Layer = Callable[[torch.Tensor], torch.Tensor]


class Transposed(nn.Module):
    """``x @ W`` with W [in, out]: GPT-2's Conv1D."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features) / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@dataclass(frozen=True)
class Case:
    """A layer and its inputs."""

    kind: str
    name: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Callable[[], torch.Tensor]]


def _conv(channels: int, out: int, kernel: int, sizes: tuple[int, ...], stride: int = 1) -> Case:
    padding = kernel // 2 if stride == 1 else 0
    return Case(
        "convolution",
        f"{channels} to {out}, {kernel} x {kernel}" + (f" / {stride}" if stride > 1 else ""),
        lambda: nn.Conv2d(channels, out, kernel, stride, padding),
        {f"{size} x {size}": lambda size=size: torch.randn(1, channels, size, size) for size in sizes},
    )


def _matrix(kind: str, make: Callable[[], nn.Module], length: int, name: str) -> Case:
    rows = {f"{count} rows": lambda count=count: torch.randn(count, length) for count in (1, 16, 128, 1024)}
    return Case(kind, name, make, rows)


CASES = (
    _conv(1280, 1280, 3, (8, 16, 32)),
    _conv(640, 640, 3, (32,)),
    _conv(320, 320, 3, (64,)),
    _conv(128, 128, 3, (256,)),
    _conv(1280, 1280, 1, (8, 32)),
    _conv(3, 1152, 14, (224,), stride=14),
    _matrix("sizes no multiple of 64", lambda: nn.Linear(1152, 4304, bias=False), 1152, "4304 x 1152"),
    _matrix("sizes no multiple of 64", lambda: nn.Linear(4304, 1152, bias=False), 4304, "1152 x 4304"),
    _matrix("stored transposed", lambda: Transposed(1280, 5120), 1280, "1280 x 5120"),
    Case(
        "embedding",
        "49152 x 576",
        lambda: nn.Embedding(49152, 576),
        {
            f"{count} token{'s'[: count - 1]}": lambda count=count: torch.randint(49152, (1, count))
            for count in (1, 16, 512)
        },
    ),
)


def requanto_layers(layer: nn.Module) -> dict[str, nn.Module]:
    import requanto

    def quantized(kind: str) -> nn.Module:
        made = copy.deepcopy(layer)
        transposed = isinstance(layer, Transposed)
        weight = requanto.QTensor.quantize(layer.weight.detach(), kind, transposed=transposed)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made

    return {kind: quantized(kind) for kind in TYPES}


def quanto_layers(layer: nn.Module) -> dict[str, nn.Module]:
    from optimum import quanto

    if isinstance(layer, (Transposed, nn.Embedding)):  # it quantizes neither
        return {}
    found = {}
    for name, kind in (("int8", quanto.qint8), ("int4", quanto.qint4), ("float8", quanto.qfloat8)):
        model = nn.Sequential(copy.deepcopy(layer))
        try:
            quanto.quantize(model, weights=kind)
            quanto.freeze(model)
        except Exception as error:  # a peer may not support a size: its cell stays empty
            print(f"optimum-quanto {name}, {layer}: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            found[name] = model
    return found


LIBRARIES = {"requanto": requanto_layers, "optimum-quanto": quanto_layers}


def _runs(call: Callable[[], object], what: str) -> bool:
    """False if a peer fails, which is printed; its cell stays empty."""
    try:
        with torch.inference_mode():
            call()
    except Exception as error:
        print(f"{what} fails: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def measured(library: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A result for each layer and input."""
    for case in CASES:
        torch.manual_seed(0)
        one = case.make()
        copies = max(2, min(COPIES, int(READ / (2 * one.weight.numel()))))
        floats = [case.make().bfloat16().eval() for _ in range(copies)]
        built = [LIBRARIES[library](layer) for layer in floats]
        for size, give in case.inputs.items():
            x = give()
            x = x.bfloat16() if x.is_floating_point() else x
            candidates = {"bf16": [lambda layer=layer, x=x: layer(x) for layer in floats]}
            for kind in built[0]:
                calls = [lambda layer=layers[kind], x=x: layer(x) for layers in built]
                if library == "requanto" or _runs(calls[0], f"{library} {kind}, {case.name}, {size}"):
                    candidates[kind] = calls
            with torch.inference_mode():
                found = interleaved(candidates, "bf16", seconds)
            yield {"library": library, "kind": case.kind, "layer": case.name, "input": size, "results": found}


def worker(library: str, seconds: float) -> None:
    for result in measured(library, seconds):
        print(json.dumps(result), flush=True)


def run(python: str, library: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one library in its own process; returns its results up to the end or a failure."""
    command = [python, __file__, "--worker", library, "--seconds", str(options.seconds)]
    command += ["--threads", str(options.threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        rows = []
        for line in process.stdout or ():
            rows.append(json.loads(line))
            row = rows[-1]
            texts = [f"{kind} {found['ratio']:.2f}" for kind, found in row["results"].items() if kind != "bf16"]
            print(f"{library}, {row['kind']} {row['layer']}, {row['input']}: {', '.join(texts)}", flush=True)
    if process.returncode:
        print(f"{library} ended with status {process.returncode}", file=sys.stderr)
        rows.append({"library": library, "failed": f"status {process.returncode}"})
    return rows


def table(document: dict[str, Any]) -> str:
    """The table of docs/cpu.md as markdown."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    columns: list[str] = []
    for row in document["results"]:
        if "failed" in row:
            continue
        own = cells.setdefault((row["kind"], row["layer"], row["input"]), {})
        for kind, found in row["results"].items():
            column = "bf16, ms" if kind == "bf16" else f"{row['library']} {kind}"
            if column not in columns:
                columns.append(column)
            own.setdefault(column, f"{found['ms']:.3g}" if kind == "bf16" else f"{found['ratio']:.2f}")
    lines = ["| | | | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    lines += [
        f"| {' | '.join(key)} | " + " | ".join(own.get(c, "") for c in columns) + " |" for key, own in cells.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.7, help="approximate time for each layer, input and type")
    parser.add_argument("--peers-python", help="an interpreter that has optimum-quanto")
    parser.add_argument("--table", action="store_true", help="print the stored results as markdown and stop")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.table:
        print(table(json.loads(FILE.read_text())))
        return
    if options.worker:
        worker(options.worker, options.seconds)
        return
    rows = run(sys.executable, "requanto", options)
    if options.peers_python:
        rows += run(options.peers_python, "optimum-quanto", options)
    write(FILE, {"unit": "ratio to bf16, above 1 is faster; ms: milliseconds of one call", "results": rows})


if __name__ == "__main__":
    main()
