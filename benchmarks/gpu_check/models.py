"""Whole models of random weights: decode and prefill of a Llama of 8B's shape, a denoising step of Flux' shape.

A part of the layers is built; the time of all of them is computed from it, since layers of one shape take the same time.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flux
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from gpu_check.cases import JOINED, kind_of
from gpu_check.measure import error
from gpu_check.timing import steps_us, synchronize, time_calls
from gpu_check.weights import Place, decoded
from requanto.dtypes.qtypes import resolve_qtype
from requanto.tensor.qtensor import QTensor

Row = dict[str, Any]
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
#: Layers that are built of the 32, tokens before a decoding step, room for steps, tokens of a prompt.
BUILT, PAST, ROOM, PROMPT = 8, 512, 512, 2048
#: Steps that are timed in a row, twice.
STEPS = {"decode": 50, "prefill": 5, "step": 3}
DRY = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64,
}  # fmt: skip
#: Layers that stay float, as by default in `from_pretrained`.
FLOAT = ("image_in", "text_in", "image_out")
#: Largest error of the last layer's output against the same weights dequantized: bf16 rounds in every layer; codes of 8
#: bits round the activations in every layer as well.
BOUND = {None: 0.03, "int8": 0.15, "float8": 0.3}


class Model:
    """A float or quantized model on the device. ``error``: of its output against the same weights dequantized to floats."""

    def __init__(self, family: str, kind: str, place: Place) -> None:
        self.family, self.kind, self.place = family, kind, place
        start = time.perf_counter()
        self.whole = build(family, place.device, place.dtype)
        self.error = 0.0
        self.ids: dict[int, torch.Tensor] = {}
        if kind != "bf16":
            self.error = self._quantize()
        synchronize(place.device)
        self.seconds = time.perf_counter() - start

    @torch.inference_mode()
    def _quantize(self) -> float:
        """Quantizes the layers in place; returns the error of the output."""
        what, held = kind_of(self.kind), []
        assert what is not None
        for layer in linears(self.whole):
            group = what.group_size
            weight = QTensor.quantize(
                layer.weight, what.qtype, group_size=group, symmetric=what.symmetric, search="minmax"
            )
            layer.weight.data.copy_(decoded(weight))
            weight.activation = None if what.activation is None else resolve_qtype(what.activation)
            held.append((layer, weight))
        inputs = self._inputs(16)
        expected = None if self.place.compiling else self._output(inputs)
        for layer, weight in held:
            layer.weight = nn.Parameter(weight, requires_grad=False)
        del held, layer, weight
        gc.collect()
        requanto.prepare(self.whole, smallest=0)
        if self.kind.endswith(JOINED):
            requanto.join_layers(self.whole)
        if self.place.device == "cuda":
            torch.cuda.empty_cache()
        return 0.0 if expected is None else error(self._output(inputs), expected.double())

    def _inputs(self, tokens: int) -> tuple[torch.Tensor, ...]:
        if self.family == "flux":
            return tuple(x.to(self.place.dtype) for x in self.whole.inputs(self.place.device))
        if tokens not in self.ids:  # the same in every mode, whose outputs are compared
            self.ids[tokens] = torch.randint(0, self.whole.config.vocab_size, (1, tokens), device=self.place.device)
        return (self.ids[tokens],)

    def _output(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        found = self.whole(*inputs)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    def step(self, name: str, mode: str) -> tuple[Callable[[], torch.Tensor], Callable[[], None]]:
        """(step, restart): the call to time, which may be repeated as often as the cache has room after a restart."""
        run: Callable[..., Any] = self.whole
        if mode == "compiled":
            # On a CPU (dry runs) only the trace is checked: compiling it would take minutes.
            how = {"backend": "aot_eager"} if self.place.dry else {"mode": "reduce-overhead"}
            run = torch.compile(self.whole, fullgraph=True, **how)
        if self.family == "flux":
            inputs = self._inputs(0)
            return lambda: run(*inputs), lambda: None
        from transformers import StaticCache

        past, prompt = (4, 8) if self.place.dry else (PAST, PROMPT)
        tokens, start = (1, past) if name == "decode" else (prompt, 0)
        (ids,) = self._inputs(tokens)
        cache = StaticCache(config=self.whole.config, max_cache_len=past + ROOM if name == "decode" else prompt)

        def restart() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(start)

        def decode() -> torch.Tensor:
            return run(ids, past_key_values=cache, use_cache=True).last_hidden_state

        def prefill() -> torch.Tensor:  # the first token's place is reset on the device, as a part of the step
            restart()
            return decode()

        self.whole(
            ids[:, :1], past_key_values=cache, use_cache=True
        )  # allocates the cache's tensors, outside of a trace
        restart()
        return (decode if name == "decode" else prefill), restart


@torch.inference_mode()
def measure(model: Model, op: str) -> Row:
    """Milliseconds of one step: ``"decode eager"``, ``"prefill graph"`` ...; of a Llama also those of all 32 layers."""
    name, mode = op.split()
    place, what = model.place, kind_of(model.kind)
    row: Row = {"quantize_s": round(model.seconds, 2), "error": model.error}
    if not model.error <= BOUND[None if what is None else what.activation]:
        return row | {"fault": f"wrong: error {model.error:.3g} against the same weights as floats"}
    step, restart = model.step(name, mode)
    start = time.perf_counter()
    for _ in range(3 if mode == "compiled" else 1):  # compiles, records, replays
        found = step()
    synchronize(place.device)
    row["first_s"] = round(time.perf_counter() - start, 2)
    if place.compiling:
        return row
    if mode == "compiled":  # against eager, each with a cache of its own that is empty but for the first token
        restart()
        found = step().clone()
        row["error"] = max(row["error"], error(found, model.step(name, "eager")[0]().double()))
        if not row["error"] <= BOUND[None if what is None else what.activation]:
            return row | {"fault": f"wrong when compiled: error {row['error']:.3g} against eager"}
    restart()
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if mode == "graph":
        timing = time_calls([step], place.device)
        row |= timing.row()
    else:
        steps = 1 if place.dry else STEPS[name]
        a = steps_us(step, place.device, steps)
        restart()
        b = steps_us(step, place.device, steps)
        row |= {"us": (a + b) / 2, "spread": abs(a - b) / min(a, b), "how": mode}
    if place.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    if model.family != "flux":
        layers = model.whole.config.num_hidden_layers
        head = head_us(place, 1)
        row |= {"head_us": head, "built": layers, "all_us": row["us"] * LLAMA["num_hidden_layers"] / layers + head}
    return row


def head_us(place: Place, rows: int) -> float:
    """The head's product in bf16, which stays float: the same in every model."""
    n, k = (DRY if place.dry else LLAMA)["vocab_size"], (DRY if place.dry else LLAMA)["hidden_size"]
    weight = torch.randn(n, k, device=place.device, dtype=place.dtype)
    x = torch.randn(rows, k, device=place.device, dtype=place.dtype)
    return time_calls([partial(F.linear, x, weight)], place.device).us


def build(family: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The float model with random weights, created on the device."""
    small = device != "cuda"
    with torch.device(device):
        if family == "flux":
            shape = flux.SHAPES["flux-tiny"] if small else replace(flux.SHAPES["flux"], double=4, single=8)
            model: nn.Module = flux.FluxShaped(shape).to(dtype)
        else:
            from transformers import AutoModel, LlamaConfig

            shape = DRY if small else LLAMA | {"num_hidden_layers": BUILT}
            model = AutoModel.from_config(LlamaConfig(**shape), dtype=dtype)
    return model.eval().requires_grad_(False)


def linears(model: nn.Module) -> list[nn.Linear]:
    """The layers to quantize."""
    return [
        child
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and name not in FLOAT
    ]
