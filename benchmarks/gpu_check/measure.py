"""Checks a product against float64 on fresh random inputs, and only then times it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from gpu_check import peers
from gpu_check.cases import KINDS
from gpu_check.products import PRODUCTS, Product
from gpu_check.timing import host_us, poisoned, synchronize, time_calls, time_cold
from gpu_check.weights import Place, Weights

Row = dict[str, Any]
#: Largest relative error in the Frobenius norm: one rounding of each weight and one of the result.
BOUND = {torch.bfloat16: 1e-2, torch.float16: 4e-3}
#: A smaller error of a peer is that of floats: rounding the weight to 8 bits alone costs 0.006.
PEER_LEAST = 0.004
#: Largest error of a peer, which quantizes the float weight itself, by what its operation's name begins with.
PEER_BOUND = {"int4": 0.25, "nf4": 0.25, "int8": 0.05, "float8": 0.1, "int4 x int8": 0.25}


class Measurer:
    """Runs cases one after the other; keeps the weight of the last one, which the next one mostly shares."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.kept: dict[str, tuple[Any, Any]] = {}

    def keep(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """What was made last for this key; something else of that name is dropped before, since two may not fit."""
        found = self.kept.get(name)
        if found is None or found[0] != key:
            self.kept.pop(name, None)
            del found
            self.kept[name] = (key, make())
        return self.kept[name][1]

    def weights(self, kind: str, n: int, k: int) -> Weights:
        """The weight of a kind; it stays until another is asked for. The dense one is kept beside it."""
        role = "dense" if kind == "bf16" else "weight"
        return self.keep(role, (kind, n, k), lambda: Weights(kind, n, k, self.place))

    def fresh(self, m: int, k: int) -> torch.Tensor:
        """New random rows; never the ones of an earlier check."""
        return torch.randn(m, k, device=self.place.device, dtype=torch.float32).to(self.place.dtype)

    # ------------------------------------------------------------------ cases

    def product(self, case: Row) -> Row:
        """One of Requanto's products, or the vendor's of the same codes."""
        n, k, m = case["n"], case["k"], case["m"]
        weights = self.weights(case["kind"], n, k)
        product = PRODUCTS[case["op"]](weights, m, case.get("config", {}))
        x = product.prepare(self.fresh(m, k))
        if self.place.compiling:
            return self._compiled(lambda: product.call(x, 0))
        row = dict(product.note or {})
        row |= check(
            weights, product, [self.fresh(m, k) for _ in range(1 if self.place.dry else 2)], BOUND[self.place.dtype]
        )
        if "fault" in row:
            return row
        last = self.fresh(m, k)
        x = product.prepare(last)
        calls = [partial(product.call, x, i) for i in range(len(weights.layers))]
        timing = time_calls(calls, self.place.device, may_fail=True)
        if product.check is None:  # also what the replayed graph wrote
            found = error(timing.first, (product.expected or weights.expected)(last))
            row["error"] = max(row["error"], found)
            if not found <= BOUND[self.place.dtype]:
                return row | {"fault": f"wrong in a replayed graph: error {found:.3g}"}
        moved = product.times * (weights.bytes + product.extra + 2 * m * (n + k))
        work = {"bytes": moved, "flops": product.times * 2 * m * n * k, "factor": KINDS[case["kind"]].factor}
        if case["op"] == "quantize x":
            work = {"bytes": 3 * m * k}
        return row | timing.row() | work | {"bf16_us": product.times * self.bf16_us(n, k, m)}

    def bf16_us(self, n: int, k: int, m: int) -> float:
        """The same product by the vendor's library in bf16, in this process."""

        def measured() -> float:
            layers = self.weights("bf16", n, k).layers
            x = self.fresh(m, k)
            calls = [partial(F.linear, x, one.weight) for one in layers]
            return time_calls(calls, self.place.device).us

        known = self.keep("bf16 times", (n, k), dict)
        if m not in known:
            known[m] = measured()
        return known[m]

    def host(self, case: Row) -> Row:
        """CPU time of one eager call of a layer."""
        layer = self.weights(case["kind"], case["n"], case["k"]).layers[0]
        x = self.fresh(case["m"], case["k"])
        if self.place.compiling:
            return self._compiled(lambda: layer(x))
        return {"us": host_us(lambda: layer(x), self.place.device, 1 if self.place.dry else 200), "how": "host"}

    def peer(self, case: Row) -> Row:
        """A peer's layer of the same float weight."""
        n, k, m, name = case["n"], case["k"], case["m"], case["family"]
        why = peers.missing(name)
        if why:
            return {"fault": f"not compared: {why}"}
        dense = self.weights("bf16", n, k)
        made = self.keep("peer", (name, n, k), lambda: peers.ops(name, n, k, self.place.device, dense.dense))
        call = made[case["op"]]
        if self.place.compiling:
            return self._compiled(lambda: call(self.fresh(m, k)))
        product = Product(lambda x, i: call(x))
        longest = max((start for start in PEER_BOUND if case["op"].startswith(start)), key=len)
        row = check(dense, product, [self.fresh(m, k)], PEER_BOUND[longest], poison=False)
        if "fault" in row:
            return row
        if row["error"] < PEER_LEAST:
            return row | {"fault": f"error {row['error']:.2g} is that of floats: it has not quantized the weight"}
        x, place = self.fresh(m, k), self.place
        if n * k < 3 * place.l2:  # there is one weight only, and it may stay in the cache
            buffer = self.keep("buffer", 0, lambda: torch.ones(place.l2 // 2, device=place.device, dtype=torch.int32))
            timing = time_cold(lambda: call(x), place.device, buffer)
        else:
            timing = time_calls([lambda: call(x)], place.device, may_fail=True)
        row |= {"version": peers.version(name), "flops": 2 * m * n * k, "bf16_us": self.bf16_us(n, k, m)}
        return row | timing.row()

    def _compiled(self, call: Callable[[], object]) -> Row:
        start = time.perf_counter()
        call()
        synchronize(self.place.device)
        return {"seconds": time.perf_counter() - start}


def check(weights: Weights, product: Product, inputs: list[torch.Tensor], bound: float, poison: bool = True) -> Row:
    """The relative error on each input, the worst of them, and a fault if it is too large or changes between two calls."""
    call, expected = product.check or product.call, product.expected or weights.expected
    worst, moves = 0.0, False
    for x in inputs:
        given = product.prepare(x)
        if poison:
            with poisoned():
                y, again = call(given, 0), call(given, 0)
        else:
            y, again = call(given, 0), None
        worst = max(worst, error(y, expected(x)))
        moves = moves or (again is not None and not torch.equal(y, again))
    row: Row = {"error": worst}
    if not worst <= bound:
        return row | {"fault": f"wrong: error {worst:.3g}, at most {bound} is right"}
    return row | ({"fault": "two calls with the same input give different bits"} if moves else {})


def error(found: Any, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN, infinities and wrong shapes count as infinite."""
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return float("inf")
    gap = ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return gap if gap == gap else float("inf")
