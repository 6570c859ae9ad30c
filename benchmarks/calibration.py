"""Calibrating, freezing and saving: seconds, peak memory and size on disk, compared with optimum-quanto.

    python benchmarks/calibration.py                              # Requanto alone
    python benchmarks/calibration.py --peer-python /path/python   # and optimum-quanto, in that interpreter

The same seeded model (a Llama-shaped stack of 80 million float32 weights), the same samples; each run is a process of its
own that measures its anonymous memory. The libraries alternate and the median of the repeats is reported. Each library
writes its own format. Writes benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
CASES = (("int8", "none"), ("int8", "int8"), ("float8", "float8"), ("int4", "none"), ("int2", "none"))
MEASURES = ("quantize_s", "calibrate_s", "freeze_s", "forward_s", "peak_mb", "disk_mb", "error")

# Runs in the measured process.
WORKER = r"""
import gc, json, os, sys, threading, time
library, weights, activations, directory, threads = sys.argv[1:6]
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(int(threads))
if library == "requanto":
    from requanto.model.calibrate import Calibration
    from requanto.checkpoint.format import flatten
    from requanto.model.quantize import freeze, quantize
else:
    from optimum.quanto import Calibration, freeze, quantize
    flatten = dict
    weights, activations = "q" + weights, activations if activations == "none" else "q" + activations
torch.manual_seed(0)
config = LlamaConfig(vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6,
                     num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False)
model = LlamaForCausalLM(config).eval()
samples = [torch.randint(0, 4096, (1, 128), generator=torch.Generator().manual_seed(i)) for i in range(4)]

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024

with torch.no_grad():
    wanted = model(samples[0]).logits
gc.collect()
peak, running = 0.0, True
def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
base = anonymous()
threading.Thread(target=sample, daemon=True).start()
found = {}
def timed(name, action):
    start = time.perf_counter()
    result = action()
    found[name] = time.perf_counter() - start
    return result
quantized = None if activations == "none" else activations
timed("quantize_s", lambda: quantize(model, weights=weights, activations=quantized))
if quantized is not None:
    def calibrate():
        with torch.no_grad(), Calibration():
            for ids in samples:
                model(ids)
    timed("calibrate_s", calibrate)
timed("freeze_s", lambda: freeze(model))
found["peak_mb"] = peak - base
running = False
with torch.no_grad():
    out = model(samples[0]).logits
    timed("forward_s", lambda: model(samples[1]))
if hasattr(out, "dequantize") and type(out) is not torch.Tensor:
    out = out.dequantize()
found["error"] = float((out - wanted).norm() / wanted.norm())
path = os.path.join(directory, "model.safetensors")
save_file({k: v.contiguous() for k, v in flatten(model.state_dict()).items()}, path)
found["disk_mb"] = os.path.getsize(path) / 2**20
print(json.dumps(found))
"""


def measure(python: str, library: str, weights: str, activations: str, threads: int) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        command = [python, "-c", WORKER, library, weights, activations, directory, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}  # type: ignore[dict-item]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter that has optimum-quanto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    pythons = {"requanto": sys.executable}
    if arguments.peer_python:
        pythons["optimum-quanto"] = arguments.peer_python
    results = []
    for weights, activations in CASES:
        runs: dict[str, list[dict]] = {library: [] for library in pythons}
        for _ in range(arguments.repeats):
            for library, python in pythons.items():
                runs[library].append(measure(python, library, weights, activations, arguments.threads))
        for library, measured in runs.items():
            failed = next((run["failed"] for run in measured if "failed" in run), None)
            row = {"library": library, "weights": weights, "activations": activations}
            if failed is not None:
                row["failed"] = failed
            else:
                row |= {key: round(median(r[key] for r in measured), 4) for key in MEASURES if key in measured[0]}
            results.append(row)
            print(json.dumps(row), flush=True)
    import torch

    record = {
        "command": "python benchmarks/calibration.py"
        + (" --peer-python PYTHON" if arguments.peer_python else "")
        + f" --repeats {arguments.repeats} --threads {arguments.threads}",
        "machine": f"{platform.machine()}, {arguments.threads} threads",
        "torch": torch.__version__,
        "repeats": arguments.repeats,
        "units": "s: seconds; mb: MiB, peak_mb anonymous memory above the float model; error: of logits, relative",
        "results": results,
    }
    target = HERE / "results" / "calibration.json"
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
