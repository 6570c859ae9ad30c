"""GEMMs of several weights with one x in one launch on GPUs: the conditions, and the launch (`wq_gemm_many`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu.layout import ExpandedScales, capturing, kernel_parts, pin
from requanto.linear.gpu.plans import kind_of
from requanto.linear.registry import choose, problem_of
from requanto.runtime.devices import made_current
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: x: ``[..., K]`` for all weights, or one for each: as a list, or as one ``[weights, ..., K]``.
Inputs = torch.Tensor | Sequence[torch.Tensor]
#: ``gemm(x, weights, biases, stacked) -> [y, ...]`` for one number of rows and dtype of x.
Gemm = Callable[[Inputs, Sequence[QTensor], Sequence[torch.Tensor | None], bool], list[torch.Tensor]]

#: Most weights of one launch.
MOST = 4
#: Most forms of x (strides, alignment) and of biases for which a plan keeps launches; for more, each call checks anew.
MOST_FORMS = 16
#: (minimum compute capability, rows): up to so many rows, one launch computes all. The first entry that fits the GPU
#: is used; (0, ...) is for ROCm and XPU.
#:
#: NOT MEASURED. Up to 16 rows a GEMM is one tile high, as short as it gets, and launches and the Python before them
#: weigh most. With more rows each GEMM fills the device by itself.
TOGETHER_ROWS: tuple[tuple[int, int], ...] = ((80, 16), (0, 16))


def why_not_here(device: torch.device, rows: int) -> str | None:
    """Why GEMMs of so many rows run one by one on a device, whatever the weights; None if one launch may compute all."""
    kind = device.type
    if kind not in rules.DEVICES:
        return f"no launches to save on {kind}"
    with made_current(kind, device.index):
        most = rules.rows_for(TOGETHER_ROWS, kind)
    if rows > most:
        return f"{rows} rows: one launch is for up to {most}"
    return None


def why_separate(weights: Sequence[QTensor], rows: int, dtype: torch.dtype) -> str | None:
    """Why the GEMMs of like weights run one by one; None if one launch can compute all once they are packed."""
    for weight in weights:
        name = choose(problem_of(weight, dtype, rows)).implementation.name
        if name != "triton-wq":
            return f"{name} runs a weight"
    return None


def why_other_memory(weights: Sequence[QTensor], dtype: torch.dtype) -> str | None:
    """Why one program cannot read the memory of like weights as it is now; None if it can.

    `wq_gemm_many` raises for these.
    """
    first = _memory_of(weights[0], dtype)
    if any(_memory_of(weight, dtype) != first for weight in weights):
        return "codes or scales differ in dtype or in the order of their memory"
    return None


def _memory_of(weight: QTensor, dtype: torch.dtype) -> tuple:
    """What the launch takes to be the same for all weights: layout, dtypes, and strides but for that along the groups."""
    parts = kernel_parts(weight, dtype)
    scale, shift = parts.scale, parts.shift
    shifted = None if shift is None else (shift.dtype, shift.stride() == scale.stride())
    return parts.layout, parts.codes.dtype, parts.codes.stride(), scale.dtype, scale.stride(0), shifted


def run(
    x: Inputs, weights: Sequence[QTensor], biases: Sequence[torch.Tensor | None], stacked: bool = False
) -> list[torch.Tensor]:
    """The launch, checked and selected anew."""
    from requanto_kernels import wq_gemm_many

    first = x if isinstance(x, torch.Tensor) else x[0]
    parts = [kernel_parts(weight, first.dtype) for weight in weights]
    each = [(one.codes, one.scale, one.shift) for one in parts]
    if len({bias.dtype for bias in biases if bias is not None}) > 1:
        biases = [None if bias is None else bias.float() for bias in biases]
    return wq_gemm_many(x, each, biases, stacked=stacked, **parts[0].how)


def make_plan(dtype: torch.dtype) -> Gemm:
    """The launch for one number of rows of ``dtype``, recorded once for each form of x and repeated from then on."""
    return _Launch(dtype)


class _Cached(NamedTuple):
    """A recorded launch, or None if it cannot be repeated, with what a captured graph or a change of a weight concerns."""

    plan: Any
    codes: list[torch.Tensor]
    expanded: list[ExpandedScales]


class _Launch:
    """See `make_plan`. It references no weight: the storage of one of them owns it."""

    __slots__ = ("_dtype", "_plans")

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._plans = dtype, dict[tuple, _Cached]()

    def __call__(
        self, x: Inputs, weights: Sequence[QTensor], biases: Sequence[torch.Tensor | None], stacked: bool = False
    ) -> list[torch.Tensor]:
        xs = (x,) if isinstance(x, torch.Tensor) else x
        key = (stacked, *[kind_of(one) for one in xs], *[kind_of(bias) for bias in biases])
        found = self._plans.get(key)
        if found is None or found.plan is None or not found.plan.holds():
            return self._record(key, x, weights, biases, stacked)
        captured = capturing(xs[0].device)
        if captured:
            for codes in found.codes:
                pin(codes)
        if captured and not all(expanded.is_current() for expanded in found.expanded):
            return run(x, weights, biases, stacked)  # see `plans`
        for expanded in found.expanded:
            expanded.is_read_by_graph = expanded.is_read_by_graph or captured
            if not expanded.is_current():
                expanded.renew()
        return found.plan(*xs, *biases)

    def _record(
        self,
        key: tuple,
        x: Inputs,
        weights: Sequence[QTensor],
        biases: Sequence[torch.Tensor | None],
        stacked: bool,
    ) -> list[torch.Tensor]:
        from requanto_kernels._plan import record

        if key in self._plans and self._plans[key].plan is None:
            return run(x, weights, biases, stacked)
        parts = [kernel_parts(weight, self._dtype) for weight in weights]
        xs = (x,) if isinstance(x, torch.Tensor) else x
        inputs = {f"x{i}": one for i, one in enumerate(xs)} | {f"bias{i}": one for i, one in enumerate(biases)}
        with record(**inputs, constants=[tensor for one in parts for tensor in one.tensors]) as recording:
            outs = run(x, weights, biases, stacked)
        expanded = [one.expanded for one in parts if one.expanded is not None]
        if all(one.is_cached for one in expanded):  # else in a capture, or of inference tensors
            plan = recording.plan(outs)
            if plan is None:
                name = weights[0]._storage.name or "a weight"
                logger.info("%s and those with one input have no cached plan: %s", name, recording.problem)
            if len(self._plans) >= MOST_FORMS:
                self._plans.clear()
            self._plans[key] = _Cached(plan, [one.codes for one in parts], expanded)
        return outs
