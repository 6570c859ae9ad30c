"""Samples for methods that calibrate: the inputs of a yardstick's model, from material that is not measured."""

from __future__ import annotations

import torch
from torch import Tensor

from yardsticks import images
from yardsticks.makers import MAKERS
from yardsticks.reactions import masked_reactions
from yardsticks.texts import TEXTS


def samples(name: str, count: int = 32, length: int = 256) -> list[dict[str, Tensor]]:
    """Keyword arguments of calls of the model.

    Language models get fiction (`calibration`), `reactions` other reactions than the measured ones, and the classifiers the
    digits that they were trained on.

    Args:
        name: of a model in `makers.MAKERS`, without `digits` and `minilm`.
        count: samples; of a classifier, four times as many images.
        length: tokens of a sample of a language model.
    """
    if name == "reactions":
        inputs = masked_reactions(MAKERS[name](), 4 * count, seed=1)[0]
        return [{"input_ids": ids, "attention_mask": (ids != 0).long()} for ids in inputs.split(4)]
    if name in ("vision", "convolutional"):
        found = images.pixels(images.digits()[0][: 4 * count], 8 if name == "vision" else 32)
        return [{"pixel_values": pixels} for pixels in found.split(4)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MAKERS[name]())
    prefix = tokenizer("")["input_ids"]
    size = length - len(prefix)
    ids = tokenizer(TEXTS["calibration"](), add_special_tokens=False, verbose=False)["input_ids"]
    step = (len(ids) - size) // count
    return [{"input_ids": torch.tensor([prefix + ids[i * step : i * step + size]])} for i in range(count)]
