"""How well an encoder's embeddings keep their similarities: cosine to the float model's, rank correlation of pairs.

Search with embeddings asks which of two passages is closer to a third. Cosines of pairs of passages answer that, and the
rank correlation says how far two models agree on the order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from requanto.report._inputs import Tokenizer, model_device


def passages(text: str, count: int = 64, words: int = 32) -> list[str]:
    """Returns passages of equal length, spread evenly over a text; fewer if it has not ``count * words`` words.

    Raises:
        ValueError: fewer than three passages: they have too few pairs.
    """
    found = text.split()
    count = min(count, len(found) // words)
    if count < 3:
        raise ValueError(f"similarities need at least 3 passages of {words} words, found {len(found)} words in all")
    starts = [index * (len(found) - words) // (count - 1) for index in range(count)]
    return [" ".join(found[start : start + words]) for start in starts]


@torch.inference_mode()
def embeddings(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], progress: bool = True) -> Tensor:
    """Returns mean-pooled last hidden states, float32 ``[len(texts), width]`` on the CPU.

    Raises:
        ValueError: the model returns no hidden states.
    """
    was_training, rows = model.training, []
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    model.eval()
    try:
        for text in tqdm(texts, desc="embeddings", unit="text", disable=not progress, leave=False):
            ids = list(tokenizer(text, verbose=False)["input_ids"])[: longest if isinstance(longest, int) else None]
            output: Any = model(input_ids=torch.tensor([ids], dtype=torch.int64, device=model_device(model)))
            states = getattr(output, "last_hidden_state", None)
            if states is None:
                raise ValueError(f"embeddings need an encoder: {type(model).__name__} returns no last_hidden_state")
            rows.append(states[0].float().mean(0).cpu())
    finally:
        model.train(was_training)
    return torch.stack(rows)


def similarity(a: Tensor, b: Tensor) -> dict[str, float | int]:
    """Compares the embeddings ``[n, width]`` of two models of the same texts, n at least 3; ``a`` is the reference.

    Returns:
        ``cosine_mean`` and ``cosine_min``: of a text's two embeddings. ``rank_correlation``: Spearman's, of the cosines of
        all ``pairs`` of texts, n (n - 1) / 2; NaN if all pairs of a model are equally similar.
    """
    own = F.cosine_similarity(a.double(), b.double(), -1)
    above = torch.triu_indices(len(a), len(a), 1, device="cpu")
    ranks = []
    for rows in (a, b):
        unit = F.normalize(rows.double(), dim=-1)
        ranks.append(_ranks((unit @ unit.mT)[above[0], above[1]]))
    return {
        "cosine_mean": own.mean().item(),
        "cosine_min": own.min().item(),
        "rank_correlation": _correlation(*ranks),
        "pairs": above.shape[1],
    }


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, float64; equal values get the mean of their ranks."""
    _, group, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    return (last.double() - (counts.double() - 1) / 2)[group]


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt().item()
    return (a @ b).item() / size if size else math.nan
