"""Whole models of random weights: prefill and decode of Llama shapes, a denoising step of a Flux shape, peak memory.

    PYTHONPATH=src:kernels python benchmarks/model.py                        # on a GPU: 1b, 8b and flux; on a CPU: 1b
    PYTHONPATH=src:kernels python benchmarks/model.py --shapes 8b --only int4
    PYTHONPATH=src:kernels python benchmarks/model.py --shapes tiny flux-tiny --repeats 1    # seconds, on any machine

The weights are random: speed and size do not depend on them. Each model is created on the device and its linear layers are
quantized there, as by `from_pretrained`. bf16 runs first and last; ratios are to the mean of the two, `bf16_drift` is
their quotient. On a GPU a prefill, a decoding step and a denoising step are CUDA graphs, which excludes the time of
Python; `eager_ms` is the same step without a graph. Peers that can be imported quantize the same layers. Writes
benchmarks/results/models_<device>.json after every model, a table (.md) and a plot (.png).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import command
from flux import SHAPES as FLUX_SHAPES
from flux import FluxShaped
from gpu_timing import graph_ms, markdown, plot, synchronize, wall_ms
from torch import nn

import requanto
from requanto.dtypes.qtypes import resolve_qtype

LLAMA_SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1024},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
OURS: dict[str, dict[str, Any]] = {
    "int8": {"kind": "int8"},
    "float8": {"kind": "float8"},
    "int4": {"kind": "int4", "group_size": 128},
    "int2": {"kind": "int2"},
    "int8 x int8": {"kind": "int8", "activation": "int8"},
    "float8 x float8": {"kind": "float8", "activation": "float8"},
    "int4 x int8": {"kind": "int4", "group_size": 128, "activation": "int8"},
}
#: layers that stay float, as by default in `from_pretrained`
SKIPPED = ("lm_head", "image_in", "text_in", "image_out")


def build(shape: str, device: str) -> nn.Module:
    """The float model in bf16, created on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        if shape in FLUX_SHAPES:
            model: nn.Module = FluxShaped(FLUX_SHAPES[shape]).to(torch.bfloat16)
        else:
            from transformers import AutoModelForCausalLM, LlamaConfig

            heads = LLAMA_SHAPES[shape]["hidden_size"] // 64
            config = LlamaConfig(
                **LLAMA_SHAPES[shape], num_attention_heads=heads, num_key_value_heads=max(1, heads // 4)
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of each layer to quantize."""
    found = []
    for _path, module in model.named_modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name not in SKIPPED:
                found.append((module, name, child))
    return found


def quantize(model: nn.Module, kind: str, group_size: int | str = "default", activation: str | None = None) -> None:
    """Quantizes each weight with Requanto, on its device, in place."""
    for _, _, layer in linears(model):
        weight = requanto.QTensor.quantize(layer.weight, kind, group_size=group_size)
        weight.activation = None if activation is None else resolve_qtype(activation)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def quantize_torchao(model: nn.Module, config: Any) -> None:
    """Quantizes the same layers with torchao."""
    from torchao.quantization import quantize_

    chosen = {id(layer) for _, _, layer in linears(model)}
    quantize_(model, config, filter_fn=lambda module, name: id(module) in chosen)


def quantize_bitsandbytes(model: nn.Module, four: bool) -> None:
    """Replaces the same layers by bitsandbytes' layers."""
    import bitsandbytes as bnb

    for parent, name, layer in linears(model):
        size, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if four:
            new = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
        if bias:
            new.bias = layer.bias
        setattr(parent, name, new.to(layer.weight.device))


def peers() -> dict[str, Callable[[nn.Module], None]]:
    """Functions that quantize a model in place, for each peer that can be imported, by name."""
    found: dict[str, Callable[[nn.Module], None]] = {}
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        found["torchao: int8"] = lambda model: quantize_torchao(model, Int8WeightOnlyConfig())
        found["torchao: int4"] = lambda model: quantize_torchao(model, Int4WeightOnlyConfig(group_size=128))
    except Exception as error:
        print(f"torchao: not compared ({type(error).__name__}: {error})")
    try:
        import bitsandbytes  # noqa: F401

        found["bitsandbytes: int8"] = lambda model: quantize_bitsandbytes(model, four=False)
        found["bitsandbytes: nf4"] = lambda model: quantize_bitsandbytes(model, four=True)
    except Exception as error:
        print(f"bitsandbytes: not compared ({type(error).__name__}: {error})")
    return found


def steps_of(model: nn.Module, shape: str, prompt: int, device: str) -> dict[str, Callable[[], object]]:
    """The calls to time, by name; each does the same every time."""
    if isinstance(model, FluxShaped):
        inputs = model.inputs(device)
        return {"step": lambda: model(*inputs)}
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=prompt + 8)
    ids = torch.randint(0, LLAMA_SHAPES[shape]["vocab_size"], (1, prompt), device=device)
    model(ids[:, :1], past_key_values=cache, use_cache=True)  # allocates the cache's tensors

    def run(tokens: torch.Tensor, past: int) -> torch.Tensor:
        for layer in cache.layers:  # on the device, as part of the graph: each replay starts at the same position
            layer.cumulative_length.fill_(past)
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return {"prefill": lambda: run(ids, 0), "decode": lambda: run(ids[:, :1], prompt)}


@torch.inference_mode()
def measure(model: nn.Module, shape: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Milliseconds of each step, in a graph and without; bytes at the peak of a step."""
    result: dict[str, Any] = {}
    steps = steps_of(model, shape, options.prompt, device)
    for name, call in steps.items():
        result[f"{name}_eager_ms"] = wall_ms([call], options.repeats, device)
        try:
            result[f"{name}_ms"] = graph_ms([call], options.repeats, device)
        except Exception as error:  # a peer that synchronizes cannot be captured: its eager time is used
            result[f"{name}_ms"] = result[f"{name}_eager_ms"]
            result[f"{name}_not_captured"] = f"{type(error).__name__}: {str(error)[:200]}"
    result["peak_bytes"] = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        for call in steps.values():
            call()
        torch.cuda.synchronize()
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def one(shape: str, change: Callable[[nn.Module], None] | None, options: argparse.Namespace, device: str) -> dict:
    """Creates a model, quantizes it, measures it, and frees it."""
    model = build(shape, device)
    synchronize(device)
    start = time.perf_counter()
    if change is not None:
        change(model)
    synchronize(device)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    requanto.prepare(model)  # as the first GEMM of each layer would: prepacks Requanto's weights
    synchronize(device)
    milliseconds = (time.perf_counter() - start) * 1e3
    figures = measure(model, shape, options, device) | {"quantize_s": seconds, "layout_ms": milliseconds}
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return figures


def compare(shape: str, jobs: dict[str, Any], options: argparse.Namespace, device: str, deadline: float) -> dict:
    """Runs all jobs between two runs in bf16."""
    found = {"bf16": one(shape, None, options, device)}
    for name, job in jobs.items():
        if time.monotonic() > deadline:
            found[name] = {"error": "no time left (--minutes)"}
            continue
        try:
            found[name] = one(shape, job, options, device)
        except Exception as error:  # one that fails must not lose the other figures
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            gc.collect()
        print(f"{shape} {name:18} {found[name]}", flush=True)
    again = one(shape, None, options, device)
    steps = [key.replace("_eager", "") for key in again if key.endswith("_eager_ms")]
    for figures in found.values():
        for key in steps if "error" not in figures else ():
            both = (found["bf16"][key] + again[key]) / 2
            figures[key.replace("_ms", "_vs_bf16")] = round(both / figures[key], 3)
    found["bf16"]["bf16_drift"] = round(again[steps[-1]] / found["bf16"][steps[-1]], 3)
    return found


def present(document: dict[str, Any], out: Path) -> str:
    """Writes table and plot; returns a message about the plot."""
    text, panels = [f"Whole models on {document['device']}. `{document['command']}`\n"], {}
    for shape, found in document["models"].items():
        steps = [key.removesuffix("_vs_bf16") for key in found["bf16"] if key.endswith("_vs_bf16")]
        head = [
            "",
            *(f"{s} ms" for s in steps),
            *(f"{s} vs bf16" for s in steps),
            "eager ms",
            "peak GB",
            "quantize s",
            "layout ms",
        ]
        rows, panels[shape] = [], {step: {} for step in steps}
        for name, f in found.items():
            if "error" in f:
                rows.append([name, f["error"], *[None] * (len(head) - 2)])
                continue
            peak = None if f["peak_bytes"] is None else f["peak_bytes"] / 1e9
            ratios = [f[f"{s}_vs_bf16"] for s in steps]
            eager = " / ".join(f"{f[f'{s}_eager_ms']:.3g}" for s in steps)
            rows.append([name, *(f[f"{s}_ms"] for s in steps), *ratios, eager, peak, f["quantize_s"], f["layout_ms"]])
            for step, ratio in zip(steps, ratios, strict=True):
                panels[shape][step][name] = ratio
        text += [f"## {shape}\n", markdown(head, rows)]
    out.with_suffix(".md").write_text("\n".join(text))
    return plot(out.with_suffix(".png"), panels, "times as fast as bf16")


def main() -> int:
    """Measures, prints a line for each model, writes the results."""
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*LLAMA_SHAPES, *FLUX_SHAPES])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit; what is left then is listed as skipped")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="*", help="names of quantized models to run in addition to bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    jobs: dict[str, Callable[[nn.Module], None]] = {
        name: (lambda model, keywords=keywords: quantize(model, **keywords)) for name, keywords in OURS.items()
    } | peers()
    if options.only is not None:
        jobs = {name: job for name, job in jobs.items() if name in options.only}
    out = options.out or Path(__file__).parent / "results" / f"models_{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "command": "PYTHONPATH=src:kernels " + command(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prompt": options.prompt,
        "models": {},
    }
    deadline = time.monotonic() + 60 * options.minutes
    for shape in options.shapes or (["1b"] if device == "cpu" else ["1b", "8b", "flux"]):
        document["models"][shape] = compare(shape, jobs, options, device, deadline)
        out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {out}; {present(document, out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
