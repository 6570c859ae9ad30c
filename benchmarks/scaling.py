"""LoRA over quantized weights with 1 and 2 processes, DDP and FSDP2: tokens a second, and bytes of weights a rank holds.

    python benchmarks/scaling.py                      # CPU, gloo
    python benchmarks/scaling.py --device cuda --ranks 1 2 4 8

Writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM

import requanto

HERE = Path(__file__).parent
BATCH, LENGTH = 2, 128


def worker(rank: int, world: int, port: int, mode: str, weights: str, arguments: argparse.Namespace, out: str) -> None:
    """One rank: trains a few steps, rank 0 writes what it measured."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    device = torch.device(arguments.device, rank) if arguments.device != "cpu" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world)
    config = requanto.QuantoConfig(weights=weights)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, quantization_config=config).to(device)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    if mode == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        model = torch.nn.parallel.DistributedDataParallel(model)
    held = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    size = sum(t.nbytes for t in held)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, 1000, (BATCH, LENGTH), device=device)
    times = []
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - start)
    if rank == 0:
        seconds = sorted(times[1:])[len(times[1:]) // 2]
        row = {"ranks": world, "mode": mode, "weights": weights, "weights_mb": round(size / 1e6, 1)}
        row["tokens_per_s"] = round(world * BATCH * LENGTH / seconds)
        Path(out).write_text(json.dumps(row), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", nargs="+", default=["int4", "int8"])
    parser.add_argument("--modes", nargs="+", default=["ddp", "fsdp2"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    from training import make_model

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        make_model(directory, arguments.hidden, arguments.layers)
        arguments.model = directory
        for weights in arguments.weights:
            for mode in arguments.modes:
                for world in arguments.ranks:
                    with socket.socket() as free:
                        free.bind(("127.0.0.1", 0))
                        port = free.getsockname()[1]
                    out = f"{directory}/row.json"
                    mp.spawn(worker, args=(world, port, mode, weights, arguments, out), nprocs=world)
                    rows.append(json.loads(Path(out).read_text(encoding="utf-8")))
                    print(rows[-1])
    result = {"command": " ".join(sys.argv), "machine": platform.processor(), "cores": os.cpu_count(), "rows": rows}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "scaling.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
