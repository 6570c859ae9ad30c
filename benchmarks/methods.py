"""Quantization with samples: perplexity of SmolLM2-135M-Instruct, cosine of all-MiniLM-L6-v2's embeddings.

    python benchmarks/methods.py                                   # everything; hours on two cores
    python benchmarks/methods.py --only smollm2/int4-g64/gptq --samples 32 --keep DIR

Samples are parts of `requanto.data.calibration_text()` (fiction). Perplexity is measured on `requanto.data.eval_text()`
(technical prose with code): 10,240 tokens in windows of 1,024, in bfloat16, weights dequantized. MiniLM is measured on
64 pieces of 128 tokens, mean-pooled, in float32. SmolLM2's weights come from a Q4_1 file (groups of 32), which flatters
4-bit results at group 32 and below; MiniLM's were never quantized.

Each case is added to benchmarks/results/methods.json when it is done. ``--keep`` names a directory for finished blocks, from
which an interrupted case continues.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, command, machine

sys.path.append(str(Path(__file__).parents[1] / "integration_tests"))

from real_models import minilm_dir, smollm2_dir
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from requanto.budget.models import resolve_on_samples
from requanto.config.config import QuantoConfig
from requanto.data import calibration_text, eval_text
from requanto.methods import quantize_with_samples, text_samples
from requanto.report.calibrated import planned_for
from requanto.report.perplexity import perplexity
from requanto.tensor.qtensor import QTensor

OUT = RESULTS / "methods.json"


@dataclass(frozen=True)
class Case:
    """A model, a type and a method; with ``weights="auto"`` the types are chosen on 16 of the samples."""

    model: str
    weights: str
    group: int | None
    method: str | None
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name; ``--only`` takes it."""
        choices = "".join(f"+{k}={v}" for k, v in self.options.items())
        extra = "".join(f"-{k}={v}" for k, v in self.config.items())
        kind = self.weights if self.group is None else f"{self.weights}-g{self.group}"
        return f"{self.model}/{kind}{extra}/{self.method or 'nearest'}{choices}"

    def quanto_config(self) -> QuantoConfig:
        """The configuration of the case."""
        group = {} if self.group is None else {"group_size": self.group}
        return QuantoConfig(weights=self.weights, **group, **self.config)


PLAIN_GPTQ = {"correct": False, "sequential": False, "rounds": 0, "damping": 0.01}
TUNED = {"iterations": 40, "batch": 2}
CASES = [
    Case(model, weights, group, method, options, {"scale_bits": scale_bits})
    for model in ("smollm2", "minilm")
    for weights, group, scale_bits in (
        ("int4", 64, 8),
        ("int3", 64, 8),
        ("int2", 32, 8),
        ("int4", 32, 4),
        ("int3", 32, 4),
        ("int2", 16, 4),
    )
    for method, options in (
        (None, {}),
        ("awq", {}),
        ("gptq", PLAIN_GPTQ),
        ("gptq", {}),
        ("signround", TUNED),
    )
]
# A budget instead of a type: the bytes of uniform cases above (including the scales of rows).
CASES += [
    Case(model, "auto", None, "gptq", {}, {"bits": bits, "scale_bits": scale_bits})
    for model, more in (("smollm2", 0.0234), ("minilm", 0.0314))
    for bits, scale_bits in ((round(4.25 + more, 4), 8), (round(3.25 + more, 4), 4), (round(2.5 + more, 4), 4))
]


def float_model(case: Case) -> tuple[Any, Any]:
    """Loads the float model; returns (model, tokenizer)."""
    if case.model == "smollm2":
        directory, auto, dtype = smollm2_dir(), AutoModelForCausalLM, torch.bfloat16
    else:
        directory, auto, dtype = minilm_dir(), AutoModel, torch.float32
    return auto.from_pretrained(directory, dtype=dtype).eval(), AutoTokenizer.from_pretrained(directory)


def embeddings(model: Any, tokenizer: Any) -> torch.Tensor:
    """Mean-pooled embeddings of 64 pieces of the text."""
    with torch.no_grad():
        pieces = [model(piece).last_hidden_state.mean(1) for piece in text_samples(tokenizer, eval_text(), 64, 128)]
    return torch.cat(pieces)


def measure(case: Case, model: Any, tokenizer: Any, wanted: torch.Tensor | None) -> dict[str, float]:
    """Perplexity, or the mean cosine to the float model's embeddings."""
    if case.model == "smollm2":
        return {"perplexity": perplexity(model, tokenizer, eval_text(), window=1024, max_tokens=10_240).perplexity}
    found = embeddings(model, tokenizer)
    return {} if wanted is None else {"cosine": torch.cosine_similarity(found, wanted).mean().item()}


def run(case: Case, samples: int, length: int, keep: Path | None) -> dict[str, Any]:
    """Runs one case, from loading to the measurement."""
    model, tokenizer = float_model(case)
    wanted = embeddings(model, tokenizer) if case.model == "minilm" else None
    config = case.quanto_config()
    planned = planned_for(model, config)
    pieces = text_samples(tokenizer, calibration_text(), samples, length)
    start = time.perf_counter()
    if case.weights == "auto":
        planned = resolve_on_samples(model, config, planned, pieces, progress=True)
    if case.method is None:
        for name, choice in planned.items():
            module = model.get_submodule(name.rpartition(".")[0])
            module.weight = torch.nn.Parameter(choice.quantize(module.weight, name), requires_grad=False)
    else:
        resume = None if keep is None else keep / case.name.replace("/", "_")
        options = {"method_options": case.options, "resume": resume}
        quantize_with_samples(model, planned, pieces, case.method, **options)
    seconds = time.perf_counter() - start
    quantized = [p for p in model.parameters() if isinstance(p, QTensor)]
    # As in a checkpoint: after a run, int4 weights may be prepacked.
    stored = sum(part.nbytes for p in quantized for part in p.inner_tensors().values())
    bits = 8 * stored / sum(p.numel() for p in quantized)
    for module in model.modules():
        if isinstance(module._parameters.get("weight"), QTensor):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    found = measure(case, model, tokenizer, wanted)
    return {
        **found,
        "bits_per_weight": round(bits, 4),
        "seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "samples": samples if case.method else 0,
        "length": length if case.method else 0,
        "options": case.options,
        "command": command(),
        "load": machine()["load"],
    }


def main() -> None:
    """Runs the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="name of a case, or prefix of several")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="directory for finished blocks")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only is None or case.name == options.only]
    cases = cases or [case for case in CASES if case.name.startswith(options.only or "")]
    if options.list or not cases:
        print("\n".join(case.name for case in (cases or CASES)))
        raise SystemExit(0 if cases else f"no case is called {options.only!r}")
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", flush=True)
        stored = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
        if case.model == "smollm2" and "smollm2/bf16" not in stored:
            model, tokenizer = float_model(case)
            stored["smollm2/bf16"] = {**measure(case, model, tokenizer, None), "command": command()}
        found = run(case, options.samples, options.length, options.keep)
        if case.model == "smollm2":
            found["percent"] = round(100 * found["perplexity"] / stored["smollm2/bf16"]["perplexity"], 1)
        print(json.dumps(found), flush=True)
        # Another process may have added a case meanwhile.
        latest = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
        latest |= {k: v for k, v in stored.items() if k == "smollm2/bf16"} | {case.name: found}
        latest["machine"] = machine()
        OUT.write_text(json.dumps(dict(sorted(latest.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
