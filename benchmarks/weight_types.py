"""Accuracy of every type of weight: perplexity of SmolLM2-135M and embeddings of all-MiniLM-L6-v2.

    python benchmarks/weight_types.py                    # all types, 6,000 tokens: about 15 minutes
    python benchmarks/weight_types.py int3 nf4:64        # some of them; TYPE:GROUP for another group size
    python benchmarks/weight_types.py --speed            # time of decoding on this CPU relative to int4 (a minute)

Quantization without samples of every linear layer (embeddings and the output layer stay in bfloat16), each type in its
default group size. Bits a weight include scales and shifts, over the quantized weights. SmolLM2's weights come from a
Q4_1 file (affine, groups of 32), which flatters affine 4-bit types, most of all at group 32; MiniLM's were never
quantized before. Writes benchmarks/results/types.json after each type, so that an interruption loses only one; --speed
writes types_speed.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import RESULTS, command, interleaved, machine, write
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from requanto import QTensor, QuantoConfig
from requanto.data import eval_text
from requanto.linear.cpu.dequantize import dequantize_rows
from requanto.report import perplexity
from requanto.runtime.settings import settings

CASES = (
    "bfloat16",
    *("int4", "nf4", "fp4", "fp4_e2m1", "codebook4", "int3", "int3:64", "nf3", "nf3:64", "codebook3", "codebook3:64"),
    *("nf4:32", "codebook4:32"),
    *("int5", "int5:128", "int6", "int6:128", "int7", "int7:128", "int8", "uint8"),
    *("fp6_e2m3", "fp6_e3m2", "fp5_e2m2", "fp7_e2m4", "fp3_e1m1", "int2", "nf2", "codebook2"),
)
#: types whose decoding is timed
DECODED = ("int4", "int8", "int2", "int3", "int5", "int6", "int7", "uint8", "nf4", "fp6_e3m2", "codebook3", "codebook4")
NOTE = (
    "SmolLM2's weights come from a 4-bit file (Q4_1, affine, groups of 32): affine 4-bit types look better on it than "
    "they are. all-MiniLM-L6-v2 was never quantized before. Scales by minmax (codebooks: absmax)."
)


def config_of(case: str) -> QuantoConfig | None:
    """``TYPE`` or ``TYPE:GROUP``; None for bfloat16."""
    weights, _, group = case.partition(":")
    if weights == "bfloat16":
        return None
    return QuantoConfig(weights=weights, group_size=int(group) if group else None, method="minmax")


def size(model: torch.nn.Module) -> dict[str, Any]:
    """Bits for each quantized weight, and the group sizes that occur."""
    weights = [p for p in model.parameters() if isinstance(p, QTensor)]
    if not weights:
        return {"bits_per_weight": 16.0, "groups": []}
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.numel() for w in weights)
    return {"bits_per_weight": round(bits, 4), "groups": sorted({w.group_size or 0 for w in weights})}


def sentences(count: int = 64) -> list[str]:
    """Lines of more than 60 characters of the text that ships with the package."""
    lines = [line.strip() for line in eval_text().split("\n")]
    return [line for line in lines if 60 < len(line) < 400][:count]


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean-pooled, ``[texts, features]``."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    hidden = model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def speed(out: Path) -> None:
    """Measures milliseconds to decode 4 million weights to bfloat16 by operators, alternating with int4."""
    settings.compiled = False
    weight = torch.randn(1024, 4096, dtype=torch.bfloat16) * 0.02
    block = torch.empty_like(weight)
    tensors = {kind: QTensor.quantize(weight, kind) for kind in DECODED}
    calls = {kind: [partial(dequantize_rows, tensor, 0, 1024, block)] for kind, tensor in tensors.items()}
    write(out, {"weights": weight.numel(), "baseline": "int4", "decode": interleaved(calls, "int4", seconds=3)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="TYPE[:GROUP]", help="which; default: all")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--speed", action="store_true", help="time decoding instead")
    options = parser.parse_args()
    options.out = options.out or RESULTS / ("types_speed.json" if options.speed else "types.json")
    if options.speed:
        return speed(options.out)
    transformers.utils.logging.disable_progress_bar()
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from real_models import minilm_dir, smollm2_dir

    chat, bert = smollm2_dir(), minilm_dir()
    tokenizer, words = AutoTokenizer.from_pretrained(chat), AutoTokenizer.from_pretrained(bert)
    texts = sentences()
    wanted = embeddings(AutoModel.from_pretrained(bert), words, texts)
    # Types that are not selected keep their older figures, each with its command.
    rows = json.loads(options.out.read_text())["rows"] if options.cases != CASES and options.out.exists() else []
    for case in tqdm(options.cases, desc="types", unit="type"):
        loading = {"quantization_config": config} if (config := config_of(case)) else {}
        model = AutoModelForCausalLM.from_pretrained(chat, dtype=torch.bfloat16, **loading).eval()
        found = perplexity(model, tokenizer, eval_text(), options.window, options.tokens, progress=False)
        row = {"type": case, **size(model), "perplexity": round(found.perplexity, 4), "tokens": found.tokens}
        small = AutoModel.from_pretrained(bert, dtype=torch.float32, **loading).eval()
        cosine = F.cosine_similarity(embeddings(small, words, texts), wanted)
        row |= {"minilm_bits_per_weight": size(small)["bits_per_weight"] if config else 32.0}
        row |= {"minilm_cosine": round(float(cosine.mean()), 6), "minilm_cosine_least": round(float(cosine.min()), 6)}
        rows = [*(known for known in rows if known["type"] != case), row | {"command": command()}]
        tqdm.write(
            f"{case:14} {row['bits_per_weight']:6.2f} bits  perplexity {row['perplexity']:10.3f}  "
            f"MiniLM cosine {row['minilm_cosine']:.4f}"
        )
        result = {"note": NOTE, "machine": machine(), "window": options.window, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
