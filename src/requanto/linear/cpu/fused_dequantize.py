"""Dequantizes plain weights to bfloat16 with compiled kernels.

For weights that are not prepacked, such as those of convolutions, or of sizes that oneDNN's blocks would pad too much. Eager
operators make three to ten passes over a weight (`requanto.linear.cpu.dequantize`), a kernel makes one.

The two NaN codes of e4m3 are read as 480, as in all fast paths; quantization never produces them.
"""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qint8
from requanto.linear.cpu.aot import cache, calls
from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.settings import settings
from requanto.runtime.tracing import is_fake, runs_eagerly
from requanto.tensor.layout import PLAIN
from requanto.tensor.parts import scales_of_rows
from requanto.tensor.qtensor import QTensor

#: Smallest weight (number of elements) for which kernels are faster than eager operators.
SMALLEST = 2**16
#: Bytes of float32 values that are dequantized and rounded at a time.
BLOCK_BYTES = 2 * 2**20


def family(weight: QTensor) -> str | None:
    """The family of kernels that reads this weight; None if there is none."""
    if weight.qtype == qint8 and not weight.affine:
        return calls.STORED_INT8
    if weight.qtype == qfloat8_e4m3fn and not weight.affine:
        return calls.STORED_FLOAT8
    whole = weight.qtype.is_packed and weight.qtype.bits == 4 and not weight.qtype.is_codebook
    # No byte may contain codes of two groups.
    return calls.STORED_INT4 if whole and (weight.row_length // max(1, weight.groups)) % 2 == 0 else None


def ready(weight: QTensor, dtype: torch.dtype) -> bool:
    """True if a kernel dequantizes this weight to ``dtype``; compiles or loads the kernel if necessary."""
    if (
        dtype != torch.bfloat16
        or (weight.is_packed and weight.qtype != qint8)  # int8 codes are unpacked quickly, four at a time
        or weight.device.type != "cpu"
        or not runs_eagerly()
        or is_fake(weight._qdata)
    ):
        return False
    experts = weight.shape[0] if weight.axis == 1 else 1  # experts are dequantized one by one
    if weight.numel() < SMALLEST * experts:
        return False
    found = family(weight)
    return found is not None and cache.wanted(found) and calls.ready(found)


def fill(weight: QTensor, start: int, stop: int, out: torch.Tensor) -> None:
    """Dequantizes rows ``start .. stop`` of a weight that is `ready` into ``out`` ``[stop - start, K]``, contiguous.

    Each value is computed in float32 and rounded once.
    """
    rows, groups = stop - start, weight.groups
    if not out.numel():
        return
    layout, parts = weight._storage.state
    if layout is PLAIN:
        codes = parts["qdata"].reshape(weight.lead.numel(), -1)[start:stop]
    else:
        codes = layout.codes(weight._spec, parts, start, stop)
    codes = codes.reshape(rows * groups, -1).contiguous()
    scale, shift = scales_of_rows(weight._spec, parts, start, stop)
    scale = _column(scale)
    values = out.view(rows * groups, -1)
    kind = family(weight)
    if kind == calls.STORED_INT8:
        calls.stored_int8(codes, scale, values)
    elif kind == calls.STORED_INT4:
        shift = scale * weight.qtype.zero_code if shift is None else _column(shift)
        calls.stored_int4(codes, scale, shift, values)
    else:
        bytes_ = codes.view(torch.uint8)
        step = max(1, min(BLOCK_BYTES, settings.workspace_bytes // 16) // (4 * values.shape[1]))
        wide = scratch_buffer((min(step, len(values)), values.shape[1]), torch.float32, slot=2)
        for part, part_scale, into in zip(bytes_.split(step), scale.split(step), values.split(step)):
            calls.stored_e4m3(part, part_scale, wide[: len(part)])
            into.copy_(wide[: len(part)])


def _column(values: torch.Tensor) -> torch.Tensor:
    """Scales or shifts as float32 ``[rows * groups, 1]``."""
    return values.reshape(-1, 1).float().contiguous()
