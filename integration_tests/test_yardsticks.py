"""No default is more than 2 % worse than plain `minmax`, on the yardsticks that are quick."""

from __future__ import annotations

import functools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from requanto import QTensor

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

yardstick = pytest.importorskip("yardsticks.measure")

TYPES = ("int4", "int3", "int2", "nf4", "codebook4", "codebook3", "float8")
PLAIN = {"method": "minmax", "column_scale": False}


def rounded(model: nn.Module, **options: Any) -> nn.Module:
    """The model with dequantized weights: its float GEMMs are faster than the first run of quantized ones."""
    yardstick.ours(**options)(model)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if isinstance(value, QTensor):
                setattr(module, name, nn.Parameter(value.dequantize(), requires_grad=False))
    return model


def distance(**options: Any) -> float:
    """1 - cosine of embeddings to the float model's, mean of 32 sentences."""
    found = yardstick._embeddings(rounded(yardstick.load("minilm"), **options), 32)
    return 1 - nn.functional.cosine_similarity(found.double(), embeddings().double()).mean().item()


@functools.cache
def embeddings() -> torch.Tensor:
    return yardstick._embeddings(yardstick.load("minilm"), 32)


@pytest.mark.parametrize("weights", TYPES)
def test_sentence_embeddings(weights: str, minilm_dir: Path) -> None:
    assert 0 < distance(weights=weights) <= 1.02 * distance(weights=weights, **PLAIN)


@pytest.mark.parametrize("weights", ["int4", "int3"])
def test_a_language_model(weights: str, smollm2_dir: Path) -> None:
    sizes = {"tokens": 128, "window": 128, "asked": 0}  # of each of two texts
    plain, found = (
        yardstick.figures("smollm2", rounded(yardstick.load("smollm2"), weights=weights, **how), **sizes)
        for how in (PLAIN, {})
    )
    assert found["kl"] < 0.8 * plain["kl"]
    for text in ("eval", "calibration"):
        assert found[f"perplexity_{text}"] <= 1.02 * plain[f"perplexity_{text}"]


@functools.cache
@torch.no_grad()
def drawn(count: int) -> torch.Tensor:
    return yardstick.sample.draw(yardstick.sample.load(), torch.arange(count) % 10)


@torch.no_grad()
def decibels(moved: int = 3, count: int = 50, **options: Any) -> float:
    """PSNR of digits, mean of several roundings: one may be 1 dB better than the next by chance alone.

    They differ in which weights are a group: the columns are moved before the weights are rounded, and back after.
    """
    labels, wanted, total = torch.arange(count) % 10, drawn(count), 0.0
    for places in range(0, 7 * moved, 7):
        model = yardstick.sample.load()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for layer in layers:
            layer.weight.copy_(layer.weight.roll(places, 1))
        rounded(model, **options)
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            layer.weight.copy_(layer.weight.roll(-places, 1))
        total += yardstick.sample.psnr(yardstick.sample.draw(model, labels), wanted)
    return total / moved


@pytest.mark.parametrize("weights", ["int4", "int3", "int2"])
def test_drawn_digits(weights: str) -> None:
    found, plain = decibels(weights=weights), decibels(weights=weights, **PLAIN)
    assert math.isfinite(found)
    assert found >= 0.98 * plain
