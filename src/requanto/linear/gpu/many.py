"""GEMMs of several weights with one x in one launch on GPUs: the conditions, and the launch (`wq_gemm_many`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu.layout import kernel_parts
from requanto.linear.gpu.plans import Recorder
from requanto.linear.registry import choose, problem_of
from requanto.runtime.devices import made_current
from requanto.tensor.qtensor import QTensor

#: x: ``[..., K]`` for all weights, or one for each: as a list, or as one ``[weights, ..., K]``.
Inputs = torch.Tensor | Sequence[torch.Tensor]
#: ``gemm(x, weights, biases, stacked) -> [y, ...]`` for one number of rows and dtype of x.
Gemm = Callable[[Inputs, Sequence[QTensor], Sequence[torch.Tensor | None], bool], list[torch.Tensor]]

#: Most weights of one launch.
MOST = 4
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


def make_plan() -> Gemm:
    """The launch for one number of rows and dtype of x, recorded once for each form of x and repeated from then on."""
    return _Launch()


class _Launch(Recorder):
    """See `make_plan`. The storage of the first weight owns it."""

    __slots__ = ()

    def __call__(
        self, x: Inputs, weights: Sequence[QTensor], biases: Sequence[torch.Tensor | None], stacked: bool = False
    ) -> list[torch.Tensor]:
        xs = (x,) if isinstance(x, torch.Tensor) else x
        traits = self._traits
        key = (stacked, *map(traits, xs), *map(traits, biases))
        found = self._plans.get(key)
        if found is not None and found.holds():
            return found.plan(*xs, *biases) if found.is_ready() else run(x, weights, biases, stacked)
        parts = [kernel_parts(weight, xs[0].dtype) for weight in weights]
        inputs = {f"x{i}": one for i, one in enumerate(xs)} | {f"bias{i}": one for i, one in enumerate(biases)}
        name = f"{weights[0]._storage.name or 'a weight'} and those with one input have"
        return self.record(key, lambda: run(x, weights, biases, stacked), inputs, parts, name)
