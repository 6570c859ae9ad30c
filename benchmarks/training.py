"""LoRA on frozen quantized weights: seconds a step and peak memory, compared with the float model and peers.

    python benchmarks/training.py                              # Requanto and float32
    python benchmarks/training.py --peer-python /path/python   # also optimum-quanto and bitsandbytes, if it has them
    python benchmarks/training.py --device cuda --dtype bfloat16

Every case runs in its own process; each round runs all cases, so that other load affects all of them.
`step_s` is the median of the rounds' medians, `best_step_s` the fastest round's. Writes benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from statistics import median

from common import RESULTS, write

LIMIT_S = 300
PEERS = {"optimum-quanto": ("int8", "int4"), "bitsandbytes": ("int8", "int4")}

WORKER = r"""
import json, resource, sys, time
library, kind, directory, device, dtype, steps = sys.argv[1:7]
import torch, transformers, peft
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[7]))
config = None
if library == "requanto":
    import requanto
    config = requanto.QuantoConfig(weights=kind)
elif library == "optimum-quanto":
    from optimum import quanto  # fails here where it is missing
    config = transformers.QuantoConfig(weights=kind)
elif library == "bitsandbytes":
    import bitsandbytes
    config = transformers.BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "int4")
model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, quantization_config=config, dtype=getattr(torch, dtype), device_map=device
)
torch.manual_seed(0)
model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids = torch.randint(0, 1000, (2, 128), device=device)
times, losses = [], []
for _ in range(int(steps) + 1):
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))  # waits for the device
    times.append(time.perf_counter() - start)
peak = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"step_s": sorted(times[1:])[len(times[1:]) // 2], "peak_bytes": peak, "losses": [losses[0], losses[-1]]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of an environment with optimum-quanto or bitsandbytes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    cases = [("float", arguments.dtype, sys.executable)]
    cases += [("requanto", kind, sys.executable) for kind in ("int8", "int4", "int2", "float8")]
    if arguments.peer_python:
        cases += [(library, kind, arguments.peer_python) for library, kinds in PEERS.items() for kind in kinds]
    runs: dict[tuple[str, str], list[dict]] = {case[:2]: [] for case in cases}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        make_model(directory, arguments.hidden, arguments.layers)
        for _ in range(arguments.rounds):
            for library, kind, python in cases:
                words = [library, kind, directory, arguments.device, arguments.dtype, str(arguments.steps)]
                words.append(str(arguments.threads))
                try:
                    done = subprocess.run(
                        [python, "-c", WORKER, *words], capture_output=True, text=True, check=False, timeout=LIMIT_S
                    )
                except subprocess.TimeoutExpired:
                    failed[f"{library} {kind}"] = f"no result in {LIMIT_S} s"
                    continue
                if done.returncode:
                    failed[f"{library} {kind}"] = (done.stderr.strip().splitlines() or ["no message"])[-1]
                else:
                    runs[library, kind].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for (library, kind), found in runs.items():
        if not found:
            print(f"{library:15} {kind:9} failed: {failed.get(f'{library} {kind}')}")
            continue
        row = {
            "library": library,
            "weights": kind,
            "step_s": round(median(r["step_s"] for r in found), 4),
            "best_step_s": round(min(r["step_s"] for r in found), 4),
            "peak_mb": round(median(r["peak_bytes"] for r in found) / 1e6),
            "losses": found[0]["losses"],
        }
        rows.append(row)
        print(
            f"{library:15} {kind:9} {row['step_s']:8.3f} s a step {row['peak_mb']:7} MB peak  loss {row['losses'][-1]:.3f}"
        )
    note = "cases in turn, each in its own process; other work may have run on the machine meanwhile, see load"
    size = {"hidden": arguments.hidden, "layers": arguments.layers, "batch": 2, "length": 128, "rank": 8}
    result = {"note": note, "model": size, "threads": arguments.threads, "rows": rows, "failed": failed}
    write(RESULTS / "training.json", result)


def make_model(directory: str, hidden: int, layers: int) -> None:
    """Saves a random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=8192,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


if __name__ == "__main__":
    main()
