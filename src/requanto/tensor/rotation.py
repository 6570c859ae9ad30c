"""Rotation of a weight's rows by a block Hadamard matrix, and of what is multiplied with them.

    W x = (W R) (R x)        R = diag(H, H, ...), H orthonormal and symmetric: H H = 1

Codes are chosen for ``W R``: every weight of it is a mean over a block, so that outliers are spread over their block and
groups look alike. The product rotates x in the same way, and ``dequantize()`` turns the weight back. (QuIP, Chee et al.
2023, arXiv:2307.13304; QuaRot, Ashkboos et al. 2024, arXiv:2404.00456.)

H is Sylvester's: ``H_ab = H_a (x) H_b``, so a block of 1024 is a 32 x 32 matrix on either side of the block seen as 32 x 32:
O(K sqrt(block)) operations in two products of small matrices, which is quicker than the ten passes of the classic butterfly.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.runtime.tracing import is_tracing, neutral, without_autocast

logger = logging.getLogger(__name__)

#: Largest block. Larger ones measured no better (docs/accuracy.md), and cost more.
LARGEST = 1024


def check_rotation(value: Any, where: str = "rotation") -> int | None:
    """Largest block that is asked for: True or ``"hadamard"`` mean `LARGEST`, None and False mean no rotation.

    Raises:
        ValueError: anything but those and powers of two from 2 on.
    """
    if value is None or value is False:
        return None
    if value is True or value == "hadamard":
        return LARGEST
    if not isinstance(value, int) or value < 2 or value & (value - 1):
        raise ValueError(
            f"{where} must be True, False, 'hadamard' or the size of a block, a power of two; found {value!r}"
        )
    return value


def fit_rotation(wanted: int | None, length: int, name: str = "weight") -> int | None:
    """The block that rows of ``length`` weights get: the largest power of two up to ``wanted`` that divides them."""
    if wanted is None:
        return None
    block = min(wanted, length & -length)
    if block < 2:
        logger.info("%s: rows of %d weights have no block of a power of two, they are not rotated", name, length)
        return None
    return block


@functools.lru_cache(maxsize=64)
def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    with neutral():
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix / size**0.5


def _rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    power = block.bit_length() - 1
    left, right = 2 ** ((power + 1) // 2), 2 ** (power // 2)
    with without_autocast(x.device):
        wide = x.float().reshape(-1, right)
        wide = wide @ _hadamard(right, x.device) if right > 1 else wide
        wide = wide.view(-1, left, right).transpose(1, 2) @ _hadamard(left, x.device)
    return wide.transpose(1, 2).to(x.dtype).reshape(x.shape)


@torch.library.custom_op("requanto::rotate", mutates_args=())
def _rotate_op(x: torch.Tensor, block: int) -> torch.Tensor:
    return _rotated(x, block).contiguous().clone() if x.numel() == 0 else _rotated(x, block).contiguous()


@_rotate_op.register_fake
def _(x: torch.Tensor, block: int) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.block = inputs[1]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return rotate(grad, ctx.block), None


_rotate_op.register_autograd(_backward, setup_context=_setup_context)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """``x R`` along the last axis, computed in float32; its own inverse.

    Args:
        x: float ``[..., K]``.
        block: a power of two that divides K.

    Returns:
        A new tensor of x's shape and dtype.
    """
    # Whoever watches operators (a tracer, fake tensors, a counter of them) sees one, and not the kept matrix.
    watched = is_tracing() or isinstance(x, FakeTensor) or torch._C._len_torch_dispatch_stack()
    if watched or (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.requanto.rotate(x, block)
    return _rotated(x, block)
