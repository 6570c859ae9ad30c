"""Rotation of a weight's rows, and of the inputs of its GEMM, by a block Hadamard matrix.

    W x = (W R) (R x)        R = diag(H, H, ...), H orthonormal and symmetric: H H = 1

The codes are those of ``W R``. Each of its elements mixes all weights of a block, which spreads outliers over the block and
makes groups similar. The GEMM rotates x in the same way, and ``dequantize()`` rotates the weight back. (QuIP, Chee et al.
2023, arXiv:2307.13304; QuaRot, Ashkboos et al. 2024, arXiv:2404.00456.)

H is Sylvester's: ``H_ab = H_a (x) H_b``. So a block of 1024 is reshaped to 32 x 32 and multiplied by a 32 x 32 matrix from
either side: O(K sqrt(block)) operations in two small matmuls, which is faster than the ten passes of the usual butterfly.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.runtime import onnx_nodes
from requanto.runtime.tracing import is_tracing, without_ambient_state, without_autocast

logger = logging.getLogger(__name__)

#: Largest block. Larger ones were not more accurate (docs/accuracy.md), and are slower.
LARGEST = 1024
#: value of ``rotation`` that rotates the float model instead, before its weights are rounded (`requanto.transforms`)
FOLD = "fold"


def check_rotation(value: Any, where: str = "rotation") -> int | None:
    """The largest block: `LARGEST` for True or ``"hadamard"``, None (no rotation) for None or False, else the value.

    Raises:
        ValueError: another value that is not a power of two of at least 2.
    """
    if value is None or value is False:
        return None
    if value is True or value == "hadamard":
        return LARGEST
    if value == FOLD:
        raise ValueError(
            f"{where}='fold' rotates a whole float model before it is quantized: give it to requanto.quantize or as "
            f"QuantoConfig(rotation='fold'), not for one weight or layer"
        )
    if not isinstance(value, int) or value < 2 or value & (value - 1):
        raise ValueError(
            f"{where} must be True, False, 'hadamard' or the size of a block, a power of two; found {value!r}"
        )
    return value


def fit_rotation(wanted: int | None, length: int, name: str = "weight") -> int | None:
    """The block for rows of ``length`` weights: the largest power of two up to ``wanted`` that divides them, or None."""
    if wanted is None:
        return None
    block = min(wanted, length & -length)
    if block < 2:
        logger.info("%s: rows of %d weights have no power of two as divisor, so they are not rotated", name, length)
        return None
    return block


@functools.lru_cache(maxsize=64)
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    with without_ambient_state():
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix / size**0.5


def _rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    power = block.bit_length() - 1
    left, right = 2 ** ((power + 1) // 2), 2 ** (power // 2)
    with without_autocast(x.device):
        wide = x.float().reshape(-1, right)
        wide = wide @ hadamard(right, x.device) if right > 1 else wide
        wide = wide.view(-1, left, right).transpose(1, 2) @ hadamard(left, x.device)
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
    if is_tracing() and onnx_nodes.exporting():
        return onnx_nodes.node("Rotate", [x], {"block": block}, x, x.shape)
    # Tracers, fake tensors and dispatch modes must see one operator, not the cached matrix.
    use_op = is_tracing() or isinstance(x, FakeTensor) or torch._C._len_torch_dispatch_stack()
    if use_op or (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.requanto.rotate(x, block)
    return _rotated(x, block)
