"""Tokens a second of a causal language model, reading and writing, as `generate` has them."""

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
    """What `generation_speed` measured: medians, so that one disturbed moment does not count.

    Attributes:
        prefill_tokens_per_s: tokens of the prompt a second, up to and with the first new token.
        decode_tokens_per_s: new tokens a second after the first: one over the median time between two.
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
    """Time greedy `model.generate` on one prompt, after a warm-up that does not count.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its tokenizer; the prompt is the beginning of the text that ships with the package.
        prompt_tokens: length of the prompt.
        new_tokens: tokens to generate: exactly so many, an end token does not stop it.
        repeats: timed runs.
        max_seconds: start no further run after this time; one is always made.
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
        # A short warm-up is enough: it runs every kernel once, for many rows and for one.
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
            f"the text that ships with the package holds {len(ids)} tokens of this tokenizer: "
            f"prompt_tokens must be at most that, got {length}"
        )
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


@dataclass
class _Stopwatch:
    """A streamer for `generate`: the time when the prompt is handed over, then the time of every new token.

    `generate` copies each token to the CPU before it calls `put`, so the clock waits for the device.
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
        # Settings of sampling that a model's own generation config may carry: greedy search warns about them.
        temperature=None,
        top_k=None,
        top_p=None,
        streamer=watch,
    )
    if len(watch.times) != new_tokens + 1:
        raise ValueError(
            f"{type(model).__name__}.generate made {len(watch.times) - 1} tokens, expected {new_tokens}: "
            "is the prompt longer than the model allows?"
        )
    return watch.times
