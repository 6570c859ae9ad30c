"""Helpers of the measurements: a model's device, and text as token ids."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# A Transformers tokenizer, or any callable with the same interface.
Tokenizer = Callable[..., Any]


def model_device(model: nn.Module) -> torch.device:
    """Returns the device for inputs: that of the first parameter, also if layers are on several devices."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the token ids of `text` without special tokens."""
    # verbose=False: no warning that the text is longer than the model allows; it is split into windows later.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def start_token(tokenizer: Tokenizer) -> list[int]:
    """Returns [BOS token] if the tokenizer puts it before every text, else []; some models fail without it."""
    bos = getattr(tokenizer, "bos_token_id", None)
    starts_with_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return [bos] if starts_with_bos else []
