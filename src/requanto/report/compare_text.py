"""Compares language models and encoders on the same text: perplexity, KL divergence, cosine of embeddings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from requanto.data import eval_text
from requanto.report import choice, similarity
from requanto.report._inputs import Tokenizer, model_device, start_token, token_ids
from requanto.report.lockstep import Lockstep
from requanto.report.text_metrics import Metrics, metrics_for

logger = logging.getLogger(__name__)

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
    questions: int,
    errors: Any,
    progress: bool,
) -> tuple[str, dict[str, float | int]]:
    """Runs two models on one text; returns (kind, results). The layers' outputs are passed to ``errors``.

    Raises:
        ValueError: the text is too short, or the models return neither logits nor hidden states.
    """
    text = eval_text() if text is None else text
    windows = token_windows(a, tokenizer, text, window, max_tokens)
    lockstep = Lockstep(errors.pairs, errors.observe)
    metrics: Metrics | None = None
    with tqdm(total=sum(map(len, windows)), unit="tok", desc="comparing", disable=not progress, leave=False) as bar:
        for tokens in windows:
            inputs = torch.tensor([tokens], dtype=torch.int64, device="cpu")
            outputs = lockstep.run(*(_call(model, inputs) for model in (a, b)))
            metrics = metrics or metrics_for(a, outputs[0], inputs)
            metrics.add(inputs, *outputs)
            bar.update(len(tokens))
    assert metrics is not None
    more = {"causal_lm": _task, "encoder": _similarity}.get(metrics.kind)
    if more is None or questions < 1:
        return metrics.kind, metrics.values()
    return metrics.kind, {**metrics.values(), **more(a, b, tokenizer, text, questions, progress)}


def _task(
    a: nn.Module, b: nn.Module, tokenizer: Tokenizer, text: str, count: int, progress: bool
) -> dict[str, float | int]:
    try:
        asked = choice.questions(text, count)
    except ValueError as error:
        logger.warning("no multiple choice: %s", error)
        return {}
    one, other = (choice.multiple_choice(model, tokenizer, asked, progress) for model in (a, b))
    difference, error = choice.paired_difference(one, other)
    return {
        "questions": len(asked),
        "choice_a": one.accuracy,
        "choice_b": other.accuracy,
        "choice_error_a": one.standard_error,
        "choice_error_b": other.standard_error,
        "choice_difference": difference,
        "choice_difference_error": error,
    }


def _similarity(
    a: nn.Module, b: nn.Module, tokenizer: Tokenizer, text: str, count: int, progress: bool
) -> dict[str, float | int]:
    try:
        texts = similarity.passages(text, count)
    except ValueError as error:
        logger.warning("no rank correlation: %s", error)
        return {}
    found = similarity.similarity(*(similarity.embeddings(model, tokenizer, texts, progress) for model in (a, b)))
    return {"rank_correlation": found["rank_correlation"], "pairs": found["pairs"]}


def _call(model: nn.Module, inputs: Tensor) -> Any:
    return lambda: model(input_ids=inputs.to(model_device(model)))


def token_windows(
    model: nn.Module, tokenizer: Tokenizer, text: str, window: int, max_tokens: int | None
) -> list[list[int]]:
    """Splits a text into windows of at least two token ids, each with the start token if the tokenizer has one.

    Args:
        model: a window is at most as long as it allows.
        window: tokens in a window.
        max_tokens: maximum number of tokens of the text; None: all.

    Raises:
        ValueError: the text or the window is too short.
    """
    prefix = start_token(tokenizer)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    size = min(window, longest) if isinstance(longest, int) else window
    ids = token_ids(tokenizer, text if max_tokens is None else text[: 16 * max_tokens])[:max_tokens]
    if len(ids) < 2 or size < 2 + len(prefix):
        raise ValueError(
            f"comparing needs a text of at least 2 tokens, found {len(ids)} in {len(text)} characters with windows of "
            f"{size} tokens: pass a longer text, or a larger window or max_tokens"
        )
    step = size - len(prefix)
    windows = [prefix + ids[start : start + step] for start in range(0, len(ids), step)]
    return [tokens for tokens in windows if len(tokens) > 1]
