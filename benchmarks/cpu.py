"""Quantized products on a CPU, as ratios to bf16 ``F.linear`` of the same run, beside peers; goals judged.

    python benchmarks/cpu.py                                         # Requanto
    python benchmarks/cpu.py --peers --peers-python VENV/bin/python  # and optimum-quanto, torchao, bitsandbytes

Each library runs in a process of its own, with the same baseline inside: a crash is a result like any other.
Writes benchmarks/results/cpu_<threads>threads.json; `--plot` draws docs/images/cpu_speed.png from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, interleaved, write

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 16, 128, 1024)
# ratio to bf16 at ROWS
GOALS = {
    "int8": (1.8, 0.95, 0.9, 0.95),
    "int4": (2.5, 0.95, 0.9, 0.9),
    "int2": (2.0, 0.9, 0.9, 0.9),
    "float8": (1.2, 0.9, 0.9, 0.9),
    "int8 x int8": (1.6, 1.7, 2.0, 1.6),
}
COPIES = 2  # with the baseline's own buffers several times the last cache
Layer = Callable[[torch.Tensor], torch.Tensor]


def requanto_layers(weight: torch.Tensor) -> dict[str, Layer]:
    import requanto
    from requanto.linear import linear
    from requanto.settings import settings

    def layer(kind: str, activation: Any = None) -> Layer:
        parameter = torch.nn.Parameter(requanto.QTensor.quantize(weight, kind), requires_grad=False)
        return lambda x: linear(x, parameter, activation=activation)

    layers = {kind: layer(kind) for kind in ("int8", "int4", "int2", "float8")}
    layers["int8 x int8"] = layer("int8", requanto.qint8)
    compiled = layer("float8")

    def with_compiled(x: torch.Tensor) -> torch.Tensor:
        settings.compiled = True
        try:
            return compiled(x)
        finally:
            settings.compiled = False

    layers["float8 compiled"] = with_compiled
    return layers


def _module(weight: torch.Tensor) -> torch.nn.Sequential:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return torch.nn.Sequential(linear)


def quanto_layers(weight: torch.Tensor) -> dict[str, Layer]:
    from optimum import quanto

    layers = {}
    for name, kind in (("int8", quanto.qint8), ("int4", quanto.qint4), ("float8", quanto.qfloat8)):
        layers[name] = _module(weight)
        quanto.quantize(layers[name], weights=kind)
        quanto.freeze(layers[name])
    return layers


def torchao_layers(weight: torch.Tensor) -> dict[str, Layer]:
    from torchao import quantization as ao

    layers = {}
    for name, config in (
        ("int8", ao.Int8WeightOnlyConfig()),
        ("float8", ao.Float8WeightOnlyConfig()),
        ("int8 x int8", ao.Int8DynamicActivationInt8WeightConfig()),
    ):
        layers[name] = _module(weight)
        ao.quantize_(layers[name], config)
    return layers


def bitsandbytes_layers(weight: torch.Tensor) -> dict[str, Layer]:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return {"nf4": layer.to("cpu")}


LIBRARIES = {
    "requanto": requanto_layers,
    "optimum-quanto": quanto_layers,
    "torchao": torchao_layers,
    "bitsandbytes": bitsandbytes_layers,
}


def calls(
    x: torch.Tensor, weights: list[torch.Tensor], built: list[dict[str, Layer]]
) -> dict[str, list[Callable[[], object]]]:
    """What is timed for this x, by name; one call for each copy of the weights."""
    found: dict[str, list[Callable[[], object]]] = {"bf16": [lambda w=weight: F.linear(x, w) for weight in weights]}
    for name in built[0]:
        if name != "float8 compiled" or x.shape[0] <= 4:
            found[name] = [lambda layer=layers[name]: layer(x) for layers in built]
    return found


def worker(library: str, shape: tuple[int, int], seconds: float) -> None:
    """One library, one shape: a line of JSON for each number of rows."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, dtype=torch.bfloat16) / 64 for _ in range(COPIES)]
    built = [LIBRARIES[library](weight) for weight in weights]
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
            candidates = calls(x, weights, built)
            found = interleaved(candidates, "bf16", seconds)
            print(json.dumps({"library": library, "shape": shape, "rows": rows, "results": found}), flush=True)


