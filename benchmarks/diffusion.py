"""A Flux-shaped transformer in bf16 and each dtype: size, load time, peak memory, time of a step, error of its output.

    python benchmarks/diffusion.py                            # 0.2 B parameters, on a CPU
    python benchmarks/diffusion.py --size full --device cuda  # FLUX.1's own 12 B, 1024x1024 pixels: needs 24 GB of disk

Each dtype runs in its own process, which measures its anonymous memory (RssAnon). The weights are random, the
shapes those of FLUX.1. Writes benchmarks/results/diffusion.json. (A file named diffusers.py would hide the library.)
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KINDS = ("bf16", "int8", "float8", "int4", "int2")

#: double blocks, single blocks, heads of 128, text width, tokens of image and text
SIZES: dict[str, dict[str, Any]] = {
    "small": {"layers": 2, "single": 4, "heads": 8, "text": 1024, "image_tokens": 256, "text_tokens": 64},
    "medium": {"layers": 4, "single": 8, "heads": 16, "text": 2048, "image_tokens": 1024, "text_tokens": 128},
    "full": {"layers": 19, "single": 38, "heads": 24, "text": 4096, "image_tokens": 4096, "text_tokens": 512},
}

# Runs in the measured process.
WORKER = r"""
import json, os, statistics, sys, threading, time
options = json.loads(sys.argv[1])
import torch, diffusers, requanto
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
torch.set_num_threads(options["threads"])
device, shape = options["device"], options["shape"]

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def synchronize():
    if device != "cpu":
        torch.accelerator.synchronize()

def load(directory, config=None):
    start = time.perf_counter()
    model = diffusers.FluxTransformer2DModel.from_pretrained(
        directory, torch_dtype=torch.bfloat16, quantization_config=config, device_map={"": device}
    )
    if config is None:  # plain loading maps the file: read it, as quantizing must
        sum(float(t.view(torch.int8).flatten()[::4096].sum()) for p in model.parameters() for t in (
            p.inner_tensors().values() if isinstance(p, requanto.QTensor) else [p.data]
        ))
    synchronize()
    return model, time.perf_counter() - start

with torch.device("meta"):  # what the library imports when first used is no part of loading
    import accelerate, safetensors.torch
    diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
requanto.QTensor.quantize(torch.randn(8, 64), "int8")

peak, running = 0, True
def sample():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.002)
base = anonymous()
thread = threading.Thread(target=sample, daemon=True)
thread.start()
kind = options["kind"]
model, seconds = load(options["directory"], None if kind == "bf16" else requanto.QuantoConfig(weights=kind))
running = False
thread.join()
result = {"load_seconds": seconds, "peak_mb": (peak - base) / 1e6, "held_mb": model.get_memory_footprint() / 1e6}

generator = torch.Generator().manual_seed(0)
def noise(*size):
    return torch.randn(*size, generator=generator).to(device, torch.bfloat16)
side = int(shape["image_tokens"] ** 0.5)
ids = torch.zeros(side, side, 3)
ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
inputs = {
    "hidden_states": noise(1, side * side, 64),
    "encoder_hidden_states": noise(1, shape["text_tokens"], shape["text"]),
    "pooled_projections": noise(1, 768),
    "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
    "guidance": torch.tensor([3.5], device=device, dtype=torch.bfloat16),
    "img_ids": ids.reshape(-1, 3).to(device),
    "txt_ids": torch.zeros(shape["text_tokens"], 3, device=device),
    "return_dict": False,
}
times = []
with torch.no_grad():
    if options["compile"]:
        model.compile_repeated_blocks(fullgraph=True)
    for _ in range(options["steps"] + 1):
        synchronize()
        start = time.perf_counter()
        out = model(**inputs)[0]
        synchronize()
        times.append(time.perf_counter() - start)
result["step_seconds"] = statistics.median(times[1:])
reference = options["directory"] + "/output.pt"
if kind == "bf16":
    torch.save(out.cpu(), reference)
else:
    expected = torch.load(reference).float()
    result["relative_error"] = ((out.cpu().float() - expected).norm() / expected.norm()).item()
    saved = options["save_to"]
    model.save_pretrained(saved)
    files = [os.path.join(saved, f) for f in os.listdir(saved) if f.endswith(".safetensors")]
    result["disk_mb"] = sum(map(os.path.getsize, files)) / 1e6
    del model
    result["reload_seconds"] = load(saved)[1]
print("RESULT" + json.dumps(result))
"""


def write_checkpoint(directory: Path, shape: dict[str, Any]) -> dict[str, float]:
    """Writes random weights in bf16 shards; returns their number and bytes."""
    import diffusers
    import torch

    torch.manual_seed(0)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            num_layers=shape["layers"],
            num_single_layers=shape["single"],
            num_attention_heads=shape["heads"],
            joint_attention_dim=shape["text"],
            guidance_embeds=True,
        ).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter.data, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
    model.save_pretrained(directory, max_shard_size="5GB")
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    return {"parameters": sum(sizes) // 2, "read_mb": sum(sizes) / 1e6, "largest_tensor_mb": max(sizes) / 1e6}


def run_worker(options: dict[str, Any]) -> dict[str, float]:
    """Measures one dtype in its own process."""
    command = [sys.executable, "-c", WORKER, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            return json.loads(line.removeprefix("RESULT"))
    raise RuntimeError(f"{options['kind']} failed:\n{done.stderr[-3000:]}")


def main() -> None:
    """Writes the checkpoint, measures each dtype, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "diffusion.json")
    options = parser.parse_args()
    shape = SIZES[options.size]
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "float"
        about = write_checkpoint(directory, shape)
        for kind in KINDS:
            job = {
                "kind": kind,
                "directory": str(directory),
                "save_to": str(Path(scratch) / kind),
                "shape": shape,
                "device": options.device,
                "steps": options.steps,
                "threads": options.threads,
                "compile": options.compile,
            }
            table[kind] = {key: round(value, 4) for key, value in run_worker(job).items()}
            table[kind]["step_over_bf16"] = round(table[kind]["step_seconds"] / table["bf16"]["step_seconds"], 3)
            print(kind, json.dumps(table[kind]), flush=True)
    arguments = f" --size {options.size} --device {options.device}" + (" --compile" if options.compile else "")
    document = {
        "command": f"python benchmarks/diffusion.py{arguments}",
        "machine": f"{platform.machine()}, {options.threads} threads",
        **about,
        "results": table,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
