"""Calibration samples: a list of inputs, or a function that runs the model (or the pipeline it is part of)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


class Stop(Exception):
    """Raised by a hook to end a forward pass whose remaining part is not needed."""


class Samples:
    """Calibration samples.

    Args:
        calibration: an iterable of inputs (a tensor, a tuple of positional or a dict of keyword arguments), or a function
            ``f(model)`` that runs the model any number of times. A single tensor or dict is one sample; other `Samples` are
            copied.

    Raises:
        ValueError: there are no samples, or they are text.
        TypeError: any other type.
    """

    def __init__(self, calibration: Any) -> None:
        self.function: Callable[[nn.Module], Any] | None = None
        self.inputs: list[tuple[tuple, dict[str, Any]]] = []
        if isinstance(calibration, Samples):
            self.function, self.inputs = calibration.function, calibration.inputs
            return
        if isinstance(calibration, (torch.Tensor, Mapping)):
            calibration = [calibration]
        if isinstance(calibration, str):
            raise ValueError(_TEXT)
        if isinstance(calibration, Iterable):
            self.inputs = [_arguments(sample) for sample in calibration]
            if not self.inputs:
                raise ValueError("calibration holds no samples; give at least one input of the model (128 are usual)")
        elif callable(calibration):
            self.function = calibration
        else:
            raise TypeError(
                f"calibration must be an iterable of model inputs or a function f(model) that runs it, found "
                f"{type(calibration).__name__}"
            )

    def few(self, most: int) -> Samples:
        """Returns at most so many of the samples, evenly spaced; a function stays as it is."""
        found = Samples(self)
        count = len(self.inputs)
        if count > most:
            found.inputs = [self.inputs[round(i * (count - 1) / max(1, most - 1))] for i in range(most)]
        return found

    def run(self, model: nn.Module, stop: Callable[[], bool] | None = None) -> Iterator[None]:
        """Runs the model on all samples; yields after each sample (a function is one sample).

        Hooks may raise :class:`Stop` to end a pass early if :attr:`may_stop`.
        """
        with no_cache(model), torch.no_grad():
            if self.function is not None:
                self.function(model)
                yield
                return
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            for args, kwargs in self.inputs:
                args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
                with contextlib.suppress(Stop):
                    model(*args, **kwargs)
                yield

    @property
    def may_stop(self) -> bool:
        """Whether a hook may raise :class:`Stop`: not with a function, which may use the model's output."""
        return self.function is None

    def fingerprint(self) -> str:
        """Returns a hash of all inputs, or of a function's name."""
        digest = hashlib.sha256()
        if self.function is not None:
            digest.update(getattr(self.function, "__qualname__", type(self.function).__qualname__).encode())
        for leaf in pytree.tree_leaves(self.inputs):
            digest.update(tensor_bytes(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
        return digest.hexdigest()


_TEXT = (
    "calibration is text, but models take tokens. Pass [tokenizer(text, return_tensors='pt'), ...], or split a long text "
    "with requanto.methods.text_samples(tokenizer, text, samples=128, length=512)"
)


def _arguments(sample: Any) -> tuple[tuple, dict[str, Any]]:
    if isinstance(sample, str):
        raise ValueError(_TEXT)
    if isinstance(sample, Mapping):
        return (), {str(key): value for key, value in sample.items()}
    if isinstance(sample, (tuple, list)):
        return tuple(sample), {}
    if isinstance(sample, torch.Tensor):
        return (sample,), {}
    raise TypeError(
        f"a calibration sample must be a tensor, a tuple of arguments or a dict of keyword arguments, found "
        f"{type(sample).__name__}"
    )


def text_samples(tokenizer: Any, text: str, samples: int = 128, length: int = 512) -> list[torch.Tensor]:
    """Returns ``samples`` evenly spaced pieces ``[1, length]`` of a text's tokens, each with the tokenizer's special tokens.

    Pieces overlap if the text is shorter than ``samples * length`` tokens.

    Raises:
        ValueError: the text has fewer tokens than one piece.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole, bare = (list(tokenizer("a", add_special_tokens=flag)["input_ids"]) for flag in (True, False))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    prefix, suffix = whole[:at], whole[at + len(bare) :]
    body = length - len(prefix) - len(suffix)
    if samples < 1 or body < 1:
        raise ValueError(f"samples and length must be positive, found {samples} and {length}")
    if len(ids) < body:
        raise ValueError(
            f"the calibration text has {len(ids)} tokens, one sample needs {body}: give a longer text or a smaller length"
        )
    last = len(ids) - body
    starts = [round(i * last / max(1, samples - 1)) for i in range(samples)]
    return [
        torch.tensor([prefix + ids[start : start + body] + suffix], dtype=torch.int64, device="cpu") for start in starts
    ]


@contextlib.contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Turns off the KV cache of language models inside the block: a block that runs twice would append to it twice."""
    changed = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True and not any(config is c for c in changed):
            config.use_cache = False
            changed.append(config)
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Returns the values of a tensor as bytes, for hashing."""
    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()
