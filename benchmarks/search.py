"""Methods of choosing scales without samples: accuracy, bits a weight and time of each.

    OMP_NUM_THREADS=1 python benchmarks/search.py                          # everything: half an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/search.py --only int4-g64 nf4      # cases by name prefix; other results stay

Every linear layer is quantized (embeddings and the output layer stay float), then dequantized and measured:

- SmolLM2-135M-Instruct in bfloat16: perplexity on 10,240 tokens of `requanto.data.eval_text()` in windows of 1,024, as
  percent of the float model's. Its weights come from a Q4_1 file (affine, groups of 32), which flatters affine 4-bit
  results, most of all those with groups of 32.
- all-MiniLM-L6-v2, never quantized before: 1 - cosine of mean-pooled embeddings to the float model's, mean of 128
  sentences of the same text. Its weights are rounded to bfloat16 first, so that scales take as many bits as in SmolLM2.

Time: each of SmolLM2's weights is quantized by the case's method and by minmax, with the same type, group and
scale_bits, alternating; the faster of two rounds counts. Adds to benchmarks/results/search.json after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, command, machine
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import transformers
from real_models import minilm_dir, smollm2_dir
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from requanto import QTensor, QuantoConfig
from requanto.config.plan import PlannedWeight
from requanto.data import eval_text
from requanto.report.calibrated import planned_for
from requanto.report.perplexity import perplexity

OUT = RESULTS / "search.json"
TOKENS, WINDOW, SENTENCES = 10_240, 1024, 128


@dataclass(frozen=True)
class Case:
    """A type and a method; ``weights=None``: the weights stay bfloat16."""

    weights: str | None
    method: str | None = None
    group: int | None = None
    scale_bits: int | None = None

    @property
    def name(self) -> str:
        """The name, e.g. ``int4-g64-s8/weighted``; ``--only`` takes prefixes of it."""
        if self.weights is None:
            return "bfloat16"
        group = "" if self.group is None else f"-g{self.group}"
        return f"{self.weights}{group}{'' if self.scale_bits is None else f'-s{self.scale_bits}'}/{self.method}"

    def config(self, method: str | None) -> QuantoConfig:
        """The configuration, with another method."""
        return QuantoConfig(weights=self.weights, group_size=self.group, scale_bits=self.scale_bits, method=method)


#: the most important first: a run may be stopped early
CASES = (
    Case(None),
    Case("int4", "aligned", 64),
    Case("int3", "aligned", 64),
    Case("int4", "aligned", 128),
    Case("int2", "aligned", 32),
    Case("int4", "aligned", 64, 8),
    Case("int4", "aligned", 32),
    Case("int3", "aligned", 32),
    Case("int4", "aligned", 32, 4),
    Case("int4", "aligned", 16, 4),
    Case("int4", "weighted", 64),
    Case("int4", "minmax", 64),
    Case("int4", "weighted", 64, 8),
    Case("int4", "weighted", 128),
    Case("int4", "weighted", 32, 8),
    Case("int4", "minmax", 128),
    Case("int3", "weighted", 64),
    Case("int3", "minmax", 64),
    Case("int4", "mse", 64),
    Case("int4", "hqq", 64),
    Case("nf4", "minmax", 64),
    Case("codebook4", "minmax", 64),
    Case("float8", "mse"),
    Case("float8", "minmax"),
    Case("int8", "minmax"),
    Case("int2", "weighted", 32),
    Case("int3", "weighted", 64, 8),
    Case("int4", "mse", 128),
    Case("int4", "hqq", 128),
    Case("int4", "weighted", 32),
    Case("int4", "minmax", 32),
    Case("int3", "weighted", 32),
    Case("int2", "minmax", 32),
    Case("int4", "weighted", 32, 4),
    Case("int4", "weighted", 16, 4),
)


def sentences() -> list[str]:
    """Lines of the text of more than 60 characters."""
    lines = [line.strip() for line in eval_text().split("\n")]
    return [line for line in lines if 60 < len(line) < 400][:SENTENCES]


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, ``[texts, features]``."""
    found = []
    for start in range(0, len(texts), 32):
        inputs = tokenizer(
            texts[start : start + 32], return_tensors="pt", padding=True, truncation=True, max_length=128
        )
        mask = inputs["attention_mask"].unsqueeze(-1)
        found.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


