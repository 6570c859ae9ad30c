"""Quantizing a sharded checkpoint of 1.2 billion parameters while loading: seconds per GB read, peak memory, size on disk.

    python benchmarks/load.py                              # Requanto and bf16
    python benchmarks/load.py --peer-python /path/python   # and optimum-quanto, in that interpreter

Each load runs in its own process, which measures its anonymous memory (RssAnon) every few milliseconds; the libraries
alternate. Writes benchmarks/results/load.json.
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

from common import command

HERE = Path(__file__).parent
KINDS = ("int8", "float8", "int4", "int2")

# Runs in the measured process: `library`, `kind`, `directory` are given as arguments.
WORKER = r"""
import json, os, resource, sys, threading, time
library, kind, directory, save_to, method = sys.argv[1:6]
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(2)
from transformers import AutoModelForCausalLM, QuantoConfig
if library == "requanto":
    import requanto
    config = requanto.QuantoConfig(weights=kind, method=method or None)
elif library == "optimum-quanto":
    from optimum.quanto import QModuleMixin  # imported before the clock starts, like requanto
    config = QuantoConfig(weights=kind)
else:
    config = None

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, running = 0, True
def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
base = anonymous()
thread = threading.Thread(target=sample, daemon=True)
thread.start()
start = time.perf_counter()
options = {"quantization_config": config} if config else {}
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
if config is None:  # plain loading maps the file: read it, as quantizing must
    total = sum(float(p.view(torch.int16)[..., ::64].sum()) for p in model.parameters())
seconds = time.perf_counter() - start
running = False
thread.join()
held = sum(p.numel() * p.element_size() for p in model.parameters())
if library == "requanto":
    held = model.get_memory_footprint()
elif library == "optimum-quanto":
    held = 0
    for p in model.parameters():
        names = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else None
        stack = [p]
        while stack:
            t = stack.pop()
            if hasattr(t, "__tensor_flatten__"):
                stack += [getattr(t, n) for n in t.__tensor_flatten__()[0]]
            else:
                held += t.numel() * t.element_size()
result = {"seconds": seconds, "peak": peak - base, "held": held}
if library == "requanto" and save_to:
    model.save_pretrained(save_to)
    files = [os.path.join(save_to, f) for f in os.listdir(save_to) if f.endswith(".safetensors")]
    result["disk"] = sum(map(os.path.getsize, files))
    del model
    start = time.perf_counter()
    again = AutoModelForCausalLM.from_pretrained(save_to)
    result["reload_seconds"] = time.perf_counter() - start
print("RESULT" + json.dumps(result))
"""


def write_checkpoint(directory: Path, layers: int) -> tuple[int, int]:
    """Writes a Llama-shaped checkpoint of random weights in 500 MB shards; returns (bytes, bytes of the largest tensor)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    model.save_pretrained(directory, max_shard_size="500MB")
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return sum(sizes), max(sizes)


def run_worker(
    python: str, library: str, kind: str, directory: Path, save_to: str, method: str | None = None
) -> dict[str, float]:
    """Measures one load in its own process."""
    words = [python, "-c", WORKER, library, kind, str(directory), save_to, method or ""]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            return json.loads(line.removeprefix("RESULT"))
    raise RuntimeError(f"loading with {library} {kind} failed:\n{done.stderr[-3000:]}")


def main() -> None:
    """Writes the checkpoint, loads it alternately with each library, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", help="interpreter that has optimum-quanto and transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="types, e.g. int4")
    parser.add_argument(
        "--method", help="also load with this method, e.g. minmax, in addition to the default of each type"
    )
    parser.add_argument("--layers", type=int, default=16, help="16 layers are 1.24 billion parameters")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "load.json")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "float"
        read, largest = write_checkpoint(directory, options.layers)
        jobs = [("bf16", "none", sys.executable)]
        for kind in options.kinds:
            jobs.append(("requanto", kind, sys.executable))
            if options.method:
                jobs.append((f"requanto {options.method}", kind, sys.executable))
            if options.peer_python:
                jobs.append(("optimum-quanto", kind, options.peer_python))
        run_worker(sys.executable, "bf16", "none", directory, "")  # not measured: the first read comes from the disk
        for repeat in range(options.repeats):
            for library, kind, python in jobs:
                save_to = str(Path(scratch) / "saved" / kind) if library == "requanto" and repeat == 0 else ""
                name, _, method = library.partition(" ")
                result = run_worker(python, name, kind, directory, save_to, method)
                runs.setdefault(f"{library} {kind}", []).append(result)
                print(
                    f"{library:16} {kind:7} {result['seconds']:.1f} s, peak {result['peak'] / 1e6:.0f} MB", flush=True
                )
    table = {
        name: {
            "seconds_per_gb": median(r["seconds"] for r in results) / (read / 1e9),
            "peak_mb": max(r["peak"] for r in results) / 1e6,
            "held_mb": results[0]["held"] / 1e6,
            "limit_mb": (results[0]["held"] + 2 * largest + 200e6) / 1e6,
            **({"disk_mb": results[0]["disk"] / 1e6} if "disk" in results[0] else {}),
            **({"reload_seconds": results[0]["reload_seconds"]} if "reload_seconds" in results[0] else {}),
        }
        for name, results in runs.items()
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": command(),
        "machine": f"{platform.machine()}, 2 threads",
        "read_gb": read / 1e9,
        "largest_tensor_mb": largest / 1e6,
        "results": table,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
