"""What two models make of the same tokens: perplexity, KL divergence, top-1 agreement; or the cosine of hidden states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from requanto.report.perplexity import exponential

# Rows of logits in float32 at a time, as in `perplexity`.
_ROWS = 128


def metrics_for(model: nn.Module, output: Any, inputs: Tensor) -> Metrics:
    """Returns empty metrics for what a model returns.

    Raises:
        ValueError: neither logits nor hidden states for each token.
    """
    logits, hidden = getattr(output, "logits", None), getattr(output, "last_hidden_state", None)
    if logits is not None and logits.shape[:2] == inputs.shape:
        can_generate = getattr(model, "can_generate", None)
        return LogitMetrics(causal=can_generate is None or bool(can_generate()))
    if hidden is not None and hidden.shape[:2] == inputs.shape:
        return HiddenMetrics()
    raise ValueError(
        f"{type(model).__name__} returns neither logits nor a last_hidden_state for each token: pass run=, a function that "
        f"runs it, or weights_only=True"
    )


class Metrics:
    """Results so far; ``kind`` is that of `Comparison`."""

    kind: str

    def add(self, inputs: Tensor, a: Any, b: Any) -> None:
        """Adds the outputs of both models for ``inputs [1, T]``."""
        raise NotImplementedError

    def values(self) -> dict[str, float | int]:
        """Returns the results by name."""
        raise NotImplementedError


@dataclass
class _Mean:
    """A mean and its standard error, of values that are taken as independent."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        self.count += values.numel()
        self.total += values.sum().item()
        self.squares += values.square().sum().item()

    @property
    def value(self) -> float:
        return self.total / self.count

    @property
    def error(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.count - self.value**2) / self.count)


class LogitMetrics(Metrics):
    """Perplexity of both models (if causal), Kullback-Leibler divergence, top-1 agreement, with standard errors.

    Args:
        causal: the logits predict the next token.
    """

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.kind = "causal_lm" if causal else "masked_lm"
        self.kl, self.same = _Mean(), _Mean()
        self.nll_a, self.nll_b, self.rise = _Mean(), _Mean(), _Mean()

    def add(self, inputs: Tensor, a: Any, b: Any) -> None:
        """Adds outputs with ``logits [1, T, vocabulary]``."""
        self.add_logits(inputs[0], a.logits[0], b.logits[0])

    def add_logits(self, ids: Tensor, rows_a: Tensor, rows_b: Tensor) -> None:
        """Adds the logits ``[T, vocabulary]`` of both models for the tokens ``ids [T]``."""
        targets = ids[1:].to(rows_b.device)
        for start in range(0, len(rows_a), _ROWS):
            part = slice(start, start + _ROWS)
            log_a = F.log_softmax(rows_a[part].to(rows_b.device).float(), -1)
            log_b = F.log_softmax(rows_b[part].float(), -1)
            self.kl.add((log_a.exp() * (log_a - log_b)).sum(-1, dtype=torch.float64))
            self.same.add(log_a.argmax(-1) == log_b.argmax(-1))
            wanted = targets[part]
            nll_a, nll_b = (F.nll_loss(logs[: len(wanted)], wanted, reduction="none") for logs in (log_a, log_b))
            for mean, values in ((self.nll_a, nll_a), (self.nll_b, nll_b), (self.rise, nll_b.double() - nll_a)):
                mean.add(values)

    def values(self) -> dict[str, float | int]:
        """``kl``, ``top1_agreement``, ``tokens``; of causal models also the perplexities and their ratio."""
        found: dict[str, float | int] = {
            "kl": self.kl.value,
            "kl_error": self.kl.error,
            "top1_agreement": self.same.value,
            "top1_error": self.same.error,
            "tokens": self.kl.count,
        }
        if self.causal:
            ratio = exponential(self.rise.value)
            found |= {
                "perplexity_a": exponential(self.nll_a.value),
                "perplexity_b": exponential(self.nll_b.value),
                "perplexity_ratio": ratio,
                "perplexity_ratio_error": ratio * self.rise.error,
            }
        return found


class HiddenMetrics(Metrics):
    """Cosine of the last hidden states, per token and of their mean over each window."""

    kind = "encoder"

    def __init__(self) -> None:
        self.pooled: list[float] = []
        self.token_cosine, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, a: Any, b: Any) -> None:
        """Adds outputs with ``last_hidden_state [1, T, width]``."""
        states_b = b.last_hidden_state[0].float()
        states_a = a.last_hidden_state[0].to(states_b.device).float()
        self.token_cosine += F.cosine_similarity(states_a, states_b, -1).sum(dtype=torch.float64).item()
        self.pooled.append(F.cosine_similarity(states_a.mean(0), states_b.mean(0), 0).item())
        self.tokens += len(states_a)

    def values(self) -> dict[str, float | int]:
        """``cosine_mean``, ``cosine_min`` (of the means), ``token_cosine``, ``tokens``."""
        return {
            "cosine_mean": sum(self.pooled) / len(self.pooled),
            "cosine_min": min(self.pooled),
            "token_cosine": self.token_cosine / self.tokens,
            "tokens": self.tokens,
        }
