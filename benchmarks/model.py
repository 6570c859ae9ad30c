"""Whole models: prefill and decode tokens a second, load time and memory of a Llama-shaped model, per dtype, beside bf16.

    PYTHONPATH=src:kernels python benchmarks/model.py                      # 1.2 billion parameters, GPU if there is one
    PYTHONPATH=src:kernels python benchmarks/model.py --shape 8b --compile

The weights are random: speed and size do not depend on them. bf16 and the quantized models are timed in turns within one
process, and every figure is a ratio to bf16 of the same run. Peers that are importable (torchao, bitsandbytes)
run on the same checkpoint. Writes benchmarks/results/models_<device>_<shape>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from common import command
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import requanto

HERE = Path(__file__).parent
SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1024},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
OURS = {
    "int8": {"weights": "int8"},
    "float8": {"weights": "float8"},
    "int4": {"weights": "int4", "group_size": 128},
    "int2": {"weights": "int2"},
    "int8 x int8": {"weights": "int8", "activations": "int8"},
    "float8 x float8": {"weights": "float8", "activations": "float8"},
}


def device_name() -> str:
    """Where to run: the accelerator that torch finds, else the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    return "cpu"


def synchronize(device: str) -> None:
    """Waits for the device, so that the clock sees the work and not its launch."""
    if device != "cpu":
        torch.accelerator.synchronize()


def write_checkpoint(directory: Path, shape: str) -> None:
    """A Llama of random bf16 weights."""
    heads = SHAPES[shape]["hidden_size"] // 64
    config = LlamaConfig(
        **SHAPES[shape], num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), dtype="bfloat16"
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    model.save_pretrained(directory)


def peers() -> dict[str, Callable[[], Any]]:
    """Name -> maker of the quantization config, for each peer that can be imported."""
    found: dict[str, Callable[[], Any]] = {}

    def importable(name: str) -> bool:
        try:
            __import__(name)
        except Exception as error:
            print(f"{name}: not compared ({type(error).__name__}: {error})")
            return False
        return True

    if importable("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        found["torchao int8"] = lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig())
        found["torchao int4"] = lambda: transformers.TorchAoConfig(Int4WeightOnlyConfig(group_size=128))
    if importable("bitsandbytes"):
        found["bitsandbytes int8"] = lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)
        found["bitsandbytes nf4"] = lambda: transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return found


def load(directory: Path, config: Any, device: str) -> tuple[Any, float]:
    """(model on the device, seconds)."""
    start = time.perf_counter()
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map=device, **options).eval()
    synchronize(device)
    return model, time.perf_counter() - start


@torch.inference_mode()
def measure(model: Any, device: str, prompt: int, new: int, repeats: int) -> dict[str, float]:
    """Median seconds of a prefill of ``prompt`` tokens, and of one decoding step after it."""
    ids = torch.randint(0, model.config.vocab_size, (1, prompt), device=device)
    prefill, decode = [], []
    for repeat in range(repeats + 1):  # the first round warms up
        synchronize(device)
        start = time.perf_counter()
        out = model(ids, use_cache=True)
        synchronize(device)
        if repeat:
            prefill.append(time.perf_counter() - start)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        for _ in range(new):
            synchronize(device)
            start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            synchronize(device)
            if repeat:
                decode.append(time.perf_counter() - start)
    return {"prefill_s": median(prefill), "decode_s": median(decode)}


def main() -> int:
    """Measures, prints a line a model, keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile every model with torch.compile")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="*", help="names of models to run, besides bf16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = device_name()
    jobs: dict[str, Callable[[], Any]] = {
        name: (lambda keywords=keywords: requanto.QuantoConfig(**keywords)) for name, keywords in OURS.items()
    } | peers()
    if options.only is not None:
        jobs = {name: job for name, job in jobs.items() if name in options.only}
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(Path(scratch), options.shape)
        for name, job in jobs.items():
            try:
                results[name] = compare(Path(scratch), job(), device, options)
            except Exception as error:  # one peer that fails must not take the other figures along
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name:18} {results[name]}", flush=True)
    out = options.out or HERE / "results" / f"models_{device}_{options.shape}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "command": "PYTHONPATH=src:kernels " + command(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": SHAPES[options.shape],
        "results": results,
    }
    out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"wrote {out}")
    return 0


def compare(directory: Path, config: Any, device: str, options: argparse.Namespace) -> dict[str, Any]:
    """bf16, the quantized model, bf16 again: the ratio is to the mean of the two, so a drifting machine shows."""
    rounds = []
    for which in (None, config, None):
        model, seconds = load(directory, which, device)
        if options.compile:
            model.forward = torch.compile(model.forward, dynamic=True)
        figures = measure(model, device, options.prompt, options.new, options.repeats)
        figures |= {"load_s": seconds, "bytes": model.get_memory_footprint()}
        rounds.append(figures)
        del model
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    before, ours, after = rounds
    ratio = {key: (before[key] + after[key]) / 2 / ours[key] for key in ("prefill_s", "decode_s")}
    return {
        "prefill_vs_bf16": round(ratio["prefill_s"], 3),
        "decode_vs_bf16": round(ratio["decode_s"], 3),
        "bf16_drift": round(after["decode_s"] / before["decode_s"], 3),
        "prefill_tokens_per_s": round(options.prompt / ours["prefill_s"], 1),
        "decode_tokens_per_s": round(1 / ours["decode_s"], 2),
        "load_s": round(ours["load_s"], 2),
        "size_vs_bf16": round(ours["bytes"] / before["bytes"], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
