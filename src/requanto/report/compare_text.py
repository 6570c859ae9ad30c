"""Compares language models and encoders on the same text: perplexity, KL divergence, cosine of embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from requanto.data import eval_text
from requanto.report._inputs import Tokenizer, model_device, start_token, token_ids
from requanto.report.lockstep import Lockstep
from requanto.report.perplexity import exponential

logger = logging.getLogger(__name__)

# Rows of logits in float32 at a time, as in `perplexity`.
_ROWS = 128
# Two tokenizers count as equal if they give the same token ids for this text.
_SAMPLE = "The year 1986: naïve café, 東京. def f(x):\n\treturn x**2  # 100 %\n"


def common_tokenizer(a: Tokenizer | None, b: Tokenizer | None, labels: Sequence[str]) -> Tokenizer:
    """Returns the tokenizer for both models.

    Raises:
        ValueError: neither model has one, or they give different tokens.
    """
    if a is None and b is None:
        raise ValueError(
            f"neither {labels[0]} nor {labels[1]} has a tokenizer: pass tokenizer=, or save one into the directory. "
            f"For models that take no text, pass run=, or weights_only=True to compare only weights"
        )
    if a is None or b is None:
        logger.warning("%s has no tokenizer; using that of %s for both", *(labels if a is None else labels[::-1]))
        return a or b  # type: ignore[return-value]
    if a is not b and (token_ids(a, _SAMPLE) != token_ids(b, _SAMPLE) or start_token(a) != start_token(b)):
        raise ValueError(
            f"the tokenizers of {labels[0]} and {labels[1]} differ: they give different tokens for the same text. Save a "
            f"quantized model with the tokenizer of its float model."
        )
    return a


def read_both(
    a: nn.Module,
    b: nn.Module,
    tokenizer: Tokenizer,
    text: str | None,
    window: int,
    max_tokens: int | None,
    errors: Any,
    progress: bool,
) -> tuple[str, dict[str, float | int]]:
    """Runs two models on one text; returns (kind, results). The layers' outputs are passed to ``errors``.

    Raises:
        ValueError: the text is too short, or the models return neither logits nor hidden states.
    """
    text = eval_text() if text is None else text
    prefix = start_token(tokenizer)
    longest = getattr(getattr(a, "config", None), "max_position_embeddings", None)
    size = min(window, longest) if isinstance(longest, int) else window
    ids = token_ids(tokenizer, text if max_tokens is None else text[: 16 * max_tokens])[:max_tokens]
    if len(ids) < 2 or size < 2 + len(prefix):
        raise ValueError(
            f"comparing needs a text of at least 2 tokens, found {len(ids)} in {len(text)} characters with windows of "
            f"{size} tokens: pass a longer text, or a larger window or max_tokens"
        )
    step = size - len(prefix)
    windows = [ids[start : start + step] for start in range(0, len(ids), step)]
    lockstep = Lockstep(errors.pairs, errors.observe)
    metrics: _Metrics | None = None
    with tqdm(total=len(ids), unit="tok", desc="comparing", disable=not progress, leave=False) as bar:
        for tokens in windows:
            if len(prefix) + len(tokens) > 1:
                inputs = torch.tensor([prefix + tokens], dtype=torch.int64, device="cpu")
                outputs = lockstep.run(*(_call(model, inputs) for model in (a, b)))
                metrics = metrics or _metrics_for(a, outputs[0], inputs)
                metrics.add(inputs, *outputs)
            bar.update(len(tokens))
    if metrics is None:
        raise ValueError("the text has no window of at least two tokens")
    return metrics.kind, metrics.values()


def _call(model: nn.Module, inputs: Tensor) -> Any:
    return lambda: model(input_ids=inputs.to(model_device(model)))


def _metrics_for(model: nn.Module, output: Any, inputs: Tensor) -> _Metrics:
    logits, hidden = getattr(output, "logits", None), getattr(output, "last_hidden_state", None)
    if logits is not None and logits.shape[:2] == inputs.shape:
        can_generate = getattr(model, "can_generate", None)
        return _LogitMetrics(causal=can_generate is None or bool(can_generate()))
    if hidden is not None and hidden.shape[:2] == inputs.shape:
        return _HiddenMetrics()
    raise ValueError(
        f"{type(model).__name__} returns neither logits nor a last_hidden_state for each token: pass run=, a function that "
        f"runs it, or weights_only=True"
    )


class _Metrics:
    kind: str

    def add(self, inputs: Tensor, a: Any, b: Any) -> None:
        raise NotImplementedError

    def values(self) -> dict[str, float | int]:
        raise NotImplementedError


class _LogitMetrics(_Metrics):
    """Perplexity of both models (if causal), Kullback-Leibler divergence, top-1 agreement."""

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.kind = "causal_lm" if causal else "masked_lm"
        self.nll_a = self.nll_b = self.kl = 0.0
        self.same = self.predicted = self.tokens = 0

    def add(self, inputs: Tensor, a: Any, b: Any) -> None:
        rows_a, rows_b = a.logits[0], b.logits[0]
        targets = inputs[0, 1:].to(rows_b.device)
        for start in range(0, len(rows_a), _ROWS):
            part = slice(start, start + _ROWS)
            log_a = F.log_softmax(rows_a[part].to(rows_b.device).float(), -1)
            log_b = F.log_softmax(rows_b[part].float(), -1)
            self.kl += (log_a.exp() * (log_a - log_b)).sum(dtype=torch.float64).item()
            self.same += int((log_a.argmax(-1) == log_b.argmax(-1)).sum())
            self.tokens += len(log_a)
            wanted = targets[part]
            for name, logs in (("nll_a", log_a), ("nll_b", log_b)):
                loss = F.nll_loss(logs[: len(wanted)], wanted, reduction="none").sum(dtype=torch.float64).item()
                setattr(self, name, getattr(self, name) + loss)
            self.predicted += len(wanted)

    def values(self) -> dict[str, float | int]:
        found: dict[str, float | int] = {
            "kl": self.kl / self.tokens,
            "top1_agreement": self.same / self.tokens,
            "tokens": self.tokens,
        }
        if self.causal:
            found["perplexity_a"] = exponential(self.nll_a / self.predicted)
            found["perplexity_b"] = exponential(self.nll_b / self.predicted)
        return found


class _HiddenMetrics(_Metrics):
    """Cosine of the last hidden states, per token and of their mean over each window."""

    kind = "encoder"

    def __init__(self) -> None:
        self.pooled: list[float] = []
        self.token_cosine, self.tokens = 0.0, 0

    def add(self, inputs: Tensor, a: Any, b: Any) -> None:
        states_b = b.last_hidden_state[0].float()
        states_a = a.last_hidden_state[0].to(states_b.device).float()
        self.token_cosine += F.cosine_similarity(states_a, states_b, -1).sum(dtype=torch.float64).item()
        self.pooled.append(F.cosine_similarity(states_a.mean(0), states_b.mean(0), 0).item())
        self.tokens += len(states_a)

    def values(self) -> dict[str, float | int]:
        return {
            "cosine_mean": sum(self.pooled) / len(self.pooled),
            "cosine_min": min(self.pooled),
            "token_cosine": self.token_cosine / self.tokens,
            "tokens": self.tokens,
        }
