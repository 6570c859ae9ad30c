"""Dequantizes rows of a weight: by the C library (`requanto.linear.cpu.rows`) if there is one, else with vectorized
operators on blocks that fit into the cache.

torch's cast from float8 is not used: on a CPU it converts one element at a time, and it is missing in some places. Instead,
the bits of e4m3 are shifted to those of bfloat16, which only differs in the exponent bias. Codebook codes are looked up two
at a time in a table of all pairs of values, which fits into the L1 cache: half as many lookups.
"""

from __future__ import annotations

import functools

import torch

from requanto.dtypes.bit_packing import pack, unpack, unpack_pairs
from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import library
from requanto.linear.cpu import rows as kernel
from requanto.linear.cpu.weights import described
from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.settings import settings
from requanto.runtime.tracing import runs_eagerly, without_ambient_state
from requanto.tensor.layout import PLAIN
from requanto.tensor.parts import scales_of_rows
from requanto.tensor.qtensor import QTensor

#: Bytes of one block's result. More than a core's private cache, because starting an operator on all threads is expensive.
BLOCK_BYTES = 4 * 2**20


def row_scaled(weight: QTensor) -> bool:
    """True if the scale can be applied to the GEMM's result instead of the weight: one scale per row, no shift."""
    return not weight.affine and weight.groups == 1


def by_library(weight: QTensor, dtype: torch.dtype) -> bool:
    """True if the library dequantizes this weight to ``dtype``."""
    return dtype in library.FLOATS and runs_eagerly() and described(weight) is not None


