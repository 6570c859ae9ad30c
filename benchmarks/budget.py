"""A budget instead of a dtype: mixed types compared with one type for all layers, at the same bytes.

    python benchmarks/budget.py --tokens 10240 --gptq int3:64 int4:128

For each uniform type: its bits a weight, and the accuracy of three models of at most these bytes: uniform; "auto" by
weight errors alone; "auto" by the effect of errors on the output for samples (16 pieces of fiction; they only determine
the types, all weights are rounded in the same way). ``--gptq``: also uniform and "auto" on samples, rounded by GPTQ on
the same samples. SmolLM2: perplexity on technical prose. MiniLM: cosine to the float embeddings. Weights are measured
dequantized, in the float model. SmolLM2's weights were 4-bit codes in groups of 32 before (Q4_1): int4:32 restores them
almost unchanged.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write

import requanto
from requanto.budget.choose import choose
from requanto.budget.models import model_bytes
from requanto.budget.sensitivity import importances
from requanto.config.config import QuantoConfig
from requanto.config.limit import Limit
from requanto.config.plan import PlannedWeight, plan
from requanto.data import calibration_text, eval_text
from requanto.methods import quantize_with_samples, text_samples
from requanto.report._inputs import token_ids

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

UNIFORM = (
    "int3:row",
    "int3:128",
    "int3:64",
    "int4:row",
    "int4:128",
    "int4:64",
    "int4:32",
    "int5:64",
    "int6:64",
    "int8:row",
)


def config_of(text: str) -> QuantoConfig:
    """The configuration of one type for all layers, from a text such as ``int4:64``."""
    kind, _, group = text.partition(":")
    return QuantoConfig(weights=kind, group_size=-1 if group == "row" else int(group))


class Bench:
    """One model and its accuracy.

    Args:
        model: float model.
        score: function of the model that returns its accuracy.
        head: output layer, which stays float.
        samples: for sensitivities and GPTQ.
    """

    def __init__(self, model: Any, score: Any, head: Any, samples: list) -> None:
        self.model, self.score, self.samples = model, score, samples
        self.planned = plan(model, QuantoConfig(weights="auto", bits=4), output_embeddings=head)
        self.floats = {name: model.get_parameter(name).detach().clone() for name in self.planned}
        start = time.perf_counter()
        self.importance = importances(model, self.planned, samples)
        self.seconds = time.perf_counter() - start

    def measure(self, planned: dict[str, PlannedWeight]) -> dict[str, float]:
        """Score and bits a weight of a plan; weights that are not in it stay float."""
        size = 0
        with torch.no_grad():
            for name, values in self.floats.items():
                parameter = self.model.get_parameter(name)
                size += values.nbytes if name not in planned else 0
                if name in planned:
                    quantized = planned[name].quantize(values, name)
                    size += quantized.nbytes
                    parameter.copy_(quantized.dequantize(parameter.dtype))
        found = self.score(self.model)
        self.restore()
        return {"bits": size * 8 / sum(v.numel() for v in self.floats.values()), "bytes": size, "score": found}

    def gptq(self, planned: dict[str, PlannedWeight]) -> float:
        """Score of a plan with weights rounded by GPTQ."""
        model = copy.deepcopy(self.model)
        quantize_with_samples(model, planned, self.samples, "gptq")
        return self.score(model)

    def restore(self) -> None:
        """Puts the float weights back."""
        with torch.no_grad():
            for name, values in self.floats.items():
                self.model.get_parameter(name).copy_(values)

    def auto(self, limit: Limit, samples: bool) -> Any:
        """The types that are chosen within a budget."""
        shapes = {name: self.model.get_parameter(name) for name in self.planned}
        return choose(
            self.planned,
            shapes,
            lambda name: [shapes[name]],
            limit,
            model_bytes(self.model, self.planned),
            importance=self.importance if samples else None,
            progress=False,
        )

    def rows(self, uniform: tuple[str, ...], gptq: tuple[str, ...]) -> dict[str, Any]:
        """All figures."""
        found: dict[str, Any] = {"float": self.score(self.model), "sensitivity_seconds": round(self.seconds, 1)}
        print("float", found["float"], flush=True)
        head = self.planned_head
        for text in uniform:
            one = plan(self.model, config_of(text), output_embeddings=head)
            row: dict[str, Any] = {"uniform": self.measure(one)}
            limit = Limit(bits=row["uniform"]["bits"])
            for key, samples in (("auto", False), ("auto_samples", True)):
                chosen = self.auto(limit, samples)
                row[key] = self.measure(chosen.planned) | {
                    "gap": chosen.allocation.gap,
                    "types": counted(chosen.labels),
                }
                if row[key]["bytes"] > row["uniform"]["bytes"]:
                    raise RuntimeError(f"{text}: {key} takes {row[key]['bytes']} bytes, more than uniform")
                if samples and text in gptq:
                    row["uniform_gptq"] = {"score": self.gptq(one)}
                    row["auto_gptq"] = {"score": self.gptq(chosen.planned)}
            print(text, {k: round(v["score"], 5) for k, v in row.items()}, round(limit.bits or 0, 3), flush=True)
            found[text] = row
        return found

    planned_head: Any = None


def counted(labels: dict[str, str]) -> dict[str, int]:
    """Number of layers for each type."""
    kinds = sorted(set(labels.values()))
    return {kind: sum(label == kind for label in labels.values()) for kind in kinds}


def smollm2(tokens: int) -> Bench:
    """SmolLM2-135M-Instruct in bfloat16; its score is the perplexity."""
    from real_models import smollm2_dir
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = smollm2_dir()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)

    def score(model: Any) -> float:
        return requanto.report.perplexity(model, tokenizer, eval_text(), max_tokens=tokens, progress=False).perplexity

    Bench.planned_head = model.get_output_embeddings()
    return Bench(model, score, model.get_output_embeddings(), text_samples(tokenizer, calibration_text(), 16, 256))


def minilm(texts: int) -> Bench:
    """all-MiniLM-L6-v2 in float32; its score is the mean cosine of mean-pooled embeddings to the float model's."""
    from real_models import minilm_dir
    from transformers import AutoModel, AutoTokenizer

    path = minilm_dir()
    model = AutoModel.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = token_ids(tokenizer, eval_text())
    pieces = [torch.tensor([ids[start : start + 128]]) for start in range(0, 128 * texts, 128)]

    @torch.inference_mode()
    def embed(model: Any) -> torch.Tensor:
        return torch.cat([model(input_ids=piece).last_hidden_state.mean(1) for piece in pieces])

    expected = embed(model)

    def score(model: Any) -> float:
        return torch.cosine_similarity(embed(model).double(), expected.double()).mean().item()

    Bench.planned_head = None
    return Bench(model, score, None, text_samples(tokenizer, calibration_text(), 16, 128))


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over bits: uniform, auto, auto on samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, (name, title) in zip(
        axes, (("smollm2", "SmolLM2-135M: perplexity, % of bf16"), ("minilm", "MiniLM: 1 - cosine"))
    ):
        rows = {k: v for k, v in results[name].items() if isinstance(v, dict)}
        for key, label, style in (
            ("uniform", "one type for all", "o:"),
            ("auto", "auto, by weights alone", "s-"),
            ("auto_samples", "auto, on samples", "^-"),
        ):
            points = sorted((row[key]["bits"], row[key]["score"]) for row in rows.values())
            base = results[name]["float"]
            heights = [100 * s / base if name == "smollm2" else max(1 - s, 1e-7) for _, s in points]
            axis.plot([bits for bits, _ in points], heights, style, label=label, ms=5)
        axis.set_yscale("log")
        axis.set_xlabel("bits a weight, scales counted")
        axis.set_title(title, fontsize=10)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs both models, writes the results and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--texts", type=int, default=64, help="pieces of 128 tokens that MiniLM embeds")
    parser.add_argument("--uniform", nargs="*", default=list(UNIFORM))
    parser.add_argument("--gptq", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="*", default=["minilm", "smollm2"])
    parser.add_argument("--out", type=Path, default=RESULTS / "budget.json")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    if "minilm" in arguments.models:
        results["minilm"] = minilm(arguments.texts).rows(tuple(arguments.uniform), ())
    if "smollm2" in arguments.models:
        results["smollm2"] = smollm2(arguments.tokens).rows(tuple(arguments.uniform), tuple(arguments.gptq))
    if not all(math.isfinite(r["float"]) for r in results.values()):
        raise RuntimeError("a float model scores no number")
    write(arguments.out, results)
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
