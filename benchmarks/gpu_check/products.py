"""The products that are checked and timed: each function takes a weight and gives a call of (x, number of the copy)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import requanto_kernels as rk
from gpu_check.weights import Weights, shipped_config
from requanto.linear.api import linear
from requanto.linear.joint import linear_many
from requanto.linear.registry import choose, problem_of
from requanto_kernels import forms

#: f(x, copy) -> y
Call = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Product:
    """call: the product. prepare: what x becomes before the clock runs (codes of 8 bits, for GEMMs of codes alone).

    check: what is compared with ``expected(x)``, where that is not the call itself; expected: by default ``x @ W^T``.
    extra: bytes that are moved in addition to the weight, x and y. times: such products in one call. note: columns for
    the row.
    """

    call: Call
    prepare: Callable[[torch.Tensor], Any] = lambda x: x
    check: Call | None = None
    expected: Callable[[torch.Tensor], torch.Tensor] | None = None
    extra: int = 0
    times: int = 1
    note: dict[str, Any] | None = None


def layer(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """`nn.Linear` with the quantized weight, as a user calls it."""
    made = weights.layers
    note = {}
    if weights.what is not None:
        problem = problem_of(made[0].weight, weights.place.dtype, m, made[0].weight.activation)
        note = {"implementation": choose(problem).implementation.name, "layout": made[0].weight.layout_name}
    return Product(lambda x, i: made[i](x), note=note)


def wq_gemm(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """The fused kernel with a given tile."""
    changes = dict(config)
    scale = changes.pop("scale", None)
    chosen, raw = with_changes(shipped_config(weights, "wq_gemm", m), changes), weights.raw

    def call(x: torch.Tensor, i: int) -> torch.Tensor:
        with scales_applied(scale):
            return rk.wq_gemm(x, **raw[i], config=chosen)

    return Product(call, note={"tile": str(chosen)})


@contextlib.contextmanager
def scales_applied(where: str | None) -> Iterator[None]:
    """Makes `wq_gemm` apply scales to the weights ("before" the dot) or to sums ("after"), whatever it would choose."""
    if where is None:
        yield
        return
    kept = forms.MOST_RESULTS, forms.MOST_COLUMNS
    forms.MOST_RESULTS = forms.MOST_COLUMNS = {"before": 0, "after": 1 << 20}[where]
    try:
        yield
    finally:
        forms.MOST_RESULTS, forms.MOST_COLUMNS = kept


def fused(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """The fused kernel as it ships, for any number of rows."""
    raw = weights.raw
    return Product(lambda x, i: rk.wq_gemm(x, **raw[i]))


def dequantize(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """The whole weight into a scratch buffer, then cuBLAS."""
    raw, place = weights.raw, weights.place
    scratch = torch.empty(weights.n, weights.k, device=place.device, dtype=place.dtype)

    def call(x: torch.Tensor, i: int) -> torch.Tensor:
        return F.linear(x, rk.wq_dequant(**raw[i], k=weights.k, dtype=x.dtype, out=scratch))

    return Product(call, extra=2 * scratch.numel() * scratch.element_size())


def quantize_x(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """Only the quantization of x, one scale a row."""
    kind = _codes_dtype(weights)

    def values(x: torch.Tensor, i: int) -> torch.Tensor:
        codes, scales = rk.quant_rows(x, kind)
        return codes.float() * scales.reshape(-1, 1)

    return Product(lambda x, i: rk.quant_rows(x, kind)[0], check=values, expected=weights.seen)


def codes(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """Our GEMM of 8-bit codes, x quantized before."""
    chosen = with_changes(shipped_config(weights, "scaled_mm", m), config)
    made, out = weights.raw, weights.place.dtype

    def call(x: tuple[torch.Tensor, torch.Tensor], i: int) -> torch.Tensor:
        return rk.scaled_mm(x[0], made[i]["qdata"], x[1], made[i]["scale"], out_dtype=out, config=chosen)

    return Product(call, prepare=partial(rk.quant_rows, dtype=_codes_dtype(weights)), note={"tile": str(chosen)})


def vendor_codes(weights: Weights, m: int, config: dict[str, Any], fast: bool = False) -> Product:
    """cuBLAS or CUTLASS, as torch calls them, x quantized before."""
    multiply = _vendor(weights, fast)
    return Product(multiply, prepare=partial(rk.quant_rows, dtype=_codes_dtype(weights)))


def vendor(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """Our quantization of x, then the vendor's GEMM."""
    multiply, kind = _vendor(weights, False), _codes_dtype(weights)
    return Product(lambda x, i: multiply(rk.quant_rows(x, kind), i))


def _vendor(weights: Weights, fast: bool) -> Callable[[tuple[torch.Tensor, torch.Tensor], int], torch.Tensor]:
    made, out = weights.raw, weights.place.dtype
    scales = [one["scale"].float().reshape(1, -1) for one in made]

    def float8(x: tuple[torch.Tensor, torch.Tensor], i: int) -> torch.Tensor:
        return torch._scaled_mm(
            x[0], made[i]["qdata"].t(), x[1].reshape(-1, 1), scales[i], out_dtype=out, use_fast_accum=fast
        )

    def int8(x: tuple[torch.Tensor, torch.Tensor], i: int) -> torch.Tensor:
        return rk.int_mm(x[0], made[i]["qdata"], x[1], made[i]["scale"], out_dtype=out)

    return int8 if _codes_dtype(weights) == torch.int8 else float8


def _codes_dtype(weights: Weights) -> torch.dtype:
    assert weights.what is not None
    return torch.int8 if weights.what.activation == "int8" else torch.float8_e4m3fn


def with_changes(config: rk.Config, changes: dict[str, Any]) -> rk.Config:
    """The config with some fields changed; "other" inverts a yes-or-no field."""
    return replace(config, **{k: (not getattr(config, k)) if v == "other" else v for k, v in changes.items()})


def together(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """Two weights that read one x, by one launch."""
    return _of_two(weights, linear_many)


def apart(weights: Weights, m: int, config: dict[str, Any]) -> Product:
    """The same two, one after the other."""
    return _of_two(weights, lambda x, pair: [linear(x, one) for one in pair])


def _of_two(weights: Weights, multiply: Callable[[torch.Tensor, list[Any]], list[torch.Tensor]]) -> Product:
    made = [layer.weight for layer in weights.layers]
    pairs = [[one, made[(i + 1) % len(made)]] for i, one in enumerate(made)]

    def joined(x: torch.Tensor, i: int) -> torch.Tensor:
        return torch.cat(multiply(x, pairs[i]), dim=1)

    def expected(x: torch.Tensor) -> torch.Tensor:
        return weights.expected(x).repeat(1, 2)

    return Product(lambda x, i: multiply(x, pairs[i])[0], check=joined, expected=expected, times=2)


#: By the name of a case's `op`.
PRODUCTS: dict[str, Callable[[Weights, int, dict[str, Any]], Product]] = {
    "layer": layer,
    "wq_gemm": wq_gemm,
    "fused": fused,
    "dequantize": dequantize,
    "quantize x": quantize_x,
    "codes": codes,
    "vendor codes": vendor_codes,
    "vendor codes, fast sums": partial(vendor_codes, fast=True),
    "vendor": vendor,
    "together": together,
    "apart": apart,
}
