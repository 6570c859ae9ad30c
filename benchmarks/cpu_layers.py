"""Layers on a CPU other than matrices of whole blocks, relative to the best float of the same class of processor.

    python benchmarks/cpu_layers.py                                 # Requanto, all classes of this processor
    python benchmarks/cpu_layers.py --peers-python VENV/bin/python  # and optimum-quanto, in its own process
    python benchmarks/cpu_layers.py --table                         # the table of docs/cpu.md

Convolutions of an image model (by image size), embeddings (by tokens), matrices whose sizes are no multiples of 64, and
matrices that are stored transposed. 1 is the faster of bfloat16 and float32, of an embedding the table in the model's own
dtype. Classes, clocks and caps are those of benchmarks/cpu.py. Adds to benchmarks/results/cpu_layers.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, command, machine
from cpu import CLASSES, commit, here
from cpu_child import DTYPES, Cell
from torch import nn

FILE = RESULTS / "cpu_layers.json"
#: Approximate bytes of bf16 weights that one round reads, and the maximum number of copies of a layer.
READ, COPIES = 100e6, 12
TYPES = ("int8", "int4", "float8", "nf4")
#: Least ratios to the best float.
GOALS = {"convolution": 0.95, "embedding": 0.8, "sizes no multiple of 64": 0.95, "stored transposed": 0.95}
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


def measured(library: str, orders: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A result for each layer, dtype and input."""
    cell = Cell(orders["threads"])
    for case in CASES:
        if case.kind not in orders["kinds"]:
            continue
        torch.manual_seed(0)
        one = case.make()
        copies = max(2, min(3 if case.kind == "convolution" else COPIES, int(READ / (2 * one.weight.numel()))))
        for dtype in orders["dtypes"]:
            made = [case.make().eval() for _ in range(copies)]
            names = (dtype,) if case.kind == "embedding" else dict.fromkeys(("bf16", "f32"))
            floats = {name: [copy.deepcopy(layer).to(DTYPES[name]) for layer in made] for name in names}
            built = [LIBRARIES[library](layer.to(DTYPES[dtype])) for layer in made]
            for size, give in case.inputs.items():
                x = give()
                if x.is_floating_point() and x.ndim == 2 and x.shape[0] > orders["most_rows"]:
                    continue
                candidates: dict[str, list[Callable[[], object]]] = {}
                for name, layers in floats.items():
                    own = x.to(DTYPES[name]) if x.is_floating_point() else x
                    candidates[name] = [lambda layer=layer, own=own: layer(own) for layer in layers]
                x = x.to(DTYPES[dtype]) if x.is_floating_point() else x
                for kind in built[0]:
                    calls = [lambda layer=layers[kind], x=x: layer(x) for layers in built]
                    if library == "requanto" or _runs(calls[0], f"{library} {kind}, {case.name}, {size}"):
                        candidates[kind] = calls
                with torch.inference_mode() if library == "requanto" else torch.no_grad():
                    found = cell.run(candidates, list(floats), orders["seconds"])
                about = {"library": library, "kind": case.kind, "layer": case.name, "input": size, "dtype": dtype}
                yield about | {"results": found}


def run(python: str, library: str, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one library in its own process; returns its results up to the end or a failure."""
    names = ("threads", "seconds", "dtypes", "kinds", "most_rows")
    orders = json.dumps({name: getattr(options, name) for name in names})
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **CLASSES[kind][1]}
    words = [python, __file__, "--worker", library, "--orders", orders]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        rows = []
        for line in process.stdout or ():
            rows.append({"class": kind, "threads": options.threads, **json.loads(line)})
            row = rows[-1]
            goal = GOALS[row["kind"]]
            texts = [
                f"{name} {found['ratio']:.2f}{'!' if found['ratio'] < goal else ''}"
                for name, found in row["results"].items()
            ]
            print(f"{kind} {library}, {row['layer']}, {row['input']}, {row['dtype']}: {', '.join(texts)}", flush=True)
    if process.returncode:
        print(f"{library} ended with status {process.returncode}", file=sys.stderr)
    return rows


def table(document: dict[str, Any]) -> str:
    """The table of docs/cpu.md as markdown: a line for each layer and input, a column for each class and type, by dtype."""
    cells: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    columns: list[str] = []
    for row in document["results"]:
        for kind, found in row["results"].items():
            if kind not in DTYPES:
                column = f"{row['class']} {kind if row['library'] == 'requanto' else row['library'] + ' ' + kind}"
                if column not in columns:
                    columns.append(column)
                key = (row["kind"], row["layer"], row["input"])
                cells.setdefault(key, {}).setdefault(column, {})[row["dtype"]] = found["ratio"]
    lines = ["| | | | " + " | ".join(columns) + " |", "|---" * (3 + len(columns)) + "|"]
    for key, own in cells.items():
        texts = [" / ".join(f"{own.get(c, {})[d]:.2f}" for d in DTYPES if d in own.get(c, {})) for c in columns]
        lines.append(f"| {' | '.join(key)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def below(document: dict[str, Any]) -> list[str]:
    """Requanto's cells that miss their goal."""
    found, count = [], 0
    for row in document["results"]:
        for kind, figures in row["results"].items():
            if kind in DTYPES or row["library"] != "requanto":
                continue
            count += 1
            if max(figures["ratio"], figures["best_ratio"]) < GOALS[row["kind"]]:
                where = f"{row['class']}, {row['kind']} {row['layer']}, {row['input']}, {row['dtype']}"
                found.append(f"{figures['ratio']:.2f}  {kind}: {where}")
    return [*sorted(found), f"{len(found)} of {count} cells miss their goals"]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--classes", nargs="*", choices=list(CLASSES), help="default: all that this processor has")
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=["bf16", "f32"])
    parser.add_argument("--kinds", nargs="*", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--most-rows", type=int, default=1024, help="of x, for matrices")
    parser.add_argument("--seconds", type=float, default=0.1, help="approximate time for each layer, input and type")
    parser.add_argument("--peers-python", help="an interpreter that has optimum-quanto")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--table", action="store_true", help="print the stored results as markdown and stop")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--orders", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(options.orders["threads"])
        for result in measured(options.worker, options.orders):
            print(json.dumps(result), flush=True)
        return
    stored = json.loads(options.file.read_text()) if options.file.exists() else {"results": []}
    if options.table:
        print(table(stored))
        print("\n".join(below(stored)))
        return

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("class", "threads", "library", "kind", "layer", "input", "dtype"))

    for kind in options.classes or here():
        rows = run(sys.executable, "requanto", kind, options)
        if options.peers_python:
            rows += run(options.peers_python, "optimum-quanto", kind, options)
        merged = {key(row): row for row in stored.get("results", []) if "class" in row} | {
            key(row): row for row in rows
        }
        about = machine() | {"threads": options.threads}
        stored = {"command": command(), "commit": commit(), "machine": about, "goals": GOALS}
        stored["unit"] = "ratio to the best float, above 1 is faster; ms: milliseconds of one call"
        stored["results"] = list(merged.values())
        options.file.write_text(json.dumps(stored, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
