"""Time every kernel beside cuBLAS bf16 and each peer that is importable, on a CUDA machine.

    PYTHONPATH=src:kernels python benchmarks/matmul.py --out benchmarks/results/matmul.json

Each op runs inside a CUDA graph over enough copies of its weight to overflow L2 twice, so that no weight is found
there; the figure is the median over replays, a call. `share` is the part of the roofline reached: the larger of bytes
over the measured copy bandwidth and operations over the measured bf16 cuBLAS rate (doubled for 8-bit operands), over
the time. At the end each goal is printed: reached, not reached, or not measured.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
#: (goal, op, M, (N, K) or None for the worst of all shapes, quantity, bound)
GOALS = (
    ("int4 g128, M=1, 4096x14336: share of bandwidth", "wq4", 1, (4096, 14336), "share", 0.70),
    ("int4 g128, M=1, 8192x28672: share of bandwidth", "wq4", 1, (28672, 8192), "share", 0.82),
    ("int4 g128, M=1, 8192x28672: ratio to bf16", "wq4", 1, (28672, 8192), "ratio", 3.1),
    ("int4 g128, M=16: ratio to bf16", "wq4", 16, (28672, 8192), "ratio", 2.5),
    ("int4 g128, M=64: ratio to bf16", "wq4", 64, (28672, 8192), "ratio", 1.6),
    ("int4 weight-only, M=4096: ratio to bf16", "wq4", 4096, None, "ratio", 0.90),
    ("int8 weight-only, M=4096: ratio to bf16", "wq8", 4096, None, "ratio", 0.90),
    ("int8 x int8 with quantization, M=4096: ratio to bf16", "int8 dynamic", 4096, None, "ratio", 1.5),
    ("fp8 x fp8 rows with quantization, M=4096: ratio to bf16", "fp8 dynamic", 4096, None, "ratio", 1.45),
)
PEERS = ("torchao", "gemlite", "bitsandbytes", "optimum.quanto", "sdnq")


def graph_ms(calls: list[Callable[[], object]], replays: int) -> float:
    """Median time of one call, all of them captured in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    times = sorted(times[3:])
    return times[len(times) // 2]


def roofline() -> tuple[float, float]:
    """(bytes a second of a device copy, operations a second of a large bf16 product)."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() / graph_ms([lambda: b.copy_(a)] * 4, 10) * 1e3
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 8192**3 / graph_ms([lambda: x @ x] * 4, 10) * 1e3
    return bandwidth, rate


def own_ops(n: int, k: int, copies: int) -> dict[str, tuple[Callable, float, int]]:
    """name: (function of (x, copy number), weight bytes, rate factor of the operands)."""
    import requanto_kernels as rk

    scale = torch.rand(n, k // 128, device="cuda", dtype=torch.bfloat16) * 0.01
    row = torch.rand(n, 1, device="cuda") * 0.01
    codes = [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda") for _ in range(copies)]
    bytes8 = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(copies)]
    float8 = [(b.float() / 32).to(torch.float8_e4m3fn) for b in bytes8]
    scratch = torch.empty(n, k, device="cuda", dtype=torch.bfloat16)
    four = {"bits": 4, "layout": "exec"}

    def dequantize(x, i):
        return torch.nn.functional.linear(x, rk.wq_dequant(codes[i], scale, out=scratch, **four))

    def dynamic(weights, dtype):
        def call(x, i):
            q, xs = rk.quant_rows(x, dtype)
            return rk.scaled_mm(q, weights[i], xs, row)

        return call

    def w4a8(x, i):
        q, xs = rk.quant_rows(x)
        return rk.w4a8_gemm(q, xs, codes[i], scale, layout="exec")

    return {
        "wq4": (lambda x, i: rk.wq_gemm(x, codes[i], scale, **four), n * k * (0.5 + 2 / 128), 1),
        "wq2": (lambda x, i: rk.wq_gemm(x, codes[i].view(-1)[: n * k // 4].view(n, -1), scale, bits=2, layout="exec"),
                n * k * (0.25 + 2 / 128), 1),
        "wq8": (lambda x, i: rk.wq_gemm(x, bytes8[i], row, bits=8), n * k, 1),
        "wqfp8": (lambda x, i: rk.wq_gemm(x, float8[i], row, bits=8), n * k, 1),
        "dequantize + cuBLAS": (dequantize, n * k * 4.5, 1),
        "int8 dynamic": (dynamic(bytes8, torch.int8), n * k, 2),
        "fp8 dynamic": (dynamic(float8, torch.float8_e4m3fn), n * k, 2),
        "w4a8 dynamic": (w4a8, n * k * (0.5 + 2 / 128), 2),
    }  # fmt: skip


def peer_ops(name: str, n: int, k: int) -> dict[str, Callable]:
    """The peer's layers, quantized from the same kind of weight; an API it lacks is reported by the caller."""
    layer = torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
    if name == "torchao":
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int4WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        def made(config):
            module = torch.nn.Sequential(torch.nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16))
            quantize_(module, config)
            return torch.compile(module)

        return {
            "wq4": made(Int4WeightOnlyConfig(group_size=128)),
            "wq8": made(Int8WeightOnlyConfig()),
            "int8 dynamic": made(Int8DynamicActivationInt8WeightConfig()),
            "fp8 dynamic": made(Float8DynamicActivationFloat8WeightConfig()),
        }
    if name == "gemlite":
        from gemlite.helper import A16W8, A8W8_int8_dynamic

        return {"wq8": A16W8(device="cuda").from_linear(layer), "int8 dynamic": A8W8_int8_dynamic().from_linear(layer)}
    if name == "bitsandbytes":
        import bitsandbytes as bnb

        four = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
        eight = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False).cuda()
        return {"wq4": four, "int8 dynamic": eight}
    if name == "optimum.quanto":
        from optimum.quanto import QLinear, freeze, qint4, qint8

        made = {}
        for op, qtype in (("wq4", qint4), ("wq8", qint8)):
            module = torch.nn.Sequential(QLinear.from_module(layer, weights=qtype))
            freeze(module)
            made[op] = module
        return made
    from sdnq import SDNQConfig, sdnq_post_load_quant

    module = torch.nn.Sequential(layer)
    config = SDNQConfig(weights_dtype="int8", use_quantized_matmul=True)
    return {"int8 dynamic": sdnq_post_load_quant(module, quantization_config=config)}


