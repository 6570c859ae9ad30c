"""Tokens per second of a causal language model in `generate`: prefill and decoding."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from requanto.data import eval_text
from requanto.report._inputs import Tokenizer, model_device, token_ids


@dataclass(frozen=True)
class SpeedResult:
    """Result of `generation_speed`; medians, so that single slow steps have no effect.

    Attributes:
        prefill_tokens_per_s: prompt tokens per second, over the time until the first new token.
        decode_tokens_per_s: new tokens per second after the first: 1 / median time between two tokens.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def generation_speed(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
    max_seconds: float = 60.0,
    progress: bool = True,
) -> SpeedResult:
    """Times greedy `model.generate` on one prompt, after a warm-up run.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer; the prompt is the beginning of the text that ships with the package.
        prompt_tokens: length of the prompt.
        new_tokens: number of tokens to generate; an end token does not stop generation.
        repeats: timed runs.
        max_seconds: start no further run after this time; at least one run is timed.
        progress: show a progress bar.

    Raises:
        ValueError: a size is out of range, the text is shorter than the prompt, or the model cannot generate.
    """
    for name, value, least in (
        ("prompt_tokens", prompt_tokens, 1),
        ("new_tokens", new_tokens, 2),
        ("repeats", repeats, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not hasattr(model, "generate"):
        raise ValueError(
            f"generation_speed needs a model with a generate method, found {type(model).__name__}: "
            "load it with AutoModelForCausalLM"
        )
    prompt = _prompt(tokenizer, prompt_tokens).to(model_device(model))
    prefill: list[float] = []
    between: list[float] = []
    start = time.perf_counter()
    with tqdm(total=repeats + 1, unit="run", desc="speed", disable=not progress) as bar:
        # Two tokens are enough: they run every kernel once for many rows and once for one row.
        _timed_generate(model, prompt, new_tokens=2)
        bar.update()
        for _ in range(repeats):
            times = _timed_generate(model, prompt, new_tokens)
            prefill.append(times[1] - times[0])
            between += [later - earlier for earlier, later in pairwise(times[1:])]
            result = SpeedResult(prompt_tokens / median(prefill), 1 / median(between))
            bar.update()
            bar.set_postfix_str(
                f"prefill {result.prefill_tokens_per_s:.0f}, decode {result.decode_tokens_per_s:.1f} tok/s"
            )
            if time.perf_counter() - start > max_seconds:
                break
    return result


def _prompt(tokenizer: Tokenizer, length: int) -> Tensor:
    ids = token_ids(tokenizer, eval_text())[:length]
    if len(ids) < length:
        raise ValueError(
            f"prompt_tokens must be at most {len(ids)}, the number of tokens in the text that ships with the package, got "
            f"{length}"
        )
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


@dataclass
class _Stopwatch:
    """A streamer for `generate` that records the time of the prompt, then of every new token.

    `generate` copies each token to the CPU before it calls `put`, so the times include the device's work.
    """

    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _timed_generate(model: Any, prompt: Tensor, new_tokens: int) -> list[float]:
    watch = _Stopwatch()
    model.generate(
        input_ids=prompt,
        attention_mask=prompt.new_ones(prompt.shape),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        # A model's generation config may set these sampling options; greedy search would warn about them.
        temperature=None,
        top_k=None,
        top_p=None,
        streamer=watch,
    )
    if len(watch.times) != new_tokens + 1:
        raise ValueError(
            f"{type(model).__name__}.generate generated {len(watch.times) - 1} tokens, expected {new_tokens}: "
            "is the prompt longer than the model allows?"
        )
    return watch.times
