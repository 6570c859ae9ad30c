"""Whole models on a CPU: speed of decode and prefill of quantized models relative to bf16, alternating step by step.

    PYTHONPATH=src:kernels python benchmarks/cpu_models.py --threads 2
    PYTHONPATH=src:kernels python benchmarks/cpu_models.py --table             # the tables of docs/cpu.md

A Llama of 1.2 billion random weights, and SmolLM2-135M-Instruct, in --dtype. The bf16 model and one other model at a
time are in memory; each prefill and each decoding step of one is followed by the same of the other, so that both run under
the same load. "float32" is the model itself in float32. --peers also measures torchao and bitsandbytes, if they can be
imported, --llama-python llama.cpp, by an interpreter that has llama-cpp-python (models of the same shape and random weights
as GGUF Q8_0 and Q4_0).
Also stored: what the first forward takes more than the second one, the bytes of all weights before and after the run, and
how much the process has grown in it. Adds to benchmarks/results/cpu_models_<threads>threads.json after each model; models
that --limit leaves no time for stay as they were.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cpu_runners
import torch
import transformers
from common import RESULTS, write
from cpu_llama import LlamaRunner, write_gguf
from cpu_runners import PROMPTS, Runner, load, rounds
from transformers import LlamaConfig, LlamaForCausalLM

import requanto

sys.path.append(str(Path(__file__).parents[1] / "integration_tests"))

import real_models

OURS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "int4, head int8": {"weights": "int4", "modules": {"lm_head": "int8"}},
    "int3": {"weights": "int3"},
    "int2": {"weights": "int2"},
    "float8": {"weights": "float8"},
    "nf4": {"weights": "nf4"},
    "int8 x int8": {"weights": "int8", "activations": "int8"},
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
LAYERS = 16
#: Bytes of a bf16 model below which a round is short, and by how much the number of rounds is multiplied then.
SMALL, SMALL_MORE = 2**30, 6
#: Least ratio to bf16, two threads; "*": of every type.
GOALS = {
    "Llama, 1.2 billion random weights": {
        "int4": {"decode": 5.0},
        "int8 x int8": {"512": 1.5},
        "*": {"512": 0.95},
    },
    "SmolLM2-135M-Instruct": {"int4": {"decode": 3.0}, "*": {"512": 0.95}},
}


def write_checkpoint(directory: Path) -> None:
    """A Llama of 1.2 billion random bfloat16 weights: speed and size do not depend on them."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    model.save_pretrained(directory)


def peers() -> dict[str, Callable[[], Any]]:
    """Functions that make the quantization config of each peer that can be imported, by name."""
    found: dict[str, Callable[[], Any]] = {}
    try:
        from torchao.quantization import Int8WeightOnlyConfig

        found["torchao int8"] = lambda: transformers.TorchAoConfig(Int8WeightOnlyConfig())
    except ImportError as error:
        print(f"torchao: not compared ({error})")
    try:
        import bitsandbytes  # noqa: F401

        found["bitsandbytes nf4"] = lambda: transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    except ImportError as error:
        print(f"bitsandbytes: not compared ({error})")
    return found


def measure(
    source: Path, scratch: Path, options: argparse.Namespace, results: dict[str, Any], save: Any, deadline: float
) -> None:
    """Measures every kind against the same bf16 model; adds to ``results`` by name."""
    plain, _ = load(source, None)
    vocabulary, plain_bytes = plain.config.vocab_size, plain.get_memory_footprint()
    repeats = options.repeats * (SMALL_MORE if plain_bytes < SMALL else 1)
    jobs: dict[str, Any] = {}
    dtype = DTYPES[options.dtype]
    for own in dict.fromkeys((options.dtype, "f32")):  # the float models themselves
        if own != "bf16":
            jobs[own] = lambda own=own: Runner(*load(source, None, DTYPES[own]))
    for name, how in OURS.items():
        jobs[name] = lambda how=how: Runner(*load(source, requanto.QuantoConfig(**how), dtype))
    if options.peers:
        jobs |= {name: (lambda make=make: Runner(*load(source, make()))) for name, make in peers().items()}
    if options.llama_python:
        jobs |= llama_jobs(plain.config, scratch, options)
    last = 0.0
    for name, make in jobs.items():
        if options.only and name not in options.only:
            continue
        if time.monotonic() + last > deadline:
            print(f"  {name}: left out, the time is up", flush=True)
            continue
        begin = time.monotonic()
        try:
            runner = make()
            runner.start()
            found = rounds({"bf16": Runner(plain, 0.0), name: runner}, vocabulary, options.new, repeats)
            results.setdefault("bf16", found["bf16"])
            results[name] = found[name] | runner.about(plain_bytes)
            runner.close()
            figures = results[name]
            line = ", ".join(f"{what} {figures[what]['ratio']:.2f}" for what in ("decode", *map(str, PROMPTS)))
            print(f"  {name:18} {line}   ({time.monotonic() - begin:.0f} s)", flush=True)
            del runner
        except Exception as error:  # one peer that fails must not lose the other figures
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            print(f"  {name}: {results[name]['error']}", flush=True)
        gc.collect()
        last = time.monotonic() - begin
        save()


