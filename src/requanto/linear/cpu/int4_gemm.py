"""Many rows times packed int4: some blocks of rows at a time become floats in this thread's buffer, then one product.

The lower nibbles of the blocks and the upper ones become one matrix each, K outside: so every pass but the first runs over
contiguous memory. Slices are large, since an operator's start on all threads costs as much as 10^5 weights of its work.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from requanto.linear.cpu import int4, onednn_bf16
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.int4 import Packed, Scales
from requanto.linear.cpu.scratch_matmul import matmul
from requanto.linear.registry import Gemm
from requanto.runtime.buffers import workspace
from requanto.runtime.settings import settings
from requanto.tensor.qtensor import QTensor

#: Bytes of the float weight that are made and multiplied at a time, and the fewest blocks of rows: products of fewer columns
#: are slower.
BLOCK_BYTES = 8 * 2**20
LEAST = 8
#: Weights that are dequantized at a time, and the bytes that each of them takes in buffers.
SLICE = 2**20
_SLICE_BYTES = 5.5
#: Eight bytes: nibbles of 8 everywhere, and a mask of upper nibbles.
_NIBBLES_OF_8 = -0x7777777777777778
_UPPER_NIBBLES = -0x0F0F0F0F0F0F0F10


def run_large(x: torch.Tensor, weight: QTensor, packed: Packed) -> torch.Tensor:
    """``x @ w.T`` in x's dtype, float32 or bfloat16, ``[rows, N]``."""
    if cache.wanted(calls.NIBBLES) and x.dtype == torch.bfloat16 and _compilable(packed):
        return _compiled(packed, x.shape[0])(x, weight, None)
    x = x if packed.length == packed.own_length else torch.nn.functional.pad(x, (0, packed.length - packed.own_length))
    out = x.new_empty(x.shape[0], packed.codes.shape[0])
    columns = out.view(len(x), len(packed.blocks), 2, packed.block // 2)
    for blocks, planes in _dequantized(weight, packed, x.dtype):
        for side, plane in zip(columns[:, blocks].unbind(2), planes):
            side.copy_(matmul(x, plane).view(side.shape))
    return out if out.shape[1] == packed.rows else out[:, : packed.rows].contiguous()


def run_large_transposed(x: torch.Tensor, weight: QTensor, packed: Packed) -> torch.Tensor:
    """``x @ w`` in x's dtype, float32 or bfloat16, ``[rows, K]``: what a gradient is."""
    below = packed.codes.shape[0] - packed.rows
    x = torch.nn.functional.pad(x, (0, below)) if below else x
    columns = x.view(len(x), len(packed.blocks), 2, packed.block // 2)
    total = torch.zeros(len(x), packed.length, dtype=torch.float32, device="cpu")
    for blocks, planes in _dequantized(weight, packed, x.dtype):
        for side, plane in zip(columns[:, blocks].unbind(2), planes):
            total.add_(torch.mm(side.reshape(len(x), -1), plane.t()))  # added in float32: rounded once
    return total[:, : packed.own_length].to(x.dtype)


def _dequantized(weight: QTensor, packed: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some blocks at a time: which, and their weights ``[2, K, blocks * half]``, valid until the next ones."""
    half, length = packed.block // 2, packed.length
    scales = Scales.of(weight).pairs(weight, packed, dtype)
    column = length * packed.block * dtype.itemsize
    count = max(1, min(max(LEAST, BLOCK_BYTES // column), settings.workspace_bytes // 4 // column))
    for first in range(0, len(packed.blocks), count):
        part = packed.blocks[first : first + count]
        chosen = scales[:, first * packed.block : (first + len(part)) * packed.block]
        scale, zero = _planes_of(chosen, half, affine=packed.affine)
        yield slice(first, first + len(part)), _planes(part, scale, zero, dtype)


def _compilable(packed: Packed) -> bool:
    """True where the operator's blocks of rows are oneDNN's, and the kernels can be had: they are made at the first call."""
    return (
        packed.block == onednn_bf16.ROWS
        and packed.length % 64 == 0
        and onednn_bf16.fits(packed.rows, packed.own_length)
        and calls.ready(calls.NIBBLES)
    )


def bind(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """`run_large` by a compiled kernel for one shape of x; None: there is no such kernel."""
    found = int4.packed(weight)
    return _compiled(found, rows) if found is not None and dtype == torch.bfloat16 and _compilable(found) else None


def _compiled(packed: Packed, rows: int) -> Gemm:
    codes, groups = packed.blocks, packed.groups

    def fill(part: slice) -> onednn_bf16.Fill:
        if part == slice(0, len(codes)):
            return calls.fill_nibbles(codes, groups, lambda weight: Scales.of(weight).words(weight, packed))
        own = slice(part.start * groups, part.stop * groups)
        return calls.fill_nibbles(codes[part], groups, lambda weight: Scales.of(weight).words(weight, packed)[own])

    gemm = onednn_bf16.bind(packed.rows, packed.length, rows, fill)
    return onednn_bf16.widened(gemm, packed.own_length, packed.length)


def _planes_of(scales: torch.Tensor, half: int, *, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator's ``[groups, N, 2]`` -> float32 ``[2, groups, 1, N / 2]``: scales, and zeros if there are any; the first
    halves of all blocks, then the second ones."""
    groups, rows, _ = scales.shape
    shape = (2, groups, rows // (2 * half), half)
    first, second = workspace((2, *shape), torch.float32, slot=5)
    if scales.dtype == torch.bfloat16:  # a pair is one 32-bit word, the scale its lower half
        words = scales.view(torch.int32).view(groups, -1, 2, half).permute(2, 0, 1, 3)
        torch.bitwise_left_shift(words, 16, out=first.view(torch.int32))
        if affine:
            torch.bitwise_and(words, -(2**16), out=second.view(torch.int32))
    else:
        parts = scales.view(groups, -1, 2, half, 2).permute(4, 2, 0, 1, 3)
        first.copy_(parts[0])
        if affine:
            second.copy_(parts[1])
    flat = (2, groups, 1, rows // 2)
    return first.view(flat), second.view(flat) if affine else None


def _planes(blocks: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """``(code - 8) * scale + zero`` of bytes ``[blocks, K, half]``: ``[2, K, blocks * half]``, lower nibbles, then upper.

    Eight bytes at a time as one int64, since a pass costs as much for one as for the other; floats in float32, since torch
    computes with bfloat16 at half that speed.

    Args:
        scale, zero: float32 ``[2, groups, 1, blocks * half]``; the scale is changed.
    """
    count, length, half = blocks.shape
    words = blocks.view(torch.int64)
    wide = count * half
    groups = scale.shape[1]
    group = length // groups
    scale.mul_(1 / 16)
    out = workspace((2, length, wide), dtype)
    bound = min(SLICE, int(settings.workspace_bytes // 4 / _SLICE_BYTES))
    step = max(1, bound // (2 * group * wide))
    for first in range(0, groups, step):
        last = min(first + step, groups)
        rows = slice(first * group, last * group)
        taken = rows.stop - rows.start
        # A nibble in the upper half of a signed byte, its own upper bit turned over, is 16 * (code - 8).
        turned = workspace((taken, count, half // 8), torch.int64, slot=1)
        torch.bitwise_xor(words[:, rows].transpose(0, 1), _NIBBLES_OF_8, out=turned)
        codes = workspace((2, *turned.shape), torch.int64, slot=2)
        torch.bitwise_and(turned, _UPPER_NIBBLES, out=codes[1])
        torch.bitwise_and(turned.bitwise_left_shift_(4), _UPPER_NIBBLES, out=codes[0])
        into = out[:, rows]
        direct = dtype == torch.float32
        values = into if direct else workspace((2, taken, wide), torch.float32, slot=3)
        values.copy_(codes.view(torch.int8).view(2, taken, wide))
        grouped = values.view(2, last - first, group, wide)
        if zero is None:
            grouped.mul_(scale[:, first:last])
        else:
            torch.addcmul(zero[:, first:last], grouped, scale[:, first:last], out=grouped)
        if not direct:
            into.copy_(values)
    return out
