"""Merging an adapter into quantized weights: difference of the merged model's logits from the unmerged one's.

    python benchmarks/lora_merge.py

SmolLM2-135M in float32 with random adapters on all linear layers; `effect_of_the_adapter` is how much they change the
logits. Also measures the loss of rounding the adapter into the codes (`fold_lowrank`). Relative errors, Frobenius norm.
Writes benchmarks/results/lora_merge.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import peft
import torch
from common import RESULTS, write
from transformers import AutoModelForCausalLM

import requanto
from requanto.tensor.lowrank import fold_lowrank

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from real_models import smollm2_dir


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of logits, by Frobenius norms in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def with_adapter(directory: Path, weights: str, dora: bool) -> peft.PeftModel:
    """The quantized model with a random adapter."""
    config = requanto.QuantoConfig(weights=weights)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32).eval()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=dora)
    model = peft.get_peft_model(model, lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def measure(directory: Path, weights: str, dora: bool, ids: torch.Tensor) -> dict:
    """One row of the table."""
    model = with_adapter(directory, weights, dora)
    unmerged = model(ids).logits
    with model.disable_adapter():
        effect = relative(model(ids).logits, unmerged)
    row = {"weights": weights, "adapter": "DoRA" if dora else "LoRA", "effect_of_the_adapter": effect}
    model.merge_adapter(safe_merge=True)
    row["merged"] = relative(model(ids).logits, unmerged)
    model.unmerge_adapter()
    row["merged_and_taken_out"] = relative(model(ids).logits, unmerged)
    merged = model.merge_and_unload()
    logits = merged(ids).logits
    row["merge_and_unload"] = relative(logits, unmerged)
    with tempfile.TemporaryDirectory() as saved:
        merged.save_pretrained(saved)
        loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        row["saved_and_loaded_same_bits"] = bool(torch.equal(loaded(ids).logits, logits))
    fold_lowrank(merged)
    row["folded_into_codes"] = relative(merged(ids).logits, unmerged)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", default=["int8", "float8", "int4", "int2"])
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    directory = smollm2_dir()
    ids = torch.randint(0, 40000, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    rows = []
    for weights in arguments.weights:
        for dora in (False, True):
            rows.append(measure(directory, weights, dora, ids))
            print(rows[-1], flush=True)
    write(RESULTS / "lora_merge.json", {"model": "SmolLM2-135M-Instruct, float32", "rows": rows})


if __name__ == "__main__":
    main()
