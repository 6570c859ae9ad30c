"""A task for language models: multiple choice by likelihood, made of any text.

A question is the beginning of a paragraph; the four answers are its true continuation and three continuations of other
paragraphs. The answer with the highest log-likelihood a character is taken, as in HellaSwag's normalized accuracy.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Question:
    """A context, its answers, and which of them is true."""

    context: str
    answers: tuple[str, ...]
    right: int


def questions(
    text: str, count: int, context: int = 20, answer: int = 8, choices: int = 4, seed: int = 0
) -> list[Question]:
    """Makes questions of the paragraphs of `text` that are long enough, at most one of each.

    Args:
        text: paragraphs separated by blank lines.
        count: how many; the paragraphs are spread evenly over the text.
        context: words before the continuation.
        answer: words of an answer.
        choices: answers of a question.
        seed: of the wrong answers and their order.

    Raises:
        ValueError: the text has too few paragraphs of `context + answer` words.
    """
    words = [paragraph.split() for paragraph in text.split("\n\n")]
    words = [found for found in words if len(found) >= context + answer]
    if len(words) < max(count, choices):
        raise ValueError(
            f"{count} questions need as many paragraphs of {context + answer} words, the text has {len(words)}: "
            "pass a longer text or a smaller count"
        )
    picked = [words[i * len(words) // count] for i in range(count)]
    contexts = [" ".join(found[:context]) for found in picked]
    answers = [" " + " ".join(found[context : context + answer]) for found in picked]
    chance = random.Random(seed)
    made = []
    for i in range(count):
        others = [other for other in dict.fromkeys(answers) if other != answers[i]]
        wrong = chance.sample(others, choices - 1)
        right = chance.randrange(choices)
        made.append(Question(contexts[i], (*wrong[:right], answers[i], *wrong[right:]), right))
    return made


@torch.inference_mode()
def answered(model: Any, tokenizer: Any, asked: list[Question], prefix: list[int]) -> list[int]:
    """The answer that the model takes for each question.

    Args:
        model: a causal language model whose output layer is `get_output_embeddings()` behind `base_model`.
        tokenizer: its tokenizer.
        asked: the questions.
        prefix: ids before every context (a start token).
    """
    taken = []
    for question in asked:
        context = prefix + tokenizer(question.context, add_special_tokens=False)["input_ids"]
        ends = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in question.answers]
        longest = max(len(end) for end in ends)
        ids = torch.tensor([context + end + [0] * (longest - len(end)) for end in ends])
        # Padding is at the end, where a causal model's earlier positions cannot see it.
        logits = _logits(model, ids, len(context) - 1)
        chances = torch.log_softmax(logits.float(), -1)
        totals = [
            sum(chances[row, at, token].item() for at, token in enumerate(end)) / len(answer)
            for row, (end, answer) in enumerate(zip(ends, question.answers, strict=True))
        ]
        taken.append(max(range(len(totals)), key=totals.__getitem__))
    return taken


def _logits(model: Any, ids: Tensor, first: int) -> Tensor:
    """Logits ``[rows, positions, vocabulary]`` from position `first` on, without the last, which predicts nothing."""
    return model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits[:, :-1]
