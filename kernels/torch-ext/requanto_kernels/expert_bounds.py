"""The first and last rows of experts, for the grouped kernels: `bounds[0] = 0`, `bounds[e + 1] = max(ends[0 .. e])`.

Each is limited to the number of rows, so that no kernel writes beyond the result, whatever the ends are. One launch, where
torch's operators take four.
"""

import torch
import triton
import triton.language as tl

from . import _check as check
from ._device import on_device
from ._launch import launch


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def expert_bounds_kernel(ends_ptr, out_ptr, experts, rows, BLOCK: tl.constexpr):
    """One program for all experts."""
    e = tl.arange(0, BLOCK)
    ends = tl.load(ends_ptr + e, mask=e < experts, other=0)
    ends = tl.minimum(tl.maximum(ends, 0), rows)
    ends = tl.associative_scan(ends, 0, _larger)
    tl.store(out_ptr + 1 + e, ends.to(out_ptr.dtype.element_ty), mask=e < experts)
    tl.store(out_ptr + e, tl.zeros_like(ends).to(out_ptr.dtype.element_ty), mask=e < 1)


def expert_bounds(ends: torch.Tensor, rows: int) -> torch.Tensor:
    """`[E + 1]`, ascending from 0, of the dtype of `ends`.

    ends: int32 or int64 `[E]`, the end row of each expert; of those that do not ascend, an expert before one that ends
    earlier keeps its rows. rows: number of rows, the most that a bound can be.
    """
    device = check.check_devices(ends=ends)
    check.check_dtype("ends", ends, (torch.int32, torch.int64))
    if ends.dim() != 1 or not ends.numel():
        check.fail("ends.shape", tuple(ends.shape), "(experts,)")
    if ends.stride(0) != 1 and ends.numel() > 1:
        check.fail("ends.stride", ends.stride(), "a contiguous tensor")
    experts = ends.numel()
    bounds = torch.empty(experts + 1, dtype=ends.dtype, device=device)
    with on_device(ends):
        launch(
            expert_bounds_kernel, (1,),
            ends, bounds, experts, rows, BLOCK=triton.next_power_of_2(experts), num_warps=1 if experts <= 128 else 4,
        )  # fmt: skip
    return bounds
