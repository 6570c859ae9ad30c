"""What folded rotations and column scales gain at equal bits, beside online rotation and column scales multiplied into x.

    OMP_NUM_THREADS=1 python benchmarks/folding.py                # about 20 minutes on one core
    python benchmarks/folding.py --only minilm

Without samples, on the models and texts that defaults are chosen on (`benchmarks/yardsticks`): perplexity of SmolLM2-135M
dithered in bfloat16, and 1 - cosine of MiniLM's sentence embeddings in float32.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from common import RESULTS, write
from torch import nn
from yardsticks import makers

import requanto
from requanto import QTensor
from requanto.data import calibration_text, eval_text
from requanto.report import perplexity
from requanto.transforms import Folded, fold_asked
from requanto.transforms.weights import float_weights

TYPES = [
    {"weights": "int4", "group_size": 64},
    {"weights": "int3", "group_size": 32},
    {"weights": "int2", "group_size": 16},
]
#: name -> (what is folded into the float model, options of `requanto.quantize`)
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "columns root, multiplied": ({}, {"column_scale": "root"}),
    "columns std, multiplied": ({}, {"column_scale": "std"}),
    "columns root, folded": ({"columns": True, "kind": "root"}, {}),
    "columns std, folded": ({"columns": True, "kind": "std"}, {}),
    "columns root, folded, the rest multiplied": ({"columns": True, "kind": "root"}, {"rest": "root"}),
    "rotation online": ({}, {"rotation": True}),
    "rotation folded": ({"rotation": True}, {}),
    "rotation folded, online for down_proj": ({"rotation": True}, {"down": True}),
    "rotation folded, columns root folded": ({"rotation": True, "columns": True, "kind": "root"}, {}),
}


def quantized(model: nn.Module, options: dict[str, Any], left: set[str]) -> nn.Module:
    """The model with its weights quantized; ``left``: weights whose column scales were not folded."""
    skip = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name == "lm_head"]
    options = {"column_scale": False, "progress": False, **options}
    if (kind := options.pop("rest", None)) is not None:
        rest = [name.removesuffix(".weight") for name in left]
        requanto.quantize(model, include=rest, **{**options, "column_scale": kind})
        skip += rest
    if options.pop("down", False):
        down = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("down_proj")]
        requanto.quantize(model, include=down, rotation=True, **options)
        skip += down
    requanto.quantize(model, exclude=skip or None, **options)
    requanto.freeze(model)
    return model


def bits(model: nn.Module) -> float:
    """Bits for each quantized weight, with all its parts."""
    found = [p for p in model.parameters() if isinstance(p, QTensor)]
    return sum(p.nbytes for p in found) * 8 / sum(p.numel() for p in found)


def rows(
    model: nn.Module, measure: Callable[[nn.Module], float], what: str, chosen: argparse.Namespace, note: Callable
) -> None:
    """Measures the chosen settings and types; ``note`` takes one row at a time."""
    names = {w.name for w in float_weights(model) if w.kind == "linear" and not w.name.startswith("lm_head")}
    note({"weights": "float", "setting": "none", what: measure(model)})
    for setting, (fold, options) in SETTINGS.items():
        if not any(word in setting for word in chosen.settings):
            continue
        start, base, left = time.perf_counter(), copy.deepcopy(model), set()
        if fold:
            done: Folded = fold_asked(base, names, **{"rotation": False, "columns": False, **fold})
            left = done.left
            row = {"weights": "float", "setting": setting, "folded": done.done, "left": len(done.left)}
            note({**row, "seconds": round(time.perf_counter() - start, 1), what: measure(base)})
        if options.get("rest") and not left:
            continue
        if options.get("down") and not any(n.endswith("down_proj.weight") for n in names):
            continue
        for kind in (kind for kind in TYPES if kind["weights"] in chosen.types):
            found = quantized(copy.deepcopy(base), {**kind, "method": chosen.method, **options}, left)
            note({**kind, "setting": setting, "bits": round(bits(found), 3), what: measure(found)})


def smollm2(tokens: int) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """SmolLM2 dithered, and its perplexity over both texts."""
    directory = makers.smollm2_dithered()
    tokenizer = tf.AutoTokenizer.from_pretrained(directory)

    def measure(model: nn.Module) -> float:
        found = [
            perplexity(model, tokenizer, text, window=1024, max_tokens=tokens, progress=False).perplexity
            for text in (eval_text(), calibration_text())
        ]
        return round(math.exp(sum(map(math.log, found)) / len(found)), 3)

    return tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval(), measure


def minilm(sentences: int) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """MiniLM, and 1 - the mean cosine of its embeddings to the float model's."""
    directory = makers.minilm()
    texts = [line for line in eval_text().splitlines() if 60 < len(line) < 400][:sentences]
    tokenizer = tf.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    model = tf.AutoModel.from_pretrained(directory).eval()

    @torch.no_grad()
    def embed(one: nn.Module) -> torch.Tensor:
        hidden = one(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    exact = embed(model)
    return model, lambda one: round(1 - F.cosine_similarity(exact, embed(one)).mean().item(), 5)


def main() -> None:
    """Measures and writes results/folding.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1022, help="of each of the two texts")
    parser.add_argument("--sentences", type=int, default=128)
    parser.add_argument("--method", default="weighted", help="how scales are chosen")
    parser.add_argument("--types", nargs="+", default=["int4", "int3", "int2"])
    parser.add_argument(
        "--settings", nargs="+", default=[""], help="those whose name has one of these words; default: all"
    )
    parser.add_argument("--only", choices=("smollm2", "minilm"))
    parser.add_argument("--out", type=Path, default=RESULTS / "folding.json")
    arguments = parser.parse_args()
    makes = {
        "minilm": (lambda: minilm(arguments.sentences), "one_minus_cosine"),
        "smollm2": (lambda: smollm2(arguments.tokens), "perplexity"),
    }
    results: dict[str, list[dict[str, Any]]] = {}

    def note(name: str, row: dict[str, Any]) -> None:
        results.setdefault(name, []).append(row)
        print(name, row, file=sys.stderr, flush=True)
        options = {key: getattr(arguments, key) for key in ("tokens", "sentences", "method")}
        write(arguments.out, {**options, "results": results})

    for name, (make, what) in makes.items():
        if arguments.only in (None, name):
            rows(*make(), what, arguments, lambda row, name=name: note(name, row))


if __name__ == "__main__":
    main()
