"""Cached plans of the GPU implementations: one call is recorded, then its launches are repeated (`requanto_kernels._plan`).

So a call costs the search for the plan, the allocation of its result and the start of the kernels; arguments are checked and
tiles selected once for a layer and a shape of x. A plan knows addresses of the weight's tensors: the weight's storage drops
it when it gets other tensors, while values that are changed in place are read as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from requanto.linear.gpu.layout import ExpandedScales, capturing, kernel_parts, pin
from requanto.linear.registry import Gemm
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Most plans of one layer and shape of x: one for each stride and alignment of x and of the bias.
_MOST = 16

_ROCM = torch.version.hip is not None

#: ``run(x, parts, bias, *others) -> y`` by launchers of `requanto_kernels`, from a weight's `KernelParts`. y has x's shape
#: without the last axis, plus N, or is one of the others.
Run = Callable[..., torch.Tensor]


class _Cached(NamedTuple):
    """A plan, or None if the call cannot be repeated, with what a captured graph or a change of the weight concerns."""

    plan: Any
    codes: torch.Tensor
    expanded: ExpandedScales | None


def recorded(run: Run, dtype: torch.dtype) -> Gemm:
    """A GEMM that records ``run`` at the first call for each kind of x, and repeats its launches from then on.

    Args:
        dtype: dtype of x.
    """
    return _Recorded(run, dtype)


class _Recorded:
    """See `recorded`. It does not reference the weight, whose storage owns it."""

    __slots__ = ("_dtype", "_plans", "_run")

    def __init__(self, run: Run, dtype: torch.dtype) -> None:
        self._run, self._dtype = run, dtype
        self._plans: dict[tuple, _Cached] = {}

    def __call__(
        self, x: torch.Tensor | None, weight: QTensor, bias: torch.Tensor | None, *others: torch.Tensor
    ) -> torch.Tensor:
        key = (kind_of(x), kind_of(bias), *map(kind_of, others))
        found = self._plans.get(key)
        if found is None:
            return self._record(key, x, weight, bias, *others)
        plan, codes, expanded = found
        if plan is None:
            return self._run(x, kernel_parts(weight, self._dtype), bias, *others)
        if not plan.holds():
            return self._record(key, x, weight, bias, *others)
        captured = capturing(codes.device)
        if captured:
            pin(codes)
        if expanded is not None:
            if not expanded.is_current():
                if captured:  # renewed values would count as present, but be computed only when the graph runs
                    return self._run(x, kernel_parts(weight, self._dtype), bias, *others)
                expanded.renew()
            if captured:
                expanded.is_read_by_graph = True
        return plan(x, bias, *others)

    def _record(
        self, key: tuple, x: Any, weight: QTensor, bias: torch.Tensor | None, *others: torch.Tensor
    ) -> torch.Tensor:
        from requanto_kernels._plan import record

        parts = kernel_parts(weight, self._dtype)
        inputs = {f"input{i}": other for i, other in enumerate(others)}
        with record(x=x, bias=bias, **inputs, constants=parts.tensors) as recording:
            out = self._run(x, parts, bias, *others)
        if parts.expanded is not None and not parts.expanded.is_cached:
            return out  # in a capture, or of inference tensors
        plan = recording.plan(out)
        if plan is None:
            name = weight._storage.name or "a weight"
            logger.info("%s of shape %s has no cached plan: %s", name, tuple(weight.shape), recording.problem)
        if len(self._plans) >= _MOST:
            self._plans.clear()
        self._plans[key] = _Cached(plan, parts.codes, parts.expanded)
        return out


def with_bias_added(gemm: Gemm) -> Gemm:
    """The GEMM of kernels that add no bias."""

    def added(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = gemm(x, weight, None)
        return out if bias is None else out.add_(bias)

    return added


def kind_of(tensor: torch.Tensor | None) -> tuple | None:
    """What a plan depends on in x or the bias. x's shape and dtype are known from the weight's cache."""
    if tensor is None:
        return None
    found = tensor.stride(), tensor.data_ptr() & 15, tensor.get_device(), tensor.dtype, tensor.shape
    return (*found, tensor.untyped_storage().size() < 2**31) if _ROCM else found  # compiled otherwise there
