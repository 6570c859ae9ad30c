"""Quantized GEMMs on a CPU: speed relative to bf16 ``F.linear`` of the same run, compared with peers and goals.

    python benchmarks/cpu.py                                         # Requanto
    python benchmarks/cpu.py --peers --peers-python VENV/bin/python  # and optimum-quanto, torchao, bitsandbytes
    python benchmarks/cpu.py --table                                 # the tables of docs/cpu.md, from the results

Each library runs in its own process, which also runs the baseline. If it crashes or takes longer than --timeout, the results
so far are stored and the rest stays empty.
Writes benchmarks/results/cpu_<threads>threads.json; `--plot` draws docs/images/cpu_speed.png from it. Whole models:
benchmarks/cpu_models.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, interleaved, write
from cpu_tables import GOALS, ROWS, SHAPES, markdown, plot, show

COPIES = 3  # together with the baseline's buffers several times the last-level cache
#: Rows of x from which one copy and fewer rounds are enough, since a GEMM is no longer bound by memory.
MANY = 512
#: Types that are also measured without compiled kernels, as on a machine without a C++ compiler.
EAGER = ("int4", "int2", "float8")
Layer = Callable[[torch.Tensor], torch.Tensor]


def requanto_layers(weight: torch.Tensor) -> dict[str, Layer]:
    import requanto
    from requanto.linear import linear
    from requanto.runtime.settings import settings

    def quantize(kind: str) -> torch.nn.Parameter:
        return torch.nn.Parameter(requanto.QTensor.quantize(weight, kind), requires_grad=False)

    def eager(x: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        settings.compiled = False
        try:
            return linear(x, parameter)
        finally:
            settings.compiled = None

    weights = {kind: quantize(kind) for kind in ("int8", "int4", "int2", "float8")}
    layers: dict[str, Layer] = {kind: (lambda x, w=w: linear(x, w)) for kind, w in weights.items()}
    both = quantize("int8")
    both.activation = requanto.qint8
    layers["int8 x int8"] = lambda x: linear(x, both)
    for kind in EAGER:
        other = quantize(kind)  # a separate weight: it is packed, or its scales are ordered, in another way
        layers[f"{kind} eager"] = lambda x, w=other: eager(x, w)
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
    """The calls to time for this x, by name; one for each copy of the weights."""
    copies = 1 if x.shape[0] >= MANY else COPIES
    found: dict[str, list[Callable[[], object]]] = {"bf16": [lambda w=w: F.linear(x, w) for w in weights[:copies]]}
    for name in built[0]:
        # Few rows of int4 use torch's operator with and without compiled kernels.
        if not (name.startswith("int") and name.endswith("eager")) or x.shape[0] >= 16:
            found[name] = [lambda layer=layers[name]: layer(x) for layers in built[:copies]]
    return found


def worker(library: str, shape: tuple[int, int], seconds: float) -> None:
    """Measures one library and shape; prints a line of JSON for each number of rows."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, dtype=torch.bfloat16) / 64 for _ in range(COPIES)]
    built = [LIBRARIES[library](weight) for weight in weights]
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, shape[1], dtype=torch.bfloat16)
            candidates = calls(x, weights, built)
            found = interleaved(candidates, "bf16", seconds, least=3 if rows >= MANY else 5)
            print(json.dumps({"library": library, "shape": shape, "rows": rows, "results": found}), flush=True)


def run(python: str, library: str, shape: tuple[int, int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs `worker` in its own process; returns a result for each number of rows that was measured in time."""
    arguments = ["--worker", library, "--shape", *map(str, shape), "--seconds", str(options.seconds)]
    arguments += ["--threads", str(options.threads)]
    rows, start = [], time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([python, __file__, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True)
        stop = threading.Timer(options.timeout, child.kill)
        stop.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('{"library"'):
                rows.append(json.loads(line))
                took = time.monotonic() - start
                print(f"{library} {shape[0]} x {shape[1]}, M={rows[-1]['rows']}: {took:.0f} s", flush=True)
        status = child.wait()
        in_time = stop.is_alive()
        stop.cancel()
        errors.seek(0)
        why = f"exit status {status}: {errors.read().strip()[-300:]}"
    if status:
        rows.append({"library": library, "shape": shape, "failed": why})
        if not in_time:
            rows[-1]["failed"] = f"longer than {options.timeout:.0f} s"
        print(f"{library} {shape[0]} x {shape[1]}: {rows[-1]['failed']}", flush=True)
    return rows


def results(threads: int) -> Any:
    """File with the results for a number of threads."""
    return RESULTS / f"cpu_{threads}threads.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.4, help="for each candidate and number of rows")
    parser.add_argument("--timeout", type=float, default=150, help="time limit in seconds for one library and shape")
    parser.add_argument("--peers", action="store_true", help="also measure optimum-quanto, torchao and bitsandbytes")
    parser.add_argument("--peers-python", default=sys.executable, help="an interpreter that can import them")
    parser.add_argument("--plot", action="store_true", help="draw docs/images/cpu_speed.png")
    parser.add_argument("--table", action="store_true", help="print the stored results as markdown and stop")
    parser.add_argument("--worker", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        worker(options.worker, tuple(options.shape), options.seconds)
        return
    picture = RESULTS.parent.parent / "docs" / "images" / "cpu_speed.png"
    if options.table:
        found = {threads: json.loads(results(threads).read_text()) for threads in (1, 2) if results(threads).exists()}
        print(markdown(found))
        if options.plot:
            plot(found[options.threads]["results"], picture)
        return
    rows: list[dict[str, Any]] = []
    for library in LIBRARIES if options.peers else ("requanto",):
        for shape in SHAPES:
            python = sys.executable if library == "requanto" else options.peers_python
            rows += run(python, library, shape, options)
            # Written after each, so that an interrupted run loses little.
            write(results(options.threads), {"goals": GOALS, "rows_of_x": ROWS, "results": rows})
    show(rows)
    if options.plot:
        plot(rows, picture)


if __name__ == "__main__":
    main()
