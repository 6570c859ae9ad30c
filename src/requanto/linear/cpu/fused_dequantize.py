"""Stored codes -> bfloat16 by kernels of torch's compiler: of weights that have no packed form.

Those of convolutions are such, and those whose sizes are far from whole blocks of oneDNN's. Eager operators pass over a
weight three to ten times (`requanto.linear.cpu.dequantize`), a kernel once.

(e4m3's two codes of NaN, which quantization never gives, count as 480 here, as in every fast path.)
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qint8
from requanto.linear.cpu.aot import cache, calls
from requanto.runtime.buffers import workspace
from requanto.runtime.settings import settings
from requanto.runtime.tracing import has_numbers, is_fake
from requanto.tensor.qtensor import QTensor

#: Numbers of a weight below which kernels do not pay: all of its operators take no longer than a few calls.
SMALLEST = 2**16
#: Bytes of float32 numbers that are made and rounded at a time.
BLOCK_BYTES = 2 * 2**20


def family(weight: QTensor) -> str | None:
    """The family of kernels that reads this weight; None: there is none."""
    if weight.qtype == qint8 and not weight.affine:
        return calls.STORED_INT8
    if weight.qtype == qfloat8_e4m3fn and not weight.affine:
        return calls.STORED_FLOAT8
    whole = weight.qtype.is_packed and weight.qtype.bits == 4 and not weight.qtype.is_codebook
    # A byte may not belong to two groups.
    return calls.STORED_INT4 if whole and (weight.row_length // max(1, weight.groups)) % 2 == 0 else None


def ready(weight: QTensor, dtype: torch.dtype) -> bool:
    """True where a kernel makes this weight in ``dtype``; it is made or loaded, if need be."""
    if (
        dtype != torch.bfloat16
        or weight.is_packed
        or weight.device.type != "cpu"
        or not has_numbers()
        or is_fake(weight._qdata)
    ):
        return False
    experts = weight.shape[0] if weight.axis == 1 else 1  # multiplied one by one
    if weight.numel() < SMALLEST * experts:
        return False
    found = family(weight)
    return found is not None and cache.wanted(found) and calls.ready(found)


def fill(weight: QTensor, start: int, stop: int, out: torch.Tensor) -> None:
    """Writes rows ``start .. stop`` of a weight that is `ready` into ``out`` ``[stop - start, K]``, contiguous, each number
    computed in float32 and rounded once."""
    rows, groups = stop - start, weight.groups
    if not out.numel():
        return
    codes = weight._qdata.reshape(weight.lead.numel(), -1)[start:stop].reshape(rows * groups, -1).contiguous()
    scale = _column(weight.scale, weight, start, stop)
    values = out.view(rows * groups, -1)
    kind = family(weight)
    if kind == calls.STORED_INT8:
        calls.stored_int8(codes, scale, values)
    elif kind == calls.STORED_INT4:
        shift = weight.shift
        shift = scale * weight.qtype.zero_code if shift is None else _column(shift, weight, start, stop)
        calls.stored_int4(codes, scale, shift, values)
    else:
        bytes_ = codes.view(torch.uint8)
        step = max(1, min(BLOCK_BYTES, settings.workspace_bytes // 16) // (4 * values.shape[1]))
        wide = workspace((min(step, len(values)), values.shape[1]), torch.float32, slot=2)
        for part, own, into in zip(bytes_.split(step), scale.split(step), values.split(step)):
            calls.stored_e4m3(part, own, wide[: len(part)])
            into.copy_(wide[: len(part)])


def _column(numbers: torch.Tensor, weight: QTensor, start: int, stop: int) -> torch.Tensor:
    """float32 ``[groups of these rows, 1]``."""
    return numbers.reshape(weight.lead.numel(), -1)[start:stop].reshape(-1, 1).float().contiguous()
