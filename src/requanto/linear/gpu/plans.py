"""Cached plans of the GPU implementations: one call is recorded, then its launches are repeated (`requanto_kernels._plan`).

So a call costs the search for the plan, the allocation of its result and the start of the kernels; arguments are checked and
tiles selected once for a layer and a shape of x. A plan knows addresses of the weight's tensors: the weight's storage drops
it when it gets other tensors, while values that are changed in place are read as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from requanto.linear.gpu.layout import ExpandedScales, KernelParts, capturing, kernel_parts, pin
from requanto.linear.registry import Gemm
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Most plans of one layer and shape of x: one for each stride and alignment of x and of the bias.
_MOST = 16

#: ``run(x, parts, bias, *others) -> y`` by launchers of `requanto_kernels`, from a weight's `KernelParts`. y has x's shape
#: without the last axis, plus N, or is one of the others.
Run = Callable[..., torch.Tensor]


class _Cached(NamedTuple):
    """A plan, or None if the call cannot be repeated, with what a captured graph or a change of a weight concerns."""

    plan: Any
    codes: tuple[torch.Tensor, ...]
    expanded: tuple[ExpandedScales, ...]

    def holds(self) -> bool:
        """False if the call has to be recorded anew."""
        return self.plan is None or self.plan.holds()

    def is_ready(self) -> bool:
        """True if the plan can run now; renews expanded scales, and marks what a graph reads that captures the call."""
        if self.plan is None:
            return False
        captured = capturing(self.codes[0].device)
        if captured:
            # Renewed values would count as present, but be computed only when the graph runs.
            if not all(expanded.is_current() for expanded in self.expanded):
                return False
            for codes in self.codes:
                pin(codes)
        for expanded in self.expanded:
            if captured:
                expanded.is_read_by_graph = True
            elif not expanded.is_current():
                expanded.renew()
        return True


class Recorder:
    """Plans of one call, for each kind of its inputs. It does not reference weights, whose storage owns it."""

    __slots__ = ("_plans", "_traits")

    def __init__(self) -> None:
        from requanto_kernels._plan import traits

        self._traits = traits
        self._plans: dict[tuple, _Cached] = {}

    def record(
        self,
        key: tuple,
        run: Callable[[], Any],
        inputs: dict[str, torch.Tensor | None],
        parts: Sequence[KernelParts],
        name: str,
    ) -> Any:
        """The result of a call; its plan is kept under ``key``.

        Args:
            run: the call.
            inputs: the tensors that another call has others of.
            parts: of the weights that it reads.
            name: the weight's, for the log.
        """
        from requanto_kernels._plan import record

        with record(**inputs, constants=[tensor for one in parts for tensor in one.tensors]) as recording:
            out = run()
        expanded = tuple(one.expanded for one in parts if one.expanded is not None)
        if not all(one.is_cached for one in expanded):
            return out  # in a capture, or of inference tensors
        plan = recording.plan(out)
        if plan is None:
            logger.info("%s no cached plan: %s", name, recording.problem)
        if len(self._plans) >= _MOST:
            self._plans.clear()
        self._plans[key] = _Cached(plan, tuple(one.codes for one in parts), expanded)
        return out


def recorded(run: Run, dtype: torch.dtype) -> Gemm:
    """A GEMM that records ``run`` at the first call for each kind of x, and repeats its launches from then on.

    Args:
        dtype: dtype of x.
    """
    return _Recorded(run, dtype)


class _Recorded(Recorder):
    """See `recorded`."""

    __slots__ = ("_dtype", "_run")

    def __init__(self, run: Run, dtype: torch.dtype) -> None:
        super().__init__()
        self._run, self._dtype = run, dtype

    def __call__(
        self, x: torch.Tensor | None, weight: QTensor, bias: torch.Tensor | None, *others: torch.Tensor
    ) -> torch.Tensor:
        traits = self._traits
        key = (traits(x), traits(bias), *map(traits, others))
        found = self._plans.get(key)
        if found is not None and found.holds():
            if found.is_ready():
                return found.plan(x, bias, *others)
            return self._run(x, kernel_parts(weight, self._dtype), bias, *others)
        parts = kernel_parts(weight, self._dtype)
        inputs = {"x": x, "bias": bias} | {f"input{i}": other for i, other in enumerate(others)}
        name = f"{weight._storage.name or 'a weight'} of shape {tuple(weight.shape)} has"
        return self.record(key, lambda: self._run(x, parts, bias, *others), inputs, [parts], name)


def with_bias_added(gemm: Gemm) -> Gemm:
    """The GEMM of kernels that add no bias."""

    def added(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = gemm(x, weight, None)
        return out if bias is None else out.add_(bias)

    return added
