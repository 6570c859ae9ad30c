"""Quantized KV caches: accuracy over a long context, bytes, and the time of a step, beside float and Transformers' own.

    python benchmarks/kv_cache.py
    python benchmarks/kv_cache.py --model DIRECTORY --name "a held-out model" --output benchmarks/results/other.json

A text is read in chunks of a few tokens. A token's own chunk is float in every cache, so what is compared are
predictions made from an old, quantized context. The figures are of the tokens after the first quarter: perplexity, mean
KL divergence from the model with a float cache, and how often both choose the same token. "float, other chunks" is the
float cache with chunks of another size: what rounding in the model's dtype alone does. The default dtype is float32, since
bfloat16 alone changes perplexity by a quarter of a percent. Bytes are those of the whole cache at the end, window and
scales included, divided by those of a float cache. Decode: median time of one step of one token after a longer text, where
the caches take turns. Bytes and times depend on the dtype: they are measured once more in bfloat16 (--decode-dtype).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import RESULTS, write

import requanto
from requanto.data import calibration_text, eval_text

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

OURS: dict[str, dict[str, Any]] = {
    "int8": {"keys": "int8", "values": "int8"},
    "float8": {"keys": "float8", "values": "float8"},
    "int8 keys, int4 values": {"keys": "int8", "values": "int4"},
    "int4": {"keys": "int4", "values": "int4"},
    "int2": {"keys": "int2", "values": "int2"},
}


def candidates(model: Any, names: list[str] | None) -> dict[str, Callable[[], Any]]:
    """Makers of empty caches by name."""
    from transformers import DynamicCache, cache_utils

    config = model.config
    found: dict[str, Callable[[], Any]] = {"float": lambda: DynamicCache(config=config)}
    for name, options in OURS.items():
        found[f"requanto {name}"] = lambda options=options: requanto.QuantizedCache(config, **options)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    # Their classes, not `QuantizedCache(backend=...)`, which has Requanto's layers here. They need full attention.
    if kinds == {cache_utils.DynamicLayer}:
        count = len(DynamicCache(config=config).layers)
        backends = {
            "quanto": ("QuantoQuantizedLayer", (4, 2), {}),
            "hqq": ("HQQQuantizedLayer", (8, 4, 2), {"axis_key": 1, "axis_value": 1}),
        }
        for backend, (layer, widths, more) in backends.items():
            kind = getattr(cache_utils, layer)
            for bits in widths:
                try:
                    kind(nbits=bits, **more)
                except ImportError as error:
                    print(f"left out: Transformers' {backend} ({str(error).splitlines()[0]})")
                    break
                found[f"transformers {backend} int{bits}"] = lambda kind=kind, bits=bits, more=more: cache_utils.Cache(
                    layers=[kind(nbits=bits, **more) for _ in range(count)]
                )
        if hasattr(cache_utils, "Fp8QuantizedLayer"):
            kind = cache_utils.Fp8QuantizedLayer
            found["transformers fp8"] = lambda: cache_utils.Cache(layers=[kind() for _ in range(count)])
    return {name: make for name, make in found.items() if names is None or name in ("float", *names)}


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache holds, those inside quantized tensors included."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    seen: dict[tuple[int, int], int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if type(value) is not torch.Tensor and hasattr(value, "__tensor_flatten__"):
                for name in value.__tensor_flatten__()[0]:
                    visit(getattr(value, name))
            else:
                seen[value.data_ptr(), value.nbytes] = value.nbytes
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)

    for layer in cache.layers:
        visit({name: value for name, value in vars(layer).items() if "sliding" not in name})
    return sum(seen.values())


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, cache: Any, chunk: int, start: int) -> torch.Tensor:
    """Log-probabilities ``[tokens - start, vocabulary]`` in float32, of a text read in chunks."""
    rows = []
    for first in range(0, ids.shape[1] - 1, chunk):
        part = ids[:, first : min(first + chunk, ids.shape[1] - 1)]
        logits = model(part, past_key_values=cache, use_cache=True).logits[0]
        skip = max(0, start - first)
        if skip < part.shape[1]:
            rows.append(torch.log_softmax(logits[skip:].float(), -1))
    return torch.cat(rows)


def accuracy(found: torch.Tensor, reference: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Perplexity, KL divergence from the reference in nats, and share of equal choices."""
    nll = -found.gather(1, targets[:, None]).mean()
    kl = torch.nn.functional.kl_div(found, reference, reduction="batchmean", log_target=True)
    same = (found.argmax(-1) == reference.argmax(-1)).float().mean()
    return {"perplexity": math.exp(float(nll)), "kl": float(kl), "same_choice": float(same)}


