"""Linear layers whose weight stays float on a CPU, such as a model's output layer: a few rows of x by the C library.

With one row torch reads the weight at a third to two thirds of the memory's speed; of a small model that is quantized to
int4 the output layer then takes as long as all other layers together.
"""

from __future__ import annotations

import math

import torch

from requanto.linear.cpu import library
from requanto.linear.cpu.weights import DTYPES
from requanto.runtime.tracing import runs_eagerly

#: Most rows of x that the library takes.
MOST_ROWS = 4
#: Smaller weights (number of elements) stay in the processor's caches, where torch's GEMM is as fast.
SMALLEST = 2**20
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``x @ weight.T + bias`` with sums in float32, rounded once.

    Args:
        x: ``[..., K]``.
        weight: float ``[N, K]``.
        bias: float ``[N]``.

    Returns:
        ``[..., N]`` in x's dtype; None where torch's own operator is to run: with more than `MOST_ROWS` rows, a gradient,
        autocast, a tracer, other modes of torch, tensors that are not ordinary ones on the CPU, or without the library.
    """
    if not runs_eagerly() or type(x) not in _PLAIN or type(weight) not in _PLAIN or x.is_nested:
        return None
    if weight.dim() != 2 or not x.dim() or x.dtype not in DTYPES or x.dtype is not weight.dtype:
        return None
    *lead, length = x.shape
    rows, (n, features) = math.prod(lead), weight.shape
    if not 0 < rows <= MOST_ROWS or length != features or n * length < SMALLEST or not _readable(x, weight, bias):
        return None
    used = library.find()
    if used is None:
        return None
    rows_of_x = x.reshape(rows, length)
    rows_of_x = rows_of_x if rows_of_x.stride(1) == 1 else rows_of_x.contiguous()
    out = torch.empty((*lead, n), dtype=x.dtype, device="cpu")
    used.check(
        used.functions.rq_float_linear(
            weight.data_ptr(),
            DTYPES[x.dtype],
            n,
            length,
            weight.stride(0),
            rows_of_x.data_ptr(),
            rows,
            rows_of_x.stride(0),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            n,
        )
    )
    return out


def _readable(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the library may read these tensors now, and nothing else has to see the call."""
    if not x.dtype.is_floating_point or x.layout is not torch.strided or weight.layout is not torch.strided:
        return False  # first: a sparse tensor has no strides
    if not (x.is_cpu and weight.is_cpu) or x.is_neg() or weight.is_neg() or weight.stride(1) != 1:
        return False
    if bias is not None and (
        bias.dtype is not x.dtype
        or bias.shape != weight.shape[:1]
        or not library.reads_floats(bias)
        or not bias.is_contiguous()
    ):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    return not torch.is_autocast_enabled("cpu") and torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]
