"""What a quantized model costs and what it keeps: figures a user can check."""

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