@torch.inference_mode()
def decode(
    model: Any, makers: dict[str, Callable[[], Any]], ids: torch.Tensor, steps: int
) -> dict[str, dict[str, float]]:
    """Bytes after a prompt, and median milliseconds of a step of one token, in which the caches take turns."""
    caches = {name: make() for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for cache in caches.values():
        for part in ids[:, :-1].split(256, 1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    used = {name: cache_bytes(cache) for name, cache in caches.items()}
    for _ in range(steps + 2):
        for name, cache in caches.items():
            begin = time.perf_counter()
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
            times[name].append(1000 * (time.perf_counter() - begin))
    return {
        name: {"bytes": used[name], "bytes_ratio": used[name] / used["float"], "decode_ms": median(times[name][2:])}
        for name in caches
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a directory of a causal language model; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--name", help="the model's name in the results")
    parser.add_argument("--text", default="eval", help="eval, fiction, or a text file")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens that are predicted")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--decode-tokens", type=int, default=2048, help="tokens in the cache for bytes and times")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each cache; 0: no bytes and times")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--decode-dtype", default="bfloat16")
    parser.add_argument("--caches", nargs="*", help="only these, by name")
    parser.add_argument("--output", type=Path, default=RESULTS / "kv_cache.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*past_key_values.*deprecated")  # its new name is not in all versions

    from real_models import smollm2_dir
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = arguments.model or smollm2_dir()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = {"eval": eval_text, "fiction": calibration_text}
    text = texts[arguments.text]() if arguments.text in texts else Path(arguments.text).read_text()
    every = tokenizer(text, return_tensors="pt").input_ids
    ids, prompt = every[:, : arguments.tokens + 1], every[:, : arguments.decode_tokens + 1]
    start = arguments.tokens // 4
    targets = ids[0, start + 1 :]
    makers = candidates(model, arguments.caches)

    rows: dict[str, dict[str, float]] = {}
    reference = None
    for name, make in makers.items():
        found = read(model, ids, make(), arguments.chunk, start)
        reference = found if reference is None else reference
        rows[name] = accuracy(found, reference, targets)
        rows[name]["perplexity_ratio"] = rows[name]["perplexity"] / rows["float"]["perplexity"]
        print(name, {key: round(value, 5) for key, value in rows[name].items()}, flush=True)
        if name == "float":
            other = read(model, ids, make(), 2 * arguments.chunk, start)
            rows["float, other chunks"] = accuracy(other, reference, targets)
            print("float, other chunks", rows["float, other chunks"], flush=True)
    if arguments.steps:
        model = model.to(getattr(torch, arguments.decode_dtype))
        for name, row in decode(model, makers, prompt, arguments.steps).items():
            rows[name] |= row
            print(name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    write(
        arguments.output,
        {
            "model": arguments.name or (Path(directory).name if arguments.model else "SmolLM2-135M-Instruct"),
            "text": Path(arguments.text).name,
            "tokens": ids.shape[1] - 1,
            "judged_from": start,
            "chunk": arguments.chunk,
            "dtype": arguments.dtype,
            "decode_tokens": prompt.shape[1] - 1,
            "decode_dtype": arguments.decode_dtype,
            "caches": rows,
        },
    )


if __name__ == "__main__":
    main()