class Subject:
    """A model whose weights can be quantized repeatedly: it stores the float weights."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.floats = {name: p.detach().to(torch.bfloat16, copy=True) for name, p in model.named_parameters()}

    def planned(self, case: Case, method: str | None = None) -> dict[str, PlannedWeight]:
        """The weights to quantize, by parameter name. All of the model's weights are float when this is called."""
        return {} if case.weights is None else planned_for(self.model, case.config(method or case.method))

    @torch.no_grad()
    def quantize(self, case: Case) -> float:
        """Puts the dequantized weights into the model, in its dtype; returns the bits a weight."""
        planned = self.planned(case)
        size = count = 0
        for name, float_weight in self.floats.items():
            weight = float_weight
            if name in planned:
                tensor = planned[name].quantize(float_weight, name)
                size, count, weight = size + tensor.nbytes, count + tensor.numel(), tensor.dequantize()
            self.model.get_parameter(name).copy_(weight)
        return 8 * size / count if count else 16.0

    def seconds(self, case: Case) -> tuple[float, float]:
        """Seconds of quantization by the case's method and by minmax, alternating for each weight."""
        own, plain = self.planned(case), self.planned(case, "minmax")
        totals = [0.0, 0.0]
        for name in own:
            best = [float("inf")] * 2
            for _ in range(2):
                for which, planned in enumerate((own, plain)):
                    start = time.perf_counter()
                    tensor = planned[name].quantize(self.floats[name], name)
                    best[which] = min(best[which], time.perf_counter() - start)
                    if not isinstance(tensor, QTensor):
                        raise TypeError(f"{name} was not quantized: {type(tensor).__name__}")
            totals = [total + fastest for total, fastest in zip(totals, best, strict=True)]
        return totals[0], totals[1]


def smollm2() -> Subject:
    """SmolLM2-135M-Instruct in bfloat16."""
    directory = smollm2_dir()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return Subject(model, AutoTokenizer.from_pretrained(directory))


def language_figures(chat: Subject, case: Case) -> dict[str, Any]:
    """Time, bits and perplexity of a case."""
    row: dict[str, Any] = {}
    if case.weights is not None:
        own, plain = chat.seconds(case)
        row |= {"seconds": round(own, 2), "minmax_seconds": round(plain, 2), "times_minmax": round(own / plain, 2)}
    row["bits_per_weight"] = round(chat.quantize(case), 3)
    result = perplexity(chat.model, chat.tokenizer, eval_text(), WINDOW, TOKENS, progress=False)
    return row | {"perplexity": round(result.perplexity, 4), "tokens": result.tokens}


def stored() -> dict[str, Any]:
    """The results of earlier runs."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}


def keep(name: str, row: dict[str, Any]) -> None:
    """Adds a case: reads the file again, since another process may have written it, and replaces it as a whole."""
    latest = stored() | {name: row}
    order = [case.name for case in CASES if case.name in latest]
    order += [known for known in latest if known not in order]  # cases of another version of this list
    part = OUT.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({known: latest[known] for known in order}, indent=1) + "\n", encoding="utf-8")
    part.replace(OUT)


def main() -> None:
    """Runs the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="prefixes of names; default: all")
    parser.add_argument("--missing", action="store_true", help="skip cases that have results")
    parser.add_argument("--minilm-only", action="store_true", help="only MiniLM, for cases without results: a minute")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    cases = [case for case in CASES if any(case.name.startswith(beginning) for beginning in options.only)]
    if options.list or not cases:
        print("\n".join(case.name for case in (cases or CASES)))
        raise SystemExit(0 if cases else f"no case begins with {' or '.join(options.only)}")
    transformers.utils.logging.disable_progress_bar()
    bert_dir, chat = minilm_dir(), None if options.minilm_only else smollm2()
    bert = Subject(AutoModel.from_pretrained(bert_dir, dtype=torch.float32), AutoTokenizer.from_pretrained(bert_dir))
    texts = sentences()
    wanted = embeddings(bert.model, bert.tokenizer, texts)
    bar = tqdm(cases, desc="cases", unit="case")
    for case in bar:
        known = stored().get(case.name, {})
        if "perplexity" in known and (options.missing or options.minilm_only):
            continue
        bar.set_postfix_str(case.name)
        row: dict[str, Any] = {} if chat is None else language_figures(chat, case)
        row["minilm_bits_per_weight"] = round(bert.quantize(case), 3)
        cosine = torch.cosine_similarity(embeddings(bert.model, bert.tokenizer, texts).double(), wanted.double())
        row |= {"minilm_distance": float(f"{1 - cosine.mean().item():.4g}"), "sentences": len(texts)}
        keep(case.name, row | {"command": command(), "machine": machine()})
        tqdm.write(f"{case.name:22} {json.dumps(row)}")


if __name__ == "__main__":
    main()