def measure(shapes, rows, replays: int) -> dict:
    bandwidth, rate = roofline()
    result = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "command": " ".join(sys.argv),
        "copy_bytes_per_s": bandwidth, "bf16_flops": rate, "rows": [], "skipped": [],
    }  # fmt: skip
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    for n, k in shapes:
        copies = max(2, -(-2 * l2 // (n * k // 2)))
        dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        ops = {"bf16": (lambda x, i, w=dense: torch.nn.functional.linear(x, w[i]), 2 * n * k, 1)}
        ops |= own_ops(n, k, copies)
        for peer in PEERS:
            if importlib.util.find_spec(peer.split(".")[0]) is None:
                continue
            try:
                for op, module in peer_ops(peer, n, k).items():
                    # One weight only: a peer's small layers may profit from L2. That errs in its favour.
                    ops[f"{peer}: {op}"] = (lambda x, i, f=module: f(x), 0, 1)
            except Exception as error:
                result["skipped"].append(f"{peer} {n}x{k}: {type(error).__name__}: {str(error)[:200]}")
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            base = None
            for name, (call, weight_bytes, factor) in ops.items():
                try:
                    with torch.no_grad():
                        ms = graph_ms([partial(call, x, i) for i in range(copies)], replays)
                except Exception as error:
                    result["skipped"].append(f"{name} {n}x{k} M={m}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                base = ms if name == "bf16" else base
                floor = max((weight_bytes + 2 * m * (n + k)) / bandwidth, 2 * m * n * k / (rate * factor)) * 1e3
                row = {"op": name, "n": n, "k": k, "m": m, "us": ms * 1e3}
                row |= {"ratio": base / ms if base else None, "share": floor / ms if weight_bytes else None}
                result["rows"].append(row)
                print(f"{n:6}x{k:<6} M={m:<5} {name:28} {ms * 1e3:9.1f} us  ratio {row['ratio'] or 0:5.2f}", flush=True)
    return result


def judge(rows: list[dict]) -> list[str]:
    """One line for each goal."""
    lines = []
    for text, op, m, shape, quantity, bound in GOALS:
        found = [r[quantity] for r in rows if r["op"] == op and r["m"] == m and shape in (None, (r["n"], r["k"]))]
        if not found or None in found:
            lines.append(f"not measured  {text} (goal {bound})")
        else:
            word = "reached" if min(found) >= bound else "NOT reached"
            lines.append(f"{word:13} {text}: {min(found):.2f} (goal {bound})")
    against = []
    for row in rows:
        peers = [r["us"] for r in rows if r["op"].endswith(f": {row['op']}") and all(r[c] == row[c] for c in "nkm")]
        if peers:
            against.append(min(peers) / row["us"])
    if against:
        word = "reached" if min(against) >= 1 else "NOT reached"
        lines.append(f"{word:13} every shape against the best peer: worst {min(against):.2f} (goal 1.0)")
    else:
        lines.append("not measured  every shape against the best peer: no peer is importable (goal 1.0)")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/matmul.json"))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="one shape, few rows")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/matmul.py needs a CUDA device and found none: nothing was measured.", file=sys.stderr)
        return 2
    result = measure(SHAPES[:1] if args.quick else SHAPES, (1, 64) if args.quick else args.rows, args.replays)
    result["goals"] = judge(result["rows"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(["", *result["goals"], *(f"skipped: {line}" for line in result["skipped"])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
