"""CPU time of a GPU layer's call, without a GPU: everything on the host runs, by a driver that launches nothing. Also of
queries, keys and values of one token, one by one and together, and the launches of a model that is joined.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py           # half a minute; writes benchmarks/results/host_time.json

Tensors are on the CPU (`tests/kernels/fake_driver.py`). Not in it, and the same for every library: what the driver takes
to start a kernel (a few microseconds each). `F.linear` is torch's own linear in bfloat16 at 16 x 16, whose work is nothing.
The times are those of this thread on its core, the fastest of several rounds, in microseconds.

For gemlite's layer the same way of measuring gave 111 us, on another machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, write
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))
from fake_driver import fake_gpu_layers, watch

import requanto
from requanto import QTensor, join_layers
from requanto.linear import custom_ops, linear_many

#: name, type and options, rows of x
LAYERS = [
    ("int4, group 64, affine", "int4", {}, 1),
    ("int4, group 128, symmetric", "int4", {"group_size": 128, "symmetric": True}, 1),
    ("int4, 16 rows", "int4", {}, 16),
    ("int4, 2048 rows", "int4", {}, 2048),
    ("int4, scales in 6 bits", "int4", {"scale_bits": 6}, 1),
    ("int4, column scale", "int4", {"column_scale": "std"}, 1),
    ("int4, rotation", "int4", {"rotation": True}, 1),
    ("nf4", "nf4", {}, 1),
    ("int8", "int8", {}, 1),
    ("float8", "float8", {}, 1),
    ("int8 x int8", "int8", {"activation": "int8"}, 16),
    ("int4 x int8", "int4", {"group_size": 128, "activation": "int8"}, 16),
    ("float8 x float8", "float8", {"activation": "float8"}, 16),
]


def microseconds(call: Callable[[], object], rounds: int = 9, calls: int = 500) -> float:
    """CPU time of a call: of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, time.thread_time() - begin)
    return round(best / calls * 1e6, 1)


def layer(kind: str, size: int, activation: str | None = None, **how: object) -> nn.Linear:
    made = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    weight = QTensor.quantize(made.weight, kind, **how)
    weight.activation = activation
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def row_of(name: str, kind: str, how: dict, rows: int, gpu, size: int) -> dict[str, object]:
    module, x = layer(kind, size, **how), torch.randn(rows, size, dtype=torch.bfloat16)
    for _ in range(3):
        module(x)
    counts = watch(gpu, lambda: module(x))
    found: dict[str, object] = {
        "layer": name, "rows": rows, "kernels": counts.launches, "operators": counts.operators, "reads": counts.reads,
    }  # fmt: skip
    if "linear" in counts.operators:  # cuBLAS's part would be computed here
        found["us"] = None
    else:
        found["us"] = microseconds(lambda: module(x))
        parts = custom_ops.arguments(module.weight)
        if module.weight.column is None and module.weight.rotation is None:
            found["in a compiled graph, us"] = microseconds(lambda: torch.ops.requanto.linear(x, None, *parts, None))
    gpu.launches.clear()
    gpu.streams.clear()
    return found


class Attention(nn.Module):
    """Queries, keys and values in the proportions of Llama-3-8B, in int4 with biases."""

    def __init__(self, size: int, column_scale: str | None) -> None:
        super().__init__()
        for name, rows in (("q", size), ("k", size // 4), ("v", size // 4)):
            made = nn.Linear(size, rows, dtype=torch.bfloat16).requires_grad_(False)
            weight = QTensor.quantize(made.weight, "int4", column_scale=column_scale)
            made.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, made)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


def together(column_scale: str | None, gpu, size: int) -> dict[str, object]:
    """CPU time of the three layers: one by one, by `linear_many`, and as layers of a joined model."""
    model, x = Attention(size, column_scale), torch.randn(1, 1, size, dtype=torch.bfloat16)
    layers = model.q, model.k, model.v
    weights, biases = [one.weight for one in layers], [one.bias for one in layers]
    found: dict[str, object] = {"column scale": column_scale}
    for name, call in (
        ("one by one", lambda: model(x)),
        ("linear_many", lambda: linear_many(x, weights, biases)),
        ("joined", lambda: model(x)),
    ):
        if name == "joined":
            join_layers(model, x)
        for _ in range(3):
            call()
        found[f"{name}, launches"] = len(watch(gpu, call).launches)
        found[f"{name}, us"] = microseconds(call)
        gpu.launches.clear()
        gpu.streams.clear()
    return found


def launches_of_a_token(gpu) -> dict[str, int]:
    """GEMMs that a Llama of 32 layers launches for a token, as Llama-3-8B has them; its sizes are small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=32, vocab_size=64)).bfloat16().eval()
    requanto.quantize(model, "int4", exclude="lm_head", progress=False)
    requanto.freeze(model)
    requanto.prepare(model, smallest=0)
    found, token = {}, torch.ones(1, 1, dtype=torch.int64)
    for name in ("one by one", "joined"):
        if name == "joined":
            join_layers(model)
        for _ in range(2):
            model(token, use_cache=False)
        found[name] = sum("wq_gemm" in one for one in watch(gpu, lambda: model(token, use_cache=False)).launches)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", type=int, default=1024, help="N and K")
    options.add_argument("--out", type=Path, default=RESULTS / "host_time.json")
    chosen = options.parse_args()
    with fake_gpu_layers() as gpu, torch.no_grad():
        tiny, x = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16), torch.randn(1, 16, dtype=torch.bfloat16)
        torch_us = {
            "F.linear": microseconds(lambda: F.linear(x, tiny.weight)),
            "nn.Linear": microseconds(lambda: tiny(x)),
        }
        rows = [row_of(*one, gpu, chosen.size) for one in LAYERS]
        sets = [together(column_scale, gpu, chosen.size) for column_scale in (None, "mean")]
        token = launches_of_a_token(gpu)
    for row in rows:
        print(f"{row['layer']:28} {row['us']!s:>6} us {row.get('in a compiled graph, us', '')!s:>6}  {row['kernels']}")
    for one in sets:
        print("q, k and v:", one)
    print("launches of a token:", token)
    print(torch_us)
    quoted = {"gemlite's layer, as measured in the same way on another machine": 111}
    found = {"layers": rows, "queries, keys and values": sets, "launches of a token": token}
    write(chosen.out, {"version": requanto.__version__, "torch_us": torch_us, "quoted_us": quoted, **found})


if __name__ == "__main__":
    main()
