"""Scales in few bits, rotation and low-rank correction: perplexity and cosine of embeddings at given bits.

    python benchmarks/compact.py            # both models, about 10 minutes on one idle core

Without samples, as `from_pretrained(quantization_config=...)` quantizes. SmolLM2's weights come from a Q4_1 file
(groups of 32 along the rows), which flatters affine groups of 32 without rotation. all-MiniLM-L6-v2 was never quantized
before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from common import RESULTS, write
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from real_models import minilm_dir, smollm2_dir

from requanto import QTensor, QuantoConfig
from requanto.data import eval_text
from requanto.report import perplexity

SCALES = [
    {"weights": "int4", "group_size": 64},
    {"weights": "int4", "group_size": 64, "scale_bits": 8},
    {"weights": "int4", "group_size": 32},
    {"weights": "int4", "group_size": 32, "scale_bits": 8},
    {"weights": "int4", "group_size": 32, "scale_bits": 4},
    {"weights": "int4", "group_size": 16, "scale_bits": 4},
    {"weights": "int3", "group_size": 32, "scale_bits": 8},
    {"weights": "int3", "group_size": 16, "scale_bits": 4},
    {"weights": "int2", "group_size": 32, "scale_bits": 8},
    {"weights": "int2", "group_size": 16, "scale_bits": 4},
]
ROTATION = [
    {"weights": "int4", "group_size": 64, "scale_bits": 8, "rotation": True},
    {"weights": "int4", "group_size": 32, "scale_bits": 4, "rotation": True},
    {"weights": "int3", "group_size": 16, "scale_bits": 4, "rotation": True},
    {"weights": "int2", "group_size": 16, "scale_bits": 4, "rotation": True},
]
CORRECTION = [
    {"weights": "int3", "group_size": 16, "scale_bits": 4, "low_rank": 8},
    {"weights": "int3", "group_size": 16, "scale_bits": 4, "low_rank": 16},
    {"weights": "int3", "group_size": 16, "scale_bits": 4, "low_rank": 32},
    {"weights": "int4", "group_size": 32, "scale_bits": 4, "low_rank": 16},
    {"weights": "int2", "group_size": 16, "scale_bits": 4, "low_rank": 32},
]


def bits(model: nn.Module) -> float:
    """Bits for each quantized weight, including scales and low-rank factors."""
    found = [p for p in model.parameters() if isinstance(p, QTensor)]
    return sum(p.nbytes for p in found) * 8 / sum(p.numel() for p in found)


def smollm2(options: dict[str, Any] | None, tokens: int) -> dict[str, float]:
    """Perplexity of SmolLM2-135M-Instruct in bfloat16."""
    directory = smollm2_dir()
    config = {} if options is None else {"quantization_config": QuantoConfig(**options)}
    model = tf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **config).eval()
    cost = 16.0 if options is None else bits(model)
    tokenizer = tf.AutoTokenizer.from_pretrained(directory)
    found = perplexity(model, tokenizer, eval_text(), window=1024, max_tokens=tokens, progress=False)
    return {"smollm2_bits": round(cost, 3), "smollm2_perplexity": round(found.perplexity, 2)}


class Embeddings:
    """Compares sentence embeddings of all-MiniLM-L6-v2 with the float model's."""

    def __init__(self, sentences: int) -> None:
        texts = [line for line in eval_text().splitlines() if 60 < len(line) < 400][:sentences]
        tokenizer = tf.AutoTokenizer.from_pretrained(minilm_dir())
        self.batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        self.float = self._of(tf.AutoModel.from_pretrained(minilm_dir()))

    @torch.no_grad()
    def _of(self, model: nn.Module) -> torch.Tensor:
        hidden = model.eval()(**self.batch).last_hidden_state
        mask = self.batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    def near(self, options: dict[str, Any]) -> dict[str, float]:
        """Mean cosine to the float embeddings. The weights are stored as in a bfloat16 model and computed in float32."""
        model = tf.AutoModel.from_pretrained(
            minilm_dir(), dtype=torch.bfloat16, quantization_config=QuantoConfig(**options)
        )
        cost = bits(model)
        for module in model.modules():  # .float() is blocked on quantized models
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.float32), requires_grad=False))
        cosine = F.cosine_similarity(self.float, self._of(model)).mean().item()
        return {"minilm_bits": round(cost, 3), "minilm_cosine": round(cosine, 4)}


def main() -> None:
    """Measures and writes results/compact.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "compact.json")
    arguments = parser.parse_args()
    embeddings = Embeddings(arguments.sentences)
    parts = {"scales": SCALES, "rotation": ROTATION, "correction": CORRECTION}
    results = {
        part: [{**options, **embeddings.near(options)} for options in choices] for part, choices in parts.items()
    }
    results["float"] = [smollm2(None, arguments.tokens)]
    for part, choices in parts.items():
        for row, options in zip(results[part], choices, strict=True):
            row.update(smollm2(options, arguments.tokens))
            print(row, file=sys.stderr, flush=True)
            write(arguments.out, {"tokens": arguments.tokens, "sentences": arguments.sentences, "results": results})


if __name__ == "__main__":
    main()
