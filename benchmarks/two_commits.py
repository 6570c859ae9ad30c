"""Two versions of Requanto side by side on a CPU: the same calls, in turns, one process for each version.

    git worktree add /tmp/before COMMIT
    python benchmarks/two_commits.py /tmp/before                 # layers, training steps, the overhead of a small layer
    python benchmarks/two_commits.py /tmp/before --models        # SmolLM2: decoding and prompts as well

Both processes sleep while the other measures, so that a noisy machine disturbs both alike. A cell's figure is the median of
(time before / time now) over the rounds: above 1 the version of this checkout is faster. Writes
benchmarks/results/two_commits.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
KINDS = ("int8", "int4", "int2", "float8", "int8 x int8")
#: out_features, in_features: a large model's layers, SmolLM2's, and one that is no multiple of 64.
SHAPES = ((4096, 4096), (14336, 4096), (576, 576), (1536, 576), (1000, 1000))
ROWS = (1, 16, 128, 1024)
TRAINED = (2048, 2048)
SMALL = (64, 64)
PROMPTS = (32, 512)


def worker(models: bool) -> None:
    """Answers cells on standard input with seconds a call on standard output."""
    import torch
    import torch.nn.functional as F

    import requanto

    torch.manual_seed(0)
    torch.set_num_threads(2)
    layers: dict[tuple[Any, ...], Any] = {}
    loaded: dict[str, Any] = {}

    def layer(kind: str, shape: tuple[int, int]) -> Any:
        if (kind, shape) not in layers:
            layers.clear()  # one layer at a time, as large as it may be
            name, _, activation = kind.partition(" x ")
            weight = requanto.QTensor.quantize(torch.randn(shape).bfloat16(), name)
            weight.activation = requanto.qint8 if activation else None
            layers[kind, shape] = torch.nn.Parameter(weight, requires_grad=False)
        return layers[kind, shape]

    def model(kind: str) -> Any:
        if kind not in loaded:
            import transformers

            sys.path.append(str(HERE.parent / "integration_tests"))
            from real_models import smollm2_dir

            loaded.clear()
            name, _, activation = kind.partition(" x ")
            options: dict[str, Any] = {}
            if kind != "bf16":
                config = requanto.QuantoConfig(weights=name, activations=activation or None)
                options["quantization_config"] = config
            loaded[kind] = transformers.AutoModelForCausalLM.from_pretrained(
                smollm2_dir(), dtype=torch.bfloat16, device_map="cpu", **options
            ).eval()
        return loaded[kind]

    def call_of(cell: list[Any]) -> Callable[[], object]:
        what, kind, *rest = cell
        if what == "prompt":
            ids = torch.randint(0, 1000, (1, rest[0]))
            return lambda: model(kind)(ids, use_cache=True, logits_to_keep=1)
        if what == "decode":
            state = model(kind)(torch.randint(0, 1000, (1, 32)), use_cache=True, logits_to_keep=1)
            token = state.logits[:, -1:].argmax(-1)
            return lambda: model(kind)(token, past_key_values=state.past_key_values, use_cache=True)
        shape, rows = tuple(rest[0]), rest[1]
        weight, x = layer(kind, shape), torch.randn(rows, shape[1]).bfloat16()
        if what == "training":

            def step() -> None:
                own = x.detach().requires_grad_()
                F.linear(own, weight).sum().backward()

            return step
        return lambda: F.linear(x, weight)

    print("ready", flush=True)
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["cell"])
        with torch.enable_grad() if request["cell"][0] == "training" else torch.inference_mode():
            if key not in calls:
                calls.clear()
                calls[key] = call_of(request["cell"])
                for _ in range(3):
                    calls[key]()
            times, begin = [], time.perf_counter()
            while time.perf_counter() - begin < request["seconds"]:
                start = time.perf_counter()
                calls[key]()
                times.append(time.perf_counter() - start)
        held = next(iter(layers.values())).nbytes if layers else 0
        print(json.dumps({"seconds": median(times), "best": min(times), "bytes": held}), flush=True)


class Child:
    """One version in a process of its own."""

    def __init__(self, root: Path) -> None:
        paths = os.pathsep.join(str(root / name) for name in ("src", "kernels"))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"the version in {root} did not start (exit status {self.process.wait()}); see above")

    def ask(self, cell: list[Any], seconds: float) -> dict[str, float]:
        """What the child measured."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"cell": cell, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a version ended at {cell} (exit status {self.process.wait()}); see above")
        return json.loads(line)


def cells(models: bool, only: list[str] | None) -> list[list[Any]]:
    """Everything that is measured."""
    found: list[list[Any]] = [
        ["layer", kind, list(shape), rows] for shape in SHAPES for kind in KINDS for rows in ROWS if shape != SMALL
    ]
    found += [["layer", kind, list(SMALL), rows] for kind in KINDS for rows in (1, 8)]
    found += [["training", kind, list(TRAINED), rows] for kind in KINDS for rows in (16, 256)]
    if models:
        for kind in ("bf16", *KINDS):
            found += [["decode", kind], *(["prompt", kind, prompt] for prompt in PROMPTS)]
    return [cell for cell in found if not only or cell[0] in only]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the other version")
    parser.add_argument("--models", action="store_true", help="SmolLM2 as well")
    parser.add_argument("--only", nargs="*", help="layer, training, decode, prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.15, help="for each version, cell and round")
    parser.add_argument("--name", default="two_commits", help="of the results file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.models)
        return
    if options.before is None:
        parser.error("which checkout is it to be compared with?")
    from common import RESULTS, write

    def commit(root: Path) -> str:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    children = {"before": Child(options.before.resolve()), "now": Child(HERE.parent)}
    rows: list[dict[str, Any]] = []
    commits = {"before": commit(options.before), "now": commit(HERE.parent)}
    for cell in cells(options.models, options.only):
        taken = [
            {name: child.ask(cell, options.seconds) for name, child in children.items()} for _ in range(options.rounds)
        ]
        row = {
            "cell": " ".join(map(str, cell)),
            "ratio": median(turn["before"]["seconds"] / turn["now"]["seconds"] for turn in taken),
            "best_ratio": min(t["before"]["best"] for t in taken) / min(t["now"]["best"] for t in taken),
            "ms": median(turn["now"]["seconds"] for turn in taken) * 1e3,
            "bytes": {name: taken[-1][name]["bytes"] for name in children},
        }
        rows.append(row)
        print(f"{row['cell']:44s} {row['ratio']:6.3f}  best {row['best_ratio']:6.3f}  {row['ms']:9.3f} ms", flush=True)
        write(RESULTS / f"{options.name}.json", {"commits": commits, "rows": rows})
    slower = [row for row in rows if row["ratio"] < 0.97 and row["best_ratio"] < 0.97]
    print(f"{len(slower)} of {len(rows)} cells are slower by more than 3 % both by median and by the best call")
    for row in slower:
        print(f"  {row['cell']}  {row['ratio']:.3f}  best {row['best_ratio']:.3f}")


if __name__ == "__main__":
    main()
