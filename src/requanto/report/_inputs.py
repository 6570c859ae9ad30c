"""What the measurements share: where a model is, and text as token ids."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# A Transformers tokenizer, or anything that is called like one.
Tokenizer = Callable[..., Any]


def model_device(model: nn.Module) -> torch.device:
    """The device that inputs belong on: the first parameter's, also when the layers are spread over several."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` as token ids, without the special tokens that a tokenizer puts around it."""
    # verbose=False: the text is cut into windows later, so a warning that it is longer than the model would mislead.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def start_token(tokenizer: Tokenizer) -> list[int]:
    """The one token that this tokenizer puts before every text, if it does: some models are lost without it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    starts_with_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return [bos] if starts_with_bos else []
