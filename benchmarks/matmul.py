"""Times every kernel, cuBLAS bf16 and each peer that can be imported, on a CUDA machine.

    PYTHONPATH=src:kernels python benchmarks/matmul.py
    PYTHONPATH=src:kernels python benchmarks/matmul.py --shapes 4096x14336 --rows 1 16
    PYTHONPATH=src:kernels TRITON_INTERPRET=1 python benchmarks/matmul.py --dry    # without a GPU: does it run?

Writes benchmarks/results/matmul.json after every shape, then a table (matmul.md) and a plot (matmul.png).

Each op runs inside a CUDA graph over copies of its weight with twice the size of L2, so that no weight is cached there;
the result is the median over replays, for each call. `share` is the part of the roofline reached: the larger of bytes
over the measured copy bandwidth and operations over the measured bf16 cuBLAS rate (doubled for 8-bit operands), over
the time. At the end each goal is printed as reached, not reached, or not measured.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import command
from gpu_timing import graph_ms, markdown, plot

SHAPES = ((4096, 14336), (28672, 8192), (4096, 4096), (14336, 4096))
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


@dataclass(frozen=True)
class Setting:
    """Device and amount of work; DRY is for a machine without a GPU."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    copy_bytes: int = 1 << 30
    square: int = 8192
    replays: int = 50
    fallback_l2: int = 64 << 20


#: float16, since the interpreter computes bf16 wrongly; tiny, since it is a million times slower than a GPU.
DRY = Setting("cpu", torch.float16, 1 << 16, 64, 1, 1)
PEERS = ("torchao", "gemlite", "bitsandbytes", "optimum.quanto", "sdnq")


def roofline(at: Setting) -> tuple[float, float]:
    """Measures (bytes a second of a device copy, operations a second of a large 16-bit GEMM)."""
    a = torch.empty(at.copy_bytes, dtype=torch.uint8, device=at.device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() / graph_ms([lambda: b.copy_(a)] * 4, 10, at.device) * 1e3
    x = torch.randn(at.square, at.square, device=at.device, dtype=at.dtype)
    rate = 2 * at.square**3 / graph_ms([lambda: x @ x] * 4, 10, at.device) * 1e3
    return bandwidth, rate


def own_ops(n: int, k: int, copies: int, at: Setting) -> dict[str, tuple[Callable, float, int]]:
    """By name: (function of (x, copy number), weight bytes, rate factor of the operands)."""
    import requanto_kernels as rk

    scale = torch.rand(n, k // 128, device=at.device, dtype=at.dtype) * 0.01
    row = torch.rand(n, 1, device=at.device) * 0.01
    codes = [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=at.device) for _ in range(copies)]
    bytes8 = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=at.device) for _ in range(copies)]
    float8 = [(b.float() / 32).to(torch.float8_e4m3fn) for b in bytes8]
    scratch = torch.empty(n, k, device=at.device, dtype=at.dtype)
    four = {"bits": 4, "layout": "exec"}

    def dequantize(x, i):
        return torch.nn.functional.linear(x, rk.wq_dequant(codes[i], scale, dtype=x.dtype, out=scratch, **four))

    def dynamic(weights, dtype):
        def call(x, i):
            q, xs = rk.quant_rows(x, dtype)
            return rk.scaled_mm(q, weights[i], xs, row, out_dtype=x.dtype)

        return call

    def w4a8(x, i):
        q, xs = rk.quant_rows(x)
        return rk.w4a8_gemm(q, xs, codes[i], scale, layout="exec", out_dtype=x.dtype)

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
    """The peer's layers, quantized from a weight of the same shape; the caller reports a missing API."""
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


