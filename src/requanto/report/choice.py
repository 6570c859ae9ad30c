"""A task for causal language models: multiple choice by likelihood, on questions made from a text.

A question is a passage of the text and four continuations of equal length in words: the true one, and three taken from
elsewhere in the text. The model answers with the continuation whose tokens have the highest mean log likelihood. The
questions depend only on the text and the arguments: no random generator of a library is used.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from requanto.report._inputs import Tokenizer, model_device, start_token, token_ids

#: questions that are answered at a time
BATCH = 16
#: layers of Transformers' DynamicCache that hold nothing but keys and values; models with others read each passage anew
_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


@dataclass(frozen=True)
class Question:
    """A passage and its possible continuations.

    Attributes:
        context: the passage; words are separated by single spaces.
        choices: the continuations, all of the same number of words.
        answer: index of the true one.
    """

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceResult:
    """Result of `multiple_choice`.

    Attributes:
        chosen: index of the continuation that the model chose, by question.
        correct: whether that is the true one, by question.
        accuracy: mean of ``correct``.
        standard_error: of ``accuracy`` as an estimate for other questions of this kind, ``sqrt(p (1 - p) / n)``.
        seconds: wall-clock time.
    """

    chosen: tuple[int, ...]
    correct: tuple[bool, ...]
    accuracy: float
    standard_error: float
    seconds: float


def questions(
    text: str, count: int = 400, *, context_words: int = 16, choice_words: int = 4, choices: int = 4, seed: int = 0
) -> list[Question]:
    """Makes questions from a text; the same arguments give the same questions on every machine.

    The passages are spread evenly over the text. A wrong continuation starts where no word of it is in the passage or its
    continuation, and differs from the true one.

    Args:
        text: at least a few thousand words.
        count: number of questions; fewer are made of a text with fewer than ``context_words + choice_words`` words for each.
        context_words, choice_words: words of a passage and of a continuation.
        choices: continuations of a question.
        seed: of the choice of wrong continuations and of the order.

    Raises:
        ValueError: an argument is out of range, or the text has too few words.
    """
    if min(count, context_words, choice_words) < 1 or choices < 2:
        raise ValueError(
            f"count, context_words and choice_words must be at least 1 and choices at least 2, found {count}, "
            f"{context_words}, {choice_words} and {choices}"
        )
    words = text.split()
    length = context_words + choice_words
    needed = length * (choices + 1)
    if len(words) < needed:
        raise ValueError(
            f"questions of {choices} choices need a text of at least {needed} words, found {len(words)} in {len(text)} "
            f"characters"
        )
    count = min(count, len(words) // length)
    random = _numbers(seed)
    found = []
    for index in range(count):
        start = index * (len(words) - length) // max(1, count - 1)
        true = " ".join(words[start + context_words : start + length])
        options = [true]
        for _ in range(100 * choices):  # a text of few different words has few different continuations
            if len(options) == choices:
                break
            place = next(random) % (len(words) - choice_words + 1)
            other = " ".join(words[place : place + choice_words])
            if (place + choice_words <= start or place >= start + length) and other not in options:
                options.append(other)
        else:
            raise ValueError(
                f"the text repeats itself: found no {choices} different continuations of {choice_words} words"
            )
        answer = next(random) % choices
        options[0], options[answer] = options[answer], options[0]
        found.append(Question(" ".join(words[start : start + context_words]), tuple(options), answer))
    return found


def _numbers(seed: int) -> Iterator[int]:
    """Pseudo-random integers below 2^31 (the generator is that of `java.util.Random`)."""
    state = (seed ^ 0x5DEECE66D) & (2**48 - 1)
    while True:
        state = (state * 0x5DEECE66D + 0xB) & (2**48 - 1)
        yield state >> 17


def multiple_choice(
    model: nn.Module, tokenizer: Tokenizer, asked: Sequence[Question], progress: bool = True
) -> ChoiceResult:
    """Lets a causal language model answer questions.

    Passage and continuation are split into tokens separately, a space before the continuation. Continuations are scored by
    their mean log likelihood for each token, in float32.

    Args:
        model: a causal language model of Transformers, or any module called with ``input_ids=`` that returns ``.logits``.
        tokenizer: its tokenizer. If it puts a start token before a text, every passage gets one.
        asked: the questions (`questions`).
        progress: show a progress bar.

    Raises:
        ValueError: no questions, or the model returns no logits for each token.
    """
    if not asked:
        raise ValueError("no questions to answer")
    prefix = start_token(tokenizer)
    contexts = [prefix + token_ids(tokenizer, question.context) for question in asked]
    answers = [[token_ids(tokenizer, f" {choice}") for choice in question.choices] for question in asked]
    # Passages of one length are answered together: no padding before the continuations.
    order = sorted(range(len(asked)), key=lambda index: (len(contexts[index]), index))
    chosen = [0] * len(asked)
    was_training, start = model.training, time.perf_counter()
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=len(asked), desc="questions", unit="q", disable=not progress) as bar:
            for batch in _batches(order, [len(ids) for ids in contexts]):
                scores = _scores(model, [contexts[i] for i in batch], [answers[i] for i in batch])
                for index, row in zip(batch, scores):
                    chosen[index] = max(range(len(row)), key=row.__getitem__)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    correct = tuple(pick == question.answer for pick, question in zip(chosen, asked))
    accuracy = sum(correct) / len(correct)
    error = math.sqrt(accuracy * (1 - accuracy) / len(correct))
    return ChoiceResult(tuple(chosen), correct, accuracy, error, time.perf_counter() - start)


def paired_difference(a: ChoiceResult, b: ChoiceResult) -> tuple[float, float]:
    """Returns (accuracy of b minus that of a, its standard error) for answers of two models to the same questions.

    The error is that of the mean of the differences by question (McNemar's): questions that both models answer rightly or
    wrongly add nothing to it, so it is several times smaller than the errors of the two accuracies.

    Raises:
        ValueError: the numbers of questions differ.
    """
    if len(a.correct) != len(b.correct):
        raise ValueError(
            f"the models answered {len(a.correct)} and {len(b.correct)} questions; give both the same ones"
        )
    differences = [int(y) - int(x) for x, y in zip(a.correct, b.correct)]
    mean = sum(differences) / len(differences)
    variance = sum(d * d for d in differences) / len(differences) - mean * mean
    return mean, math.sqrt(max(0.0, variance) / len(differences))


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Splits indices, sorted by length, into batches of one length."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == BATCH or lengths[index] != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _scores(model: nn.Module, contexts: list[list[int]], answers: list[list[list[int]]]) -> list[list[float]]:
    """Returns the mean log likelihood of the tokens of each continuation, by question.

    Args:
        contexts: token ids of the passages, all of one length, at least one token.
        answers: token ids of the continuations of each.
    """
    device, choices = model_device(model), len(answers[0])
    flat = [ids for row in answers for ids in row]
    longest = max(map(len, flat))
    # Padding comes after a continuation, where no token of it can see it.
    targets = torch.tensor([ids + [0] * (longest - len(ids)) for ids in flat], dtype=torch.int64, device=device)
    passages = torch.tensor(contexts, dtype=torch.int64, device=device)
    logits = _continued(model, passages, targets, choices)
    found = F.log_softmax(logits.float(), -1).gather(-1, targets.to(logits.device).unsqueeze(-1)).squeeze(-1).double()
    means = [row[: len(ids)].mean().item() for row, ids in zip(found, flat)]
    return [means[start : start + choices] for start in range(0, len(means), choices)]


def _continued(model: nn.Module, passages: Tensor, targets: Tensor, choices: int) -> Tensor:
    """Returns the logits ``[B * choices, L, vocabulary]`` that predict the continuations ``targets [B * choices, L]``."""
    first: Any = model(input_ids=passages, use_cache=True)
    _check_logits(model, first, passages)
    # The argument's name: `cache` since Transformers 5.24 or so, `past_key_values` before.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = getattr(first, name, None)
    if type(cache).__name__ == "DynamicCache" and all(type(layer).__name__ in _PLAIN_LAYERS for layer in cache.layers):
        cache.batch_repeat_interleave(choices)  # the passage is read once for all its continuations
        start = first.logits[:, -1:].repeat_interleave(choices, 0)
        if targets.shape[1] == 1:
            return start
        rest: Any = model(input_ids=targets[:, :-1], use_cache=True, **{name: cache})
        return torch.cat((start, rest.logits), 1)
    whole = torch.cat((passages.repeat_interleave(choices, 0), targets[:, :-1]), 1)
    output: Any = model(input_ids=whole)
    return output.logits[:, passages.shape[1] - 1 :]


def _check_logits(model: nn.Module, output: Any, inputs: Tensor) -> None:
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != inputs.shape:
        found = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"multiple choice needs a causal language model: {type(model).__name__} returned {found} for input_ids of shape "
            f"{tuple(inputs.shape)}"
        )
