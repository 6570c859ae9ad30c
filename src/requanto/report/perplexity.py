"""Perplexity of a causal language model on a text."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from requanto.report._inputs import Tokenizer, model_device, start_token, token_ids

# Rows of logits converted to float32 at a time: 128 x 262,144 (the largest vocabulary in use) are 128 MiB.
_ROWS = 128


@dataclass(frozen=True)
class PerplexityResult:
    """Result of `perplexity`.

    Attributes:
        perplexity: exp(nll): 1 for a certain prediction, the vocabulary size for uniform guessing.
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: number of predicted tokens; the first of every window is not predicted.
        seconds: wall-clock time of the measurement, without tokenization.
    """

    perplexity: float
    nll: float
    tokens: int
    seconds: float


def perplexity(
    model: nn.Module,
    tokenizer: Tokenizer,
    text: str,
    window: int = 1024,
    max_tokens: int | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Measures how well `model` predicts `text`: lower is better.

    The text is split into windows that do not overlap; each is predicted separately. Logits are converted to float32 before
    the softmax.

    Args:
        model: a causal language model of Transformers, or any module called with `input_ids=` that returns `.logits`.
        tokenizer: its tokenizer. If it puts a start token before a text, every window gets one.
        text: the text; `requanto.data.eval_text()` ships with the package.
        window: tokens in a window, the start token included.
        max_tokens: stop after this many tokens of the text.
        progress: show a progress bar.

    Raises:
        ValueError: the text holds fewer than two tokens, a size is out of range, the window is longer than the model
            allows, or the model is not a causal language model.
    """
    prefix = start_token(tokenizer)
    _check_sizes(model, window, max_tokens, len(prefix))
    # A token has fewer than 16 characters on average, so the rest of a long text need not be tokenized.
    ids = token_ids(tokenizer, text if max_tokens is None else text[: 16 * max_tokens])[:max_tokens]
    if len(ids) < 2:
        raise ValueError(
            f"perplexity needs a text of at least 2 tokens, found {len(ids)} in {len(text)} characters: "
            "pass a longer text (a few thousand tokens give a steady figure) or a larger max_tokens"
        )
    windows = list(_windows(ids, window - len(prefix), at_least=2 - len(prefix)))
    device, was_training = model_device(model), model.training
    model.eval()
    total, count, start = 0.0, 0, time.perf_counter()
    try:
        with torch.inference_mode(), tqdm(total=len(ids), unit="tok", desc="perplexity", disable=not progress) as bar:
            for tokens in windows:
                total += _window_nll(model, torch.tensor([prefix + tokens], dtype=torch.int64, device=device))
                count += len(prefix) + len(tokens) - 1
                bar.update(len(tokens))
                bar.set_postfix_str(f"ppl {exponential(total / count):.2f}")
    finally:
        model.train(was_training)
    nll = total / count
    return PerplexityResult(exponential(nll), nll, count, time.perf_counter() - start)


def _check_sizes(model: nn.Module, window: int, max_tokens: int | None, prefix: int) -> None:
    if window < 2 + prefix:
        raise ValueError(
            f"window must be at least {2 + prefix} tokens (one to start from, one to predict), got {window}"
        )
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2 or None, got {max_tokens}")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and window > longest:
        raise ValueError(
            f"window is {window} tokens, but {type(model).__name__} takes at most {longest} "
            f"(max_position_embeddings of its config): pass window={longest} or less"
        )


def _windows(ids: list[int], size: int, at_least: int) -> Iterator[list[int]]:
    """Yields windows of `size` tokens; a last window shorter than `at_least` is left out."""
    for first in range(0, len(ids), size):
        tokens = ids[first : first + size]
        if len(tokens) >= at_least:
            yield tokens


def _window_nll(model: nn.Module, input_ids: Tensor) -> float:
    """Returns the sum of the negative log-likelihoods of all tokens except the first."""
    output: Any = model(input_ids=input_ids, use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != input_ids.shape:
        found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"perplexity needs a causal language model: {type(model).__name__} returned {found} for input_ids of shape "
            f"{tuple(input_ids.shape)}, expected (1, {input_ids.shape[1]}, vocabulary): load it with "
            "AutoModelForCausalLM"
        )
    # A model on several devices returns its logits on the last one.
    targets = input_ids[0, 1:].to(logits.device)
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for rows, wanted in zip(logits[0, :-1].split(_ROWS), targets.split(_ROWS), strict=True):
        total += F.cross_entropy(rows.float(), wanted, reduction="sum").double().cpu()
    return total.item()


def exponential(nll: float) -> float:
    """Returns exp(nll), or infinity instead of an OverflowError."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
