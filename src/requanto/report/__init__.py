"""Measurements of quantized models: perplexity, generation speed, comparison of two models."""

from requanto.report.compare import Comparison, LayerComparison, compare
from requanto.report.perplexity import PerplexityResult, perplexity
from requanto.report.speed import SpeedResult, generation_speed

__all__ = [
    "Comparison",
    "LayerComparison",
    "PerplexityResult",
    "SpeedResult",
    "compare",
    "generation_speed",
    "perplexity",
]