def run(python: str, library: str, shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    arguments = ["--worker", library, "--shape", *map(str, shape), "--seconds", str(options.seconds)]
    arguments += ["--threads", str(options.threads)]
    try:
        done = subprocess.run(
            [python, __file__, *arguments], capture_output=True, text=True, timeout=options.timeout, check=False
        )
        output, why = done.stdout, f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired as error:
        output, failed = (error.stdout or b"").decode(), True
        why = f"longer than {options.timeout:.0f} s"
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"library"')]
    if failed:
        rows.append({"library": library, "shape": shape, "failed": why})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for shape in SHAPES:
        print(f"\n{shape[0]} x {shape[1]}: ratio to bf16 (of the fastest tenth), goal in brackets")
        table: dict[tuple[str, str], dict[int, str]] = {}
        for row in rows:
            if tuple(row["shape"]) != shape:
                continue
            if "failed" in row:
                print(f"  {row['library']} failed: {row['failed'].splitlines()[-1] if row['failed'] else ''}")
                continue
            for name, found in row["results"].items():
                cell = f"{found['ratio']:.2f} ({found['best_ratio']:.2f})"
                if row["library"] == "requanto" and name in GOALS:
                    cell += f" [{GOALS[name][ROWS.index(row['rows'])]}]"
                table.setdefault((row["library"], name), {})[row["rows"]] = cell
        print(f"  {'':32}" + "".join(f"{f'M={m}':22}" for m in ROWS))
        for (library, name), cells in table.items():
            if name != "bf16":
                print(f"  {library + ' ' + name:32}" + "".join(f"{cells.get(m, ''):22}" for m in ROWS))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(12, 4.5), sharey=True)
    styles = {"requanto": ("-", "o", 2.2), "optimum-quanto": ("--", "s", 1), "torchao": (":", "^", 1.2)}
    colors = {"int8": "C0", "int4": "C1", "int2": "C2", "float8": "C3", "int8 x int8": "C4", "nf4": "C5"}
    for axis, shape in zip(axes, SHAPES):
        curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if tuple(row["shape"]) == shape and "results" in row:
                for name, found in row["results"].items():
                    if name in colors:
                        curves.setdefault((row["library"], name), []).append((row["rows"], found["best_ratio"]))
        for (library, name), points in curves.items():
            line, marker, width = styles.get(library, ("-.", "v", 1.2))
            axis.plot(*zip(*points), line, marker=marker, lw=width, ms=4, color=colors[name], label=f"{library} {name}")
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", title=f"{shape[0]} x {shape[1]}", xlabel="rows of x")
        axis.set_xticks(ROWS, [str(m) for m in ROWS])
        axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "4"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed relative to bf16")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each candidate and number of rows")
    parser.add_argument("--timeout", type=float, default=150, help="seconds a library may take for a shape")
    parser.add_argument("--peers", action="store_true", help="optimum-quanto, torchao and bitsandbytes as well")
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that can import them")
    parser.add_argument("--plot", action="store_true", help="draw docs/images/cpu_speed.png")
    parser.add_argument("--worker", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        worker(options.worker, tuple(options.shape), options.seconds)
        return
    rows: list[dict[str, Any]] = []
    for library in LIBRARIES if options.peers else ("requanto",):
        for shape in SHAPES:
            python = sys.executable if library == "requanto" else options.peers_python
            rows += run(python, library, shape, options)
            # After each, so that an interrupted run keeps what it has.
            write(RESULTS / f"cpu_{options.threads}threads.json", {"goals": GOALS, "rows_of_x": ROWS, "results": rows})
    show(rows)
    if options.plot:
        plot(rows, RESULTS.parent.parent / "docs" / "images" / "cpu_speed.png")


if __name__ == "__main__":
    main()
