"""Codes -> float values, quickly: by a compiled kernel where there is one (`cpu.fused_dequantize`), else in blocks
that stay in the cache, by operators that vectorize.

Float8 is never converted by torch's own cast, which takes one element at a time on a CPU and does not exist everywhere: an
e4m3 number is a bfloat16 number of the same bits, shifted, with another exponent bias. Codes of a codebook are looked up two
at a time: a table of all pairs of values stays in the L1 cache, and costs half the lookups.
"""

from __future__ import annotations

import functools

import torch

from requanto.dtypes.bit_packing import unpack, unpack_pairs
from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import fused_dequantize
from requanto.runtime.buffers import workspace
from requanto.runtime.settings import settings
from requanto.runtime.tracing import neutral
from requanto.tensor.layout import PLAIN
from requanto.tensor.qtensor import QTensor

#: Bytes of one block's result, more than a core's own cache: the start of an operator on all threads costs more than that.
BLOCK_BYTES = 4 * 2**20


def row_scaled(weight: QTensor) -> bool:
    """True where the scale can multiply the product instead of the weight: one per row, no shift."""
    return not weight.affine and weight.groups == 1


def dequantize_rows(weight: QTensor, start: int, stop: int, out: torch.Tensor, *, scaled: bool = True) -> torch.Tensor:
    """Writes rows ``start .. stop`` of a weight's stored form into ``out`` ``[stop - start, K]``, computed in out's dtype.

    Args:
        scaled: False leaves the scale of `row_scaled` weights to the caller.
    """
    if scaled and out.is_contiguous() and fused_dequantize.ready(weight, out.dtype):
        fused_dequantize.fill(weight, start, stop, out)
        return out
    rows, length = weight.lead.numel(), weight.row_length
    layout, parts = weight._storage.state
    plain = layout is PLAIN
    qdata = parts["qdata"].reshape(rows, -1) if plain else None
    scale, shift = weight.scale.reshape(rows, -1), weight.shift
    shift = None if shift is None else shift.reshape(rows, -1)
    pairs = _pairs_of(weight) if weight.qtype.is_codebook else None
    # At most twice a block's bytes again in each of two buffers: with half of the bound for ``out`` that keeps to it.
    step = max(1, min(BLOCK_BYTES, settings.workspace_bytes // 8) // max(1, length * out.dtype.itemsize))
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        part = out[begin - start : end - start]
        if qdata is None:
            stored = layout.codes(weight._spec, parts, begin, end)
        else:
            stored = qdata[begin:end]
        if pairs is not None:
            _from_codebook(stored, weight.qtype.bits, pairs, scale[begin:end] if scaled else None, part)
            continue
        if scaled and weight.qtype.dtype == torch.int8 and row_scaled(weight) and part.dtype != torch.float32:
            # In float32, rounded once, which takes no longer than in bfloat16.
            wide = workspace(tuple(part.shape), torch.float32, slot=2).copy_(stored)
            part.copy_(wide.mul_(scale[begin:end].float()))
            continue
        codes_to_float(stored, weight.qtype, part, unpacked=not plain)
        if scaled:
            _scale(part, weight.qtype, scale[begin:end], None if shift is None else shift[begin:end])
    return out


def rows_rounded_once(weight: QTensor, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
    """`dequantize_rows`, with each number computed in float32 and rounded once: a scale need not be one of 16 bits."""
    if out.dtype.itemsize > 2 or fused_dequantize.ready(weight, out.dtype):
        return dequantize_rows(weight, start, stop, out)
    step = max(1, min(BLOCK_BYTES, settings.workspace_bytes // 8) // max(1, 4 * weight.row_length))
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        wide = workspace((end - begin, weight.row_length), torch.float32, slot=6)
        out[begin - start : end - start].copy_(dequantize_rows(weight, begin, end, wide))
    return out


def _scale(part: torch.Tensor, kind: qtype, scale: torch.Tensor, shift: torch.Tensor | None) -> None:
    """``codes * scale + lowest`` in place; codes around zero, so that ``lowest`` is no number large beside the weights."""
    groups = part.view(*scale.shape, -1)
    if shift is None:
        groups.mul_(scale.to(part.dtype).unsqueeze(-1))
        return
    scale, shift = scale.float(), shift.float()
    lowest = kind.zero_code * scale - shift
    if bool((scale == 1).any()):
        # A group of equal weights has codes of 0 and a scale of 1, beside which its shift would be rounded away.
        flat = groups.amax(-1) == -kind.zero_code
        lowest, scale = torch.where(flat, -shift, lowest), scale.masked_fill(flat, 0)
    # In float32, rounded once. (One addcmul would do, but with operands that repeat along the contiguous axis torch does not
    # vectorize it: 4 to 10 times the time of these passes together.)
    wide = (
        groups if part.dtype == torch.float32 else workspace(tuple(groups.shape), torch.float32, slot=2).copy_(groups)
    )
    wide.mul_(scale.unsqueeze(-1)).add_(lowest.unsqueeze(-1))
    if wide is not groups:
        groups.copy_(wide)


def codes_to_float(qdata: torch.Tensor, kind: qtype, out: torch.Tensor, *, unpacked: bool = False) -> None:
    """``[rows, bytes]`` -> the codes' values in ``out`` ``[rows, K]``; those of unsigned codes around zero.

    Args:
        unpacked: codes below 8 bits come one a byte, and may be overwritten.
    """
    if kind.is_packed:
        codes = qdata if unpacked else unpack(qdata, kind.bits, out.shape[1])
        out.copy_(codes.view(torch.int8).sub_(kind.zero_code))
    elif kind.is_unsigned:  # the same numbers modulo 256
        out.copy_((qdata - kind.zero_code).view(torch.int8))
    elif kind.dtype == torch.float8_e4m3fn:
        _e4m3_to_float(qdata, out)
    elif kind.dtype == torch.float8_e5m2:
        _e5m2_to_float(qdata, out)
    else:
        out.copy_(qdata)


def _pairs_of(weight: QTensor) -> torch.Tensor:
    """int64 ``[4^bits]``: for codes ``low + 2^bits * high`` both float32 values, the low one first, as one number."""
    return _pairs(weight.codebook.float()) if weight.codebook is not None else _fixed_pairs(weight.qtype)


@functools.lru_cache(maxsize=64)
def _fixed_pairs(kind: qtype) -> torch.Tensor:
    with neutral():
        return _pairs(torch.tensor(kind.values, dtype=torch.float32, device="cpu"))


def _pairs(values: torch.Tensor) -> torch.Tensor:
    low = values.expand(len(values), -1)
    return torch.stack([low, low.mT], dim=-1).view(torch.int64).flatten()


def _from_codebook(
    qdata: torch.Tensor, bits: int, pairs: torch.Tensor, scale: torch.Tensor | None, out: torch.Tensor
) -> None:
    """``[rows, bytes]`` -> ``values[code] * scale`` in ``out`` ``[rows, K]``.

    In float32, rounded once at the end: a table of bfloat16 values would round every weight twice.
    """
    rows, length = out.shape
    index = unpack_pairs(qdata, bits, length).to(torch.int32)
    direct = out.dtype == torch.float32 and length % 2 == 0
    values = out if direct else workspace((rows, 2 * index.shape[1]), torch.float32, slot=1)
    torch.index_select(pairs, 0, index.flatten(), out=values.view(torch.int64).flatten())
    values = values[:, :length]
    if scale is not None:
        groups = values.unflatten(1, (scale.shape[1], -1))
        groups.mul_(scale.float().unsqueeze(-1))
    if not direct:
        out.copy_(values)


def _e4m3_to_float(qdata: torch.Tensor, out: torch.Tensor) -> None:
    """As int16, sign-extended and shifted by 4, the bits are 1 sign, 4 + 4 exponent, 3 + 4 mantissa: bfloat16 / 2^120."""
    native = out.dtype == torch.bfloat16
    bits = out.view(torch.int16) if native else workspace(tuple(out.shape), torch.int16, slot=1)
    bits.copy_(qdata.view(torch.int8))
    bits.mul_(16).bitwise_and_(-0x7810)
    numbers = bits.view(torch.bfloat16).mul_(2.0**120)
    if not native:
        out.copy_(numbers)


def _e5m2_to_float(qdata: torch.Tensor, out: torch.Tensor) -> None:
    """The upper byte of a float16."""
    native = out.dtype == torch.float16
    bits = out.view(torch.int16) if native else workspace(tuple(out.shape), torch.int16, slot=1)
    bits.copy_(qdata.view(torch.int8))
    bits.mul_(256)
    if not native:
        out.copy_(bits.view(torch.float16))
