"""A process that runs cases: one line of JSON in for each, one out. It dies alone when a kernel breaks the device.

Lines come on standard input, after one that says where to work; results go to what standard output was at the start,
since libraries print to it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

Row = dict[str, Any]


def main() -> None:
    """Imports everything, says so, then serves until the end of the input."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path += filter(None, [os.environ.get("GPU_CHECK_WHEELS")])  # last: what is installed comes first
    setup = json.loads(sys.stdin.readline())
    runner = Runner(dry=setup["dry"], compiling=setup["compiling"])
    send(results, {"ready": True})
    for line in sys.stdin:
        row = runner.run(json.loads(line))
        send(results, row)
        if row.get("broken"):
            sys.exit("the device does not answer any more after this fault")


def send(results: TextIO, row: Row) -> None:
    results.write(json.dumps(row) + "\n")
    results.flush()


class Runner:
    """What a child does with a case: the functions are named as `Case.do`."""

    def __init__(self, dry: bool, compiling: bool) -> None:
        import torch

        from gpu_check import device, models
        from gpu_check.measure import Measurer
        from gpu_check.weights import Place

        self.torch, self.devices, self.models = torch, device, models
        if dry:
            on_the_cpu()
            place = Place("cpu", torch.float16, 1 << 12, compiling)
        else:
            properties = torch.cuda.get_device_properties(0)
            place = Place("cuda", torch.bfloat16, getattr(properties, "L2_cache_size", 0) or 60 << 20, compiling)
        self.place = place
        if compiling:  # one of many processes
            torch.set_num_threads(1)
        torch.manual_seed(time.time_ns() % (1 << 62))  # other inputs in every process
        self.measurer = Measurer(place)

    def run(self, case: Row) -> Row:
        """The case's results: columns, or ``fault``; ``broken`` if no other case can run in this process."""
        start = time.perf_counter()
        try:
            with self.torch.no_grad():
                row = getattr(self, case["do"])(case)
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip()
            row = {"fault": f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"}
            self.measurer.kept.clear()  # after an out of memory, what the next case needs may fit
        if self.place.device == "cuda":
            try:
                self.torch.cuda.synchronize()
            except Exception as error:  # illegal access: every later call of this process fails as well
                row = {
                    "fault": f"{row.get('fault', 'after the case')}; {str(error).splitlines()[0][:200]}",
                    "broken": True,
                }
        return row | {"s": round(time.perf_counter() - start, 3)}

    def device(self, case: Row) -> Row:
        return self.devices.describe(self.place)

    def ceiling(self, case: Row) -> Row:
        return self.devices.ceiling(case, self.place)

    def product(self, case: Row) -> Row:
        return self.measurer.product(case)

    def host(self, case: Row) -> Row:
        return self.measurer.host(case)

    def peer(self, case: Row) -> Row:
        return self.measurer.peer(case)

    def model(self, case: Row) -> Row:
        key = (case["family"], case["kind"])
        self.torch._dynamo.reset()
        model = self.measurer.keep("model", key, lambda: self.models.Model(*key, self.place))
        return self.models.measure(model, case["op"])

    def tune(self, case: Row) -> Row:
        """As `requanto tune` does it for a model; the parent has said in $REQUANTO_CACHE where the table goes."""
        from gpu_check.cases import ROWS
        from requanto.cli.tune import tune_model

        lines: list[str] = []
        layer = self.measurer.weights(case["kind"], case["n"], case["k"]).layers[0]
        found = tune_model(self.torch.nn.Sequential(layer), rows=ROWS, progress=False, report=lines.append)
        return {
            "entries": found.entries,
            "skipped": list(found.skipped.values()),
            "lines": [line[:300] for line in lines],
        }


def on_the_cpu() -> None:
    """A dry run: the GPU's implementations come first in the table, take the CPU for their device, and are interpreted."""
    from requanto.linear import prepack, registry
    from requanto.linear.gpu import conditions, dequantize
    from requanto.runtime.settings import settings
    from requanto.tensor import qtensor

    settings.compiled = False  # the library of CPU kernels would do what the GPU's kernels are asked for
    qtensor.value_kernels["cpu"] = dequantize.values
    conditions.DEVICES = ("cpu",)
    conditions.capability = lambda kind: 0
    prepack.SMALLEST = prepack.SMALLEST_ON_CPU = 0
    prepack.layout_for = gpu_layout_for
    registry._REGISTRY.sort(key=lambda one: not one.name.startswith(("triton", "torch-")))


def gpu_layout_for(weight: Any, dtype: Any = None, activation: Any = None) -> Any:
    """The layout for a GPU's kernels or none, never one of a CPU's."""
    from requanto.linear.gpu import layout

    return layout.EXEC if layout.fits(weight, activation) else None


if __name__ == "__main__":
    main()
