"""Measurements of quantized models: perplexity, a task, generation speed, comparison of two models."""

from requanto.report.agreement import LogitReference
from requanto.report.choice import ChoiceResult, Question, multiple_choice, paired_difference, questions
from requanto.report.compare import Comparison, LayerComparison, compare
from requanto.report.perplexity import PerplexityResult, perplexity
from requanto.report.speed import SpeedResult, generation_speed

__all__ = [
    "ChoiceResult",
    "Comparison",
    "LayerComparison",
    "LogitReference",
    "PerplexityResult",
    "Question",
    "SpeedResult",
    "compare",
    "generation_speed",
    "multiple_choice",
    "paired_difference",
    "perplexity",
    "questions",
]