def all_ops(n: int, k: int, at: Setting, skipped: list[str]) -> tuple[dict[str, tuple[Callable, float, int]], int]:
    """(the float GEMM and all quantized ones by name, the number of copies of each weight)."""
    l2 = at.fallback_l2
    if at.device == "cuda":
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or l2
    copies = max(2, -(-2 * l2 // (n * k // 4)))  # of the smallest weight, 2 bits an element
    dense = [torch.randn(n, k, device=at.device, dtype=at.dtype) for _ in range(copies)]
    ops = {"bf16": (lambda x, i: torch.nn.functional.linear(x, dense[i]), 2 * n * k, 1)}
    ops |= own_ops(n, k, copies, at)
    for peer in PEERS if at.device == "cuda" else ():
        if importlib.util.find_spec(peer.split(".")[0]) is None:
            continue
        try:
            for op, module in peer_ops(peer, n, k).items():
                # One weight only: a peer's small layers may profit from L2, in its favour.
                ops[f"{peer}: {op}"] = (lambda x, i, f=module: f(x), 0, 1)
        except Exception as error:
            skipped.append(f"{peer} {n}x{k}: {type(error).__name__}: {str(error)[:200]}")
    return ops, copies


def measure(shapes, rows, at: Setting, deadline: float, keep: Callable[[dict], None]) -> dict:
    """Times everything; calls `keep` with the results after every shape. What the deadline cuts off is listed as skipped."""
    bandwidth, rate = roofline(at)
    result = {
        "command": "PYTHONPATH=src:kernels " + command(),
        "gpu": torch.cuda.get_device_name() if at.device == "cuda" else "none: a dry run, its times mean nothing",
        "torch": torch.__version__, "copy_bytes_per_s": bandwidth, "bf16_flops": rate, "rows": [], "skipped": [],
    }  # fmt: skip
    for n, k in shapes:
        if time.monotonic() > deadline:
            result["skipped"].append(f"{n}x{k}: no time left (--minutes)")
            continue
        ops, copies = all_ops(n, k, at, result["skipped"])
        for m in rows:
            x = torch.randn(m, k, device=at.device, dtype=at.dtype)
            base = None
            for name, (call, weight_bytes, factor) in ops.items():
                if time.monotonic() > deadline:
                    result["skipped"].append(f"{name} {n}x{k} M={m}: no time left (--minutes)")
                    continue
                try:
                    with torch.no_grad():
                        ms = graph_ms([partial(call, x, i) for i in range(copies)], at.replays, at.device)
                except Exception as error:
                    if at == DRY:
                        raise
                    result["skipped"].append(f"{name} {n}x{k} M={m}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                base = ms if name == "bf16" else base
                floor = max((weight_bytes + 2 * m * (n + k)) / bandwidth, 2 * m * n * k / (rate * factor)) * 1e3
                row = {"op": name, "n": n, "k": k, "m": m, "us": ms * 1e3}
                row |= {"ratio": base / ms if base else None, "share": floor / ms if weight_bytes else None}
                result["rows"].append(row)
                print(f"{n:6}x{k:<6} M={m:<5} {name:28} {ms * 1e3:9.1f} us  ratio {row['ratio'] or 0:5.2f}", flush=True)
        del ops  # the weights, before the next shape's
        keep(result)
    return result


def judge(rows: list[dict]) -> list[str]:
    """One line for each goal: reached or not."""
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


def write(result: dict, out: Path) -> None:
    """Writes the results, and whether each goal was reached."""
    result["goals"] = judge(result["rows"])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def present(result: dict, out: Path) -> str:
    """Writes table and plot; returns a message about the plot."""
    rows = result["rows"]
    ms = list(dict.fromkeys(row["m"] for row in rows))
    text = [f"Ratios to cuBLAS bf16 (share of the roofline) on {result['gpu']}. `{result['command']}`\n"]
    panels: dict[str, dict] = {}
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in rows):
        here = {(row["op"], row["m"]): row for row in rows if (row["n"], row["k"]) == (n, k) and row["ratio"]}
        names = [name for name in dict.fromkeys(name for name, _ in here) if name != "bf16"]
        cell = lambda r: None if r is None else f"{r['ratio']:.2f}" + (f" ({r['share']:.0%})" if r["share"] else "")  # noqa: E731
        body = [[name, *(cell(here.get((name, m))) for m in ms)] for name in names]
        text += [f"## {n} x {k}\n", markdown(["", *(f"M={m}" for m in ms)], body)]
        panels[f"{n} x {k}"] = {name: {m: here[name, m]["ratio"] for m in ms if (name, m) in here} for name in names}
    text += ["## Goals\n", *(f"- {line}" for line in result["goals"]), *(f"- skipped: {s}" for s in result["skipped"])]
    out.with_suffix(".md").write_text("\n".join(text) + "\n")
    return plot(out.with_suffix(".png"), panels, "times as fast as cuBLAS bf16", "M (rows)") if panels else "no figures"


def main() -> int:
    """Measures, prints a line for each op, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matmul.json")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit; what is left then is listed as skipped")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, no graphs, no peers: checks that it runs")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("benchmarks/matmul.py needs a CUDA device and found none: nothing was measured.", file=sys.stderr)
        return 2
    at = DRY if args.dry else Setting(replays=args.replays)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if args.dry:
        shapes, args.rows = [(32, 256)], (1, 17)
    result = measure(shapes, args.rows, at, time.monotonic() + 60 * args.minutes, lambda r: write(r, args.out))
    write(result, args.out)
    print("\n".join(["", *result["goals"], *(f"skipped: {line}" for line in result["skipped"])]))
    print(f"wrote {args.out}; {present(result, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