def dequantize_rows(weight: QTensor, start: int, stop: int, out: torch.Tensor, *, scaled: bool = True) -> torch.Tensor:
    """Dequantizes rows ``start .. stop`` of a weight's stored matrix into ``out`` ``[stop - start, K]``, in out's dtype.

    Args:
        scaled: False to leave out the scale of `row_scaled` weights.
    """
    if scaled and runs_eagerly() and kernel.fill(weight, start, stop, out):
        return out
    rows, length = weight.lead.numel(), weight.row_length
    layout, parts = weight._storage.state
    plain = layout is PLAIN
    qdata = parts["qdata"].reshape(rows, -1) if plain else None
    scale, shift = scales_of_rows(weight._spec, parts, start, stop)
    pairs = _pairs_of(weight) if weight.qtype.is_codebook else None
    # Two scratch buffers of at most twice a block's bytes each; ``out`` takes at most half of the bound.
    step = max(1, min(BLOCK_BYTES, settings.workspace_bytes // 8) // max(1, length * out.dtype.itemsize))
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        own = slice(begin - start, end - start)
        part = out[own]
        if qdata is None:
            stored = layout.codes(weight._spec, parts, begin, end)
            if pairs is not None:
                stored = pack(stored, weight.qtype.bits)
        else:
            stored = qdata[begin:end]
        if pairs is not None:
            _from_codebook(stored, weight.qtype.bits, pairs, scale[own] if scaled else None, part)
            continue
        bytes_of_codes = weight.qtype.dtype == torch.int8 and not weight.qtype.is_packed
        if scaled and bytes_of_codes and row_scaled(weight) and part.dtype != torch.float32:
            # Computed in float32 and rounded once; this is as fast as in bfloat16.
            wide = scratch_buffer(tuple(part.shape), torch.float32, slot=2).copy_(stored)
            part.copy_(wide.mul_(scale[own].float()))
            continue
        codes_to_float(stored, weight.qtype, part, unpacked=not plain)
        if scaled:
            _scale(part, weight.qtype, scale[own], None if shift is None else shift[own])
    return out


def rows_rounded_once(weight: QTensor, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
    """`dequantize_rows` times the column scale, with each value computed in float32 and rounded once."""
    column = weight.column
    if column is not None:
        column = column.float()
    elif out.dtype.itemsize > 2 or by_library(weight, out.dtype):
        return dequantize_rows(weight, start, stop, out)
    step = max(1, min(BLOCK_BYTES, settings.workspace_bytes // 8) // max(1, 4 * weight.row_length))
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        wide = scratch_buffer((end - begin, weight.row_length), torch.float32, slot=6)
        wide = dequantize_rows(weight, begin, end, wide)
        out[begin - start : end - start].copy_(wide if column is None else wide.mul_(column))
    return out


def _scale(part: torch.Tensor, kind: qtype, scale: torch.Tensor, shift: torch.Tensor | None) -> None:
    """``part * scale + offset`` in place. Codes are centered at zero, so the offset is not large compared to the weights."""
    groups = part.view(*scale.shape, -1)
    if shift is None:
        if part.dtype == torch.float32:
            groups.mul_(scale.float().unsqueeze(-1))
        else:  # in float32, rounded once; in bfloat16 groups of 16 would take seven times as long
            wide = scratch_buffer(tuple(groups.shape), torch.float32, slot=2).copy_(groups)
            groups.copy_(wide.mul_(scale.float().unsqueeze(-1)))
        return
    scale, shift = scale.float(), shift.float()
    offset = kind.zero_code * scale - shift
    if bool((scale == 1).any()):
        # A group of equal weights has codes of 0 and a scale of 1. If the shift is tiny, adding the scale would lose it.
        flat = groups.amax(-1) == -kind.zero_code
        offset, scale = torch.where(flat, -shift, offset), scale.masked_fill(flat, 0)
    # In float32, rounded once. One addcmul takes 4 to 10 times as long as these passes: torch does not vectorize it for
    # operands that are broadcast along the contiguous axis.
    wide = (
        groups
        if part.dtype == torch.float32
        else scratch_buffer(tuple(groups.shape), torch.float32, slot=2).copy_(groups)
    )
    wide.mul_(scale.unsqueeze(-1)).add_(offset.unsqueeze(-1))
    if wide is not groups:
        groups.copy_(wide)


def codes_to_float(qdata: torch.Tensor, kind: qtype, out: torch.Tensor, *, unpacked: bool = False) -> None:
    """Converts codes ``[rows, bytes]`` to floats in ``out`` ``[rows, K]``; subtracts ``zero_code`` from unsigned codes.

    Args:
        unpacked: ``qdata`` has one code per byte even for types below 8 bits, and may be overwritten.
    """
    if kind.is_packed:
        codes = qdata if unpacked else unpack(qdata, kind.bits, out.shape[1])
        out.copy_(codes.view(torch.int8).sub_(kind.zero_code))
    elif kind.is_unsigned:  # the subtraction is modulo 256: its result is correct as int8
        out.copy_((qdata - kind.zero_code).view(torch.int8))
    elif kind.dtype == torch.float8_e4m3fn:
        _e4m3_to_float(qdata, out)
    elif kind.dtype == torch.float8_e5m2:
        _e5m2_to_float(qdata, out)
    else:
        out.copy_(qdata)


def _pairs_of(weight: QTensor) -> torch.Tensor:
    """Table of all pairs of codebook values, int64 ``[4^bits]``: at ``low + 2^bits * high`` both float32, low one first."""
    return _pairs(weight.codebook.float()) if weight.codebook is not None else _fixed_pairs(weight.qtype)


@functools.lru_cache(maxsize=64)
def _fixed_pairs(kind: qtype) -> torch.Tensor:
    with without_ambient_state():
        return _pairs(torch.tensor(kind.values, dtype=torch.float32, device="cpu"))


def _pairs(values: torch.Tensor) -> torch.Tensor:
    low = values.expand(len(values), -1)
    return torch.stack([low, low.mT], dim=-1).view(torch.int64).flatten()


def _from_codebook(
    qdata: torch.Tensor, bits: int, pairs: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Writes ``values[code] * scale`` of codes ``[rows, bytes]`` into ``out`` ``[rows, K]``.

    In float32, rounded once at the end; with a table of bfloat16 values every weight would be rounded twice.
    """
    rows, length = out.shape
    index = unpack_pairs(qdata, bits, length).to(torch.int32)
    direct = out.dtype == torch.float32 and length % 2 == 0
    values = out if direct else scratch_buffer((rows, 2 * index.shape[1]), torch.float32, slot=1)
    torch.index_select(pairs, 0, index.flatten(), out=values.view(torch.int64).flatten())
    values = values[:, :length]
    if scale is not None:
        groups = values.unflatten(1, (scale.shape[1], -1))
        groups.mul_(scale.float().unsqueeze(-1))
    if not direct:
        out.copy_(values)


def _e4m3_to_float(qdata: torch.Tensor, out: torch.Tensor) -> None:
    """e4m3 -> float: sign-extended to int16 and shifted left by 4, the bits are those of the value / 2^120 in bfloat16."""
    native = out.dtype == torch.bfloat16
    bits = out.view(torch.int16) if native else scratch_buffer(tuple(out.shape), torch.int16, slot=1)
    bits.copy_(qdata.view(torch.int8))
    bits.mul_(16).bitwise_and_(-0x7810)
    values = bits.view(torch.bfloat16).mul_(2.0**120)
    if not native:
        out.copy_(values)


def _e5m2_to_float(qdata: torch.Tensor, out: torch.Tensor) -> None:
    """e5m2 -> float: an e5m2 code is the upper byte of the same value in float16."""
    native = out.dtype == torch.float16
    bits = out.view(torch.int16) if native else scratch_buffer(tuple(out.shape), torch.int16, slot=1)
    bits.copy_(qdata.view(torch.int8))
    bits.mul_(256)
    if not native:
        out.copy_(bits.view(torch.float16))
