"""GEMMs and embedding lookups with quantized weights, and the registry of their implementations."""

from requanto.linear.api import linear, times
from requanto.linear.embedding import embedding
from requanto.linear.grouped import grouped_linear
from requanto.linear.joint import linear_many
from requanto.linear.registry import Choice, Implementation, Problem, choose, implementations, register

__all__ = [
    "Choice",
    "Implementation",
    "Problem",
    "choose",
    "embedding",
    "grouped_linear",
    "implementations",
    "linear",
    "linear_many",
    "register",
    "times",
]