def llama_jobs(config: Any, scratch: Path, options: argparse.Namespace) -> dict[str, Callable[[], LlamaRunner]]:
    """Functions that make llama.cpp's runners for a model, by name."""

    def random(kind: str) -> LlamaRunner:
        path = scratch / f"{config.num_hidden_layers}-{kind}.gguf"
        if not path.exists():
            write_gguf(config, kind, path)
        return LlamaRunner(options.llama_python, path, options.threads)

    return {f"llama.cpp {kind}": (lambda kind=kind: random(kind)) for kind in ("Q8_0", "Q4_0")}


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def markdown(document: dict[str, Any]) -> str:
    """The tables of docs/cpu.md as markdown."""
    lines = []
    for model, results in document["models"].items():
        lines += [f"{model}, {document['machine']['threads']} threads, ratio to bf16 (tokens a second):", ""]
        heads = [
            "",
            "decode",
            *(f"prefill {prompt}" for prompt in PROMPTS),
            "MB stored",
            "MB after",
            "first forward, s",
        ]
        lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, figures in results.items():
            cells = [
                f"{figures[what]['ratio']:.2f} ({_short(figures[what]['tokens_per_second'])})"
                if what in figures
                else ""
                for what in ("decode", *map(str, PROMPTS))
            ]
            for what in ("stored_bytes", "bytes_after"):
                cells.append(f"{figures[what] / 1e6:.1f}" if what in figures else "")
            cells.append(f"{figures['first_forward_s']:.2f}" if "first_forward_s" in figures else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def missed(document: dict[str, Any]) -> list[str]:
    """A line for each goal and whether it is met."""
    lines = []
    for model, goals in GOALS.items():
        results = document["models"].get(model, {})
        for kind in OURS:
            for what, goal in (goals.get("*", {}) | goals.get(kind, {})).items():
                if kind in results and what in results[kind]:
                    ratio = results[kind][what]["ratio"]
                    word = "met" if ratio >= goal else "MISSED"
                    lines.append(f"{model}, {kind}, {what}: {ratio:.2f}, goal {goal}: {word}")
    return lines


def main() -> int:
    """Measures, prints a line for each model, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*", choices=["1b", "smollm2"], default=["1b", "smollm2"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the quantized models")
    parser.add_argument("--only", nargs="*", help="names of quantized models to run")
    parser.add_argument("--new", type=int, default=8, help="tokens decoded after each prefill")
    parser.add_argument(
        "--repeats", type=int, default=2, help=f"rounds; {SMALL_MORE} times as many for the small model"
    )
    parser.add_argument("--limit", type=float, default=330, help="seconds in all")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--llama-python", help="an interpreter that can import llama_cpp")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="each step runs before other programs; Linux, as root, on a busy machine",
    )
    parser.add_argument("--file", type=Path, help="of the results")
    parser.add_argument("--table", action="store_true", help="print the stored results as tables and stop")
    options = parser.parse_args()
    path = options.file or RESULTS / f"cpu_models_{options.threads}threads.json"
    found: dict[str, Any] = json.loads(path.read_text())["models"] if path.exists() else {}
    if options.table:
        print(markdown(json.loads(path.read_text())))
        return 0
    cpu_runners.realtime = options.realtime
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number, which in enumerate(options.models):
            print(f"{which}: loading bf16", flush=True)
            if which == "1b":
                write_checkpoint(Path(scratch))
            source = Path(scratch) if which == "1b" else Path(real_models.smollm2_dir())
            # The first of two models gets three quarters of the remaining time.
            left = options.limit - (time.monotonic() - start)
            share = 1.0 if number == len(options.models) - 1 else 0.75
            name = "Llama, 1.2 billion random weights" if which == "1b" else "SmolLM2-135M-Instruct"
            name += "" if options.dtype == "bf16" else f", {options.dtype}"
            results = found.setdefault(name, {})
            save = lambda: write(path, {"goals": GOALS, "models": found})  # noqa: E731
            measure(source, Path(scratch), options, results, save, time.monotonic() + share * left)
            gc.collect()
    print(markdown(json.loads(path.read_text())))
    print("\n".join(missed(json.loads(path.read_text()))))
    print(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
