"""What a quantized output layer costs: perplexity of int4 models whose ``lm_head`` is bfloat16, int8 or int4.

    PYTHONPATH=src:kernels python benchmarks/output_layer.py        # about a quarter of an hour on one core

Two models with a table that is tied to the output layer, so both are quantized: SmolLM2-135M-Instruct and Gemma-3-270M.
Their packages hold quantized weights, so each weight gets uniform noise of one step of that grid first (`yardsticks`), the
table too: else rounding it once more would cost next to nothing. The same text for all.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from yardsticks.makers import MAKERS, dithered

import requanto
from requanto import data
from requanto.report.perplexity import perplexity

MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma-3-270M"}
KINDS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "int4": {},
    "int4, head int8": {"modules": {"lm_head": "int8"}},
    "int4, head int8 in groups of 64": {"modules": {"lm_head": {"weights": "int8", "group_size": 64}}},
    "int4, head int4": {"lm_head": True},
}
#: The grid that the packages have the tables on (Q8_0).
GROUP, STEPS = 32, 255


def prepared(name: str, folder: Path) -> Path:
    """The model, also with a dithered table."""
    source = MAKERS[name]()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table.copy_(dithered(table, torch.Generator().manual_seed(1), GROUP, STEPS))
    model.save_pretrained(folder / name)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    return folder / name


def measure(source: Path, options: dict[str, Any] | None, tokens: int) -> dict[str, float]:
    """Perplexity and bytes of the model, quantized with these options besides ``weights="int4"``."""
    config = {} if options is None else {"quantization_config": requanto.QuantoConfig(weights="int4", **options)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, device_map="cpu", **config).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    found = perplexity(model, tokenizer, data.eval_text(), window=512, max_tokens=tokens, progress=False)
    return {"perplexity": found.perplexity, "tokens": found.tokens, "bytes": model.get_memory_footprint()}


def main() -> None:
    """Measures, prints a line for each, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=16384, help="of the text")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            source = prepared(name, Path(folder))
            rows = results[MODELS[name]] = {}
            for kind, how in KINDS.items():
                rows[kind] = measure(source, how, options.tokens)
                against = rows["int4"]["perplexity"] if kind.startswith("int4") else rows["bf16"]["perplexity"]
                more = 100 * (rows[kind]["perplexity"] / against - 1)
                rows[kind]["percent_more_than_head_in_bf16"] = more
                print(f"{MODELS[name]}, {kind}: {rows[kind]['perplexity']:.4f} ({more:+.3f} %)", flush=True)
                write(RESULTS / "output_layer.json", {"models": results})


if __name__ == "__main__":
    main()
