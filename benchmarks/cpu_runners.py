"""Models whose prefill and decoding benchmarks/cpu_models.py times one call at a time, alternating with others."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

PROMPTS = (32, 512)
#: Whether each timed step runs before all other programs on the machine (Linux, as root).
realtime = False


@contextlib.contextmanager
def undisturbed(process: int = 0) -> Iterator[None]:
    """With `realtime`, all threads of a process (0: this one) run before other programs meanwhile.

    Two threads that wait for one another lose several times what another program takes from one of them.
    """

    def schedule(policy: int, priority: int) -> None:
        for thread in os.listdir(f"/proc/{process or 'self'}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    if not realtime:
        yield
        return
    schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


def load(directory: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, float]:
    """Loads a model; returns it and the seconds this took."""
    start = time.perf_counter()
    options = {} if config is None else {"quantization_config": config}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device_map="cpu", **options).eval()
    return model, time.perf_counter() - start


def resident() -> int:
    """Bytes of memory that this process has, after giving back what is free; 0 where this cannot be told."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Runner:
    """A model whose prefill and decoding are timed one call at a time."""

    def __init__(self, model: Any, seconds: float) -> None:
        self.model, self.seconds = model, seconds
        self.times: dict[str, list[float]] = {}
        self.state: Any = None
        self.first = 0.0
        self.bytes, self.resident = model.get_memory_footprint(), resident()

    @torch.inference_mode()
    def start(self) -> None:
        """The first forward, which may pack weights and load kernels, against the second."""
        taken = []
        for _ in range(2):
            begin = time.perf_counter()
            self.model(torch.zeros(1, 8, dtype=torch.int64, device="cpu"), use_cache=False)
            taken.append(time.perf_counter() - begin)
        self.first = taken[0] - taken[1]

    def _timed(self, name: str, keep: bool, ids: torch.Tensor, cache: Any) -> Any:
        with undisturbed():
            start = time.perf_counter()
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
        if keep:
            self.times.setdefault(name, []).append(seconds)
        return out

    def about(self, plain_bytes: int) -> dict[str, float]:
        """Seconds of loading and what the first forward adds, memory before and after, in bytes and relative to bf16."""
        self.state = None
        after = self.model.get_memory_footprint()
        return {
            "load_s": self.seconds,
            "first_forward_s": self.first,
            "stored_bytes": self.bytes,
            "bytes_after": after,
            "process_grew_bytes": resident() - self.resident,
            "size_vs_bf16": after / plain_bytes,
        }

    def close(self) -> None:
        self.model = self.state = None

    def prefill(self, ids: torch.Tensor, keep: bool) -> None:
        self.state = self._timed(str(ids.shape[1]), keep, ids, None)

    def decode(self, keep: bool) -> None:
        token = self.state.logits[:, -1:].argmax(-1)
        self.state = self._timed("decode", keep, token, self.state.past_key_values)


@torch.inference_mode()
def rounds(runners: dict[str, Any], vocabulary: int, new: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of times and of ratios to bf16 by runner, over ``repeats`` rounds after one warm-up round."""
    for repeat in range(repeats + 1):
        for prompt in PROMPTS:
            ids = torch.randint(0, vocabulary, (1, prompt))
            for runner in runners.values():
                runner.prefill(ids, keep=repeat > 0)
            for _ in range(new if repeat else 2):
                for runner in runners.values():
                    runner.decode(keep=repeat > 0)
            for runner in runners.values():
                runner.state = None
    base = runners["bf16"].times
    return {
        name: {
            what: {
                "seconds": median(taken),
                "ratio": median(b / t for b, t in zip(base[what], taken)),
                "tokens_per_second": (1 if what == "decode" else int(what)) / median(taken),
            }
            for what, taken in runner.times.items()
        }
        for name, runner in runners.items()
    }
