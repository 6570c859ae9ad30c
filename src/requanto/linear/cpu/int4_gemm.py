"""GEMMs of many rows of x with packed int4: a few blocks of the weight at a time are dequantized, then multiplied.

The lower and the upper nibbles of the blocks become one matrix each, ``[K, rows]``, so that all passes but the first read
contiguous memory. Slices are large, because starting an operator on all threads takes as long as processing 10^5 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from requanto.linear.cpu import int4, onednn_bf16
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.int4 import Packed
from requanto.linear.cpu.int4_scales import Scales
from requanto.linear.cpu.scratch_matmul import matmul
from requanto.linear.registry import Gemm
from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.settings import settings
from requanto.tensor.qtensor import QTensor

#: Bytes of the weight that are dequantized and multiplied at a time, and the minimum number of blocks: GEMMs with fewer
#: columns are slower.
BLOCK_BYTES = 8 * 2**20
MIN_BLOCKS = 8
#: Weights that are dequantized at a time, and bytes of scratch buffers per weight.
SLICE = 2**20
_SLICE_BYTES = 5.5
#: 8 in all nibbles of an int64, and the mask of the upper nibbles of its bytes.
_NIBBLES_OF_8 = -0x7777777777777778
_UPPER_NIBBLES = -0x0F0F0F0F0F0F0F10


def run_large(x: torch.Tensor, weight: QTensor, packed: Packed) -> torch.Tensor:
    """Computes ``x @ w.T``, ``[rows, N]``, in x's dtype, float32 or bfloat16."""
    if cache.wanted(calls.NIBBLES) and x.dtype == torch.bfloat16 and _compilable(packed):
        return _compiled_gemm(packed, Scales.of(weight), x.shape[0])(x, weight, None)
    x = (
        x
        if packed.length == packed.in_features
        else torch.nn.functional.pad(x, (0, packed.length - packed.in_features))
    )
    out = x.new_empty(x.shape[0], packed.codes.shape[0])
    columns = out.view(len(x), len(packed.blocks), 2, packed.block // 2)
    for blocks, planes in _dequantized(weight, packed, x.dtype):
        for side, plane in zip(columns[:, blocks].unbind(2), planes):
            side.copy_(matmul(x, plane).view(side.shape))
    return out if out.shape[1] == packed.out_features else out[:, : packed.out_features].contiguous()


def run_large_transposed(x: torch.Tensor, weight: QTensor, packed: Packed) -> torch.Tensor:
    """Computes ``x @ w``, ``[rows, K]``, in x's dtype, float32 or bfloat16: the GEMM of the backward."""
    if cache.wanted(calls.NIBBLES) and x.dtype == torch.bfloat16 and _compilable(packed):
        out = onednn_bf16.matmul_transposed(
            x, weight, packed.out_features, packed.length, _fill(packed, Scales.of(weight))
        )
        return out if packed.length == packed.in_features else out[:, : packed.in_features].contiguous()
    pad_columns = packed.codes.shape[0] - packed.out_features
    x = torch.nn.functional.pad(x, (0, pad_columns)) if pad_columns else x
    columns = x.view(len(x), len(packed.blocks), 2, packed.block // 2)
    total = torch.zeros(len(x), packed.length, dtype=torch.float32, device="cpu")
    for blocks, planes in _dequantized(weight, packed, x.dtype):
        for side, plane in zip(columns[:, blocks].unbind(2), planes):
            total.add_(torch.mm(side.reshape(len(x), -1), plane.t()))  # accumulated in float32, rounded once
    return total[:, : packed.in_features].to(x.dtype)


def _dequantized(weight: QTensor, packed: Packed, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields slices of blocks and their dequantized weights ``[2, K, blocks * half]``, valid until the next iteration."""
    half, length = packed.block // 2, packed.length
    scales = Scales.of(weight).pairs(packed, dtype)
    column = length * packed.block * dtype.itemsize
    count = max(1, min(max(MIN_BLOCKS, BLOCK_BYTES // column), settings.workspace_bytes // 4 // column))
    for first in range(0, len(packed.blocks), count):
        part = packed.blocks[first : first + count]
        chosen = scales[:, first * packed.block : (first + len(part)) * packed.block]
        scale, zero = _planes_of(chosen, half, affine=packed.affine)
        yield slice(first, first + len(part)), _planes(part, scale, zero, dtype)


def _compilable(packed: Packed) -> bool:
    """True if the operator's blocks have oneDNN's size and kernels are available; compiles or loads them if necessary."""
    return (
        packed.block == onednn_bf16.ROWS
        and packed.length % 64 == 0
        and onednn_bf16.fits(packed.out_features, packed.in_features)
        and calls.ready(calls.NIBBLES)
    )


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run_large` with a compiled kernel, for one shape of x; None if there is no such kernel."""
    found = int4.packed(weight)
    if found is None or dtype != torch.bfloat16 or not _compilable(found):
        return None
    return _compiled_gemm(found, Scales.of(weight), rows)


def _fill(packed: Packed, scales: Scales) -> Callable[[slice], onednn_bf16.Fill]:
    codes, groups = packed.blocks, packed.groups

    def fill(part: slice) -> onednn_bf16.Fill:
        if part == slice(0, len(codes)):
            return calls.fill_nibbles(codes, groups, lambda weight: scales.words(packed, part))
        return calls.fill_nibbles(codes[part], groups, lambda weight: scales.words(packed, part))

    return fill


def _compiled_gemm(packed: Packed, scales: Scales, rows: int) -> Gemm:
    gemm = onednn_bf16.make_plan(packed.out_features, packed.length, rows, _fill(packed, scales))
    return onednn_bf16.with_padded_columns(gemm, packed.in_features, packed.length)


def _planes_of(scales: torch.Tensor, half: int, *, affine: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Splits the operator's scales ``[groups, N, 2]`` into scales and zero points (None if not affine).

    Both are float32 ``[2, groups, 1, N / 2]``: the first halves of all blocks, then the second halves.
    """
    groups, rows, _ = scales.shape
    shape = (2, groups, rows // (2 * half), half)
    first, second = scratch_buffer((2, *shape), torch.float32, slot=5)
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
    """Computes ``(code - 8) * scale + zero`` of bytes ``[blocks, K, half]``.

    Integer passes work on int64, eight bytes at a time. Floats are computed in float32, which torch does twice as fast as
    bfloat16.

    Args:
        scale, zero: float32 ``[2, groups, 1, blocks * half]``; the scale is overwritten.

    Returns:
        ``[2, K, blocks * half]``: the lower nibbles' weights, then the upper nibbles'.
    """
    count, length, half = blocks.shape
    words = blocks.view(torch.int64)
    wide = count * half
    groups = scale.shape[1]
    group = length // groups
    scale.mul_(1 / 16)
    out = scratch_buffer((2, length, wide), dtype)
    bound = min(SLICE, int(settings.workspace_bytes // 4 / _SLICE_BYTES))
    step = max(1, bound // (2 * group * wide))
    for first in range(0, groups, step):
        last = min(first + step, groups)
        rows = slice(first * group, last * group)
        taken = rows.stop - rows.start
        # A code in the upper nibble of a signed byte, with its top bit inverted, is 16 * (code - 8).
        flipped = scratch_buffer((taken, count, half // 8), torch.int64, slot=1)
        torch.bitwise_xor(words[:, rows].transpose(0, 1), _NIBBLES_OF_8, out=flipped)
        codes = scratch_buffer((2, *flipped.shape), torch.int64, slot=2)
        torch.bitwise_and(flipped, _UPPER_NIBBLES, out=codes[1])
        torch.bitwise_and(flipped.bitwise_left_shift_(4), _UPPER_NIBBLES, out=codes[0])
        into = out[:, rows]
        direct = dtype == torch.float32
        values = into if direct else scratch_buffer((2, taken, wide), torch.float32, slot=3)
        values.copy_(codes.view(torch.int8).view(2, taken, wide))
        grouped = values.view(2, last - first, group, wide)
        if zero is None:
            grouped.mul_(scale[:, first:last])
        else:
            torch.addcmul(zero[:, first:last], grouped, scale[:, first:last], out=grouped)
        if not direct:
            into.copy_(values)
    return out
