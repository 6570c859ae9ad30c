"""`grouped_linear`: rows sorted by expert, one operator with a backward of its own (see `requanto.linear.api`)."""

from __future__ import annotations

import torch

from requanto.linear.api import weight_of
from requanto.linear.registry import choose, problem_of
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor
from requanto.tensor.rotation import rotate


def grouped_linear(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert, each times its expert's weight.

    Args:
        x: ``[rows, K]``; rows ``offsets[e-1] .. offsets[e]`` belong to expert e.
        weight: quantized ``[E, N, K]``.
        offsets: integer ``[E]``: end row of each expert. Rows past the last end give zeros.

    Returns:
        ``[rows, N]``
    """
    block = weight.rotation
    out = _grouped_product(x if block is None or weight.transposed else rotate(x, block), weight, offsets)
    out = rotate(out, block) if block is not None and weight.transposed else out
    return out if weight.up is None else out + lowrank.grouped_product(x, weight, offsets)


def _grouped_product(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.ops.requanto.grouped_linear(
        x,
        weight.operand,
        weight._scale,
        weight._shift,
        offsets,
        weight.qtype.name,
        weight.group_size or 0,
        list(weight.canonical_shape),
        weight.transposed,
        weight.codebook,
        weight.row_scale,
        weight.scale_bits or 0,
    )


def _run_grouped(x: torch.Tensor, weight: QTensor, offsets: torch.Tensor) -> torch.Tensor:
    run = choose(problem_of(weight, x.dtype, x.shape[0]), grouped=True).implementation.run_grouped
    assert run is not None
    return run(x, weight, offsets)


@torch.library.custom_op("requanto::grouped_linear", mutates_args=())
def _grouped_op(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    offsets: torch.Tensor,
    name: str,
    group: int,
    canonical: list[int],
    transposed: bool,
    codebook: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scale_bits: int = 0,
) -> torch.Tensor:
    weight = weight_of(
        qdata, scale, shift, name, group, canonical, transposed, x.dtype, codebook, row_scale, scale_bits
    )
    return _run_grouped(x, weight, offsets)


@_grouped_op.register_fake
def _(x, qdata, scale, shift, offsets, name, group, canonical, transposed, codebook=None, row_scale=None, scale_bits=0):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], canonical[-1] if transposed else canonical[-2])


def _grouped_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _x, qdata, scale, shift, offsets, name, group, canonical, transposed, *stored = inputs
    codebook, row_scale, scale_bits = stored
    ctx.save_for_backward(qdata, scale, shift, offsets, codebook, row_scale)
    ctx.rest, ctx.scale_bits = (name, group, canonical, not transposed), scale_bits


def _grouped_backward(ctx, grad):  # type: ignore[no-untyped-def]
    qdata, scale, shift, offsets, *stored = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = torch.ops.requanto.grouped_linear(grad, qdata, scale, shift, offsets, *ctx.rest, *stored, ctx.scale_bits)
    return (grad_x,) + (None,) * 11


_grouped_op.register_autograd(_grouped_backward, setup_context=_grouped_setup)
