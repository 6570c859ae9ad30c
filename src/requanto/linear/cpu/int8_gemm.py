"""GEMMs with int8 weights in oneDNN's blocked layout: exact int32 sums.

int8 activations (dynamic or static) need one GEMM, float activations two: x is rounded to 16-bit integers, split into a high
and a low byte, so that ``x @ w = 256 * (high @ w) + low @ w``. The weight is read as 8 bits and never dequantized.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.activations import (
    coarse_rows,
    nan_rows,
    quantize_unsigned,
    quantize_with_scale,
    single_scale,
    split_16bit,
    split_32bit,
    split_row_32bit,
)
from requanto.linear.cpu.onednn_int8 import QLinearWeight, int8_gemm, qlinear_weight
from requanto.linear.cpu.scales import row_scale
from requanto.runtime.buffers import rows_that_fit
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Most rows of x in one GEMM, so that their 16-bit codes and the float32 result stay in the cache.
MAX_ROWS = 256
#: Approximate bound of a GEMM's float32 result in bytes: the allocator returns larger ones to the system, and every GEMM
#: would pay for page faults.
SUMS_BYTES = 8 * 2**20
#: Fewest rows of x in one GEMM: with fewer, oneDNN reads the weight more slowly (cpu_passes.json).
MIN_ROWS = 4
#: Bytes of scratch buffers per element of x: float32, 16-bit codes, and both bytes of these.
_BYTES = 8


def run_split(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` for float x with two int8 GEMMs, or four.

    Each row of x is rounded to 16-bit integers with one scale, its largest element to 32512. At least half of the row's
    nonzero elements have a code of 128 or more, and so keep as many bits as bfloat16 has. The error, compared to the result
    for the row with its elements clipped to 1/254 of the largest, is then at most 0.6 % of the norm (0.3 % if errors are
    independent) for weights of similar magnitude, and 3e-5 of it if all elements of x have the same magnitude. Large
    elements whose weight is 0 do not make it worse than bfloat16's rounding error.

    A row with fewer such elements is rounded to 32-bit integers: the error is 5e-10 of its largest element, that of float32.
    So is x with a single row, for which oneDNN takes the same time.
    """
    packed = qlinear_weight(weight)
    scale = row_scale(weight, weight.shape[0])
    one = split_row_32bit(x, MIN_ROWS) if x.shape[0] == 1 and x.shape[1] else None
    if one is not None:
        total = _sum_of_quarters(int8_gemm(one[0], packed, scale, one[1]), 1)
        return (total if bias is None else total.add_(bias)).to(x.dtype)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="cpu")
    if not x.numel():
        return _bias_only(out, bias)
    step = _rows_at_once(x, 2 * weight.shape[0])
    for part, into in _parts(x, out, step):
        rows = part.shape[0]
        halves, steps = split_16bit(part, MIN_ROWS)
        coarse = coarse_rows(part, halves)
        if coarse is None or len(coarse) < rows:
            sums = int8_gemm(halves, packed, scale)
            _scale_and_add_bias(sums[rows : 2 * rows].add_(sums[:rows], alpha=256), steps, bias, into)
        if coarse is not None:
            _gemm_of_32bit_rows(part, coarse, packed, scale, bias, into)
    return out


def _gemm_of_32bit_rows(
    x: torch.Tensor,
    rows: torch.Tensor,
    packed: QLinearWeight,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Computes the given rows of the result with x in 32 bits, and writes them into ``out``."""
    logger.debug(
        "%d of %d rows of x have elements so large that 16 bits are too few for the others: using 32 bits",
        len(rows),
        len(x),
    )
    for some in rows.split(max(1, len(x) // 2)):  # codes and sums take twice as many bytes as with 16 bits
        quarters, steps = split_32bit(x[some], MIN_ROWS)
        total = _sum_of_quarters(int8_gemm(quarters, packed, scale), len(some)).mul_(steps)
        out[some] = (total if bias is None else total.add_(bias)).to(out.dtype)


def _sum_of_quarters(sums: torch.Tensor, rows: int) -> torch.Tensor:
    """Combines the GEMMs of `split_32bit`'s four bytes into ``[rows, N]``, in place."""
    total = sums[:rows]
    for byte in (1, 2, 3):
        total.add_(sums[byte * rows : (byte + 1) * rows], alpha=256**byte)
    return total


def _bias_only(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Fills the result of an empty x or weight: zeros plus bias."""
    return out.zero_() if bias is None else out.copy_(bias.detach().expand_as(out))


def run_int8(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` for x quantized to int8, per token or static, with one int8 GEMM.

    Non-finite values of x are handled as described in `requanto.linear.activations`.
    """
    assert activation is not None
    packed = qlinear_weight(weight)
    scale = row_scale(weight, weight.shape[0])
    out = None
    step = _rows_at_once(x, weight.shape[0])
    if x.dtype in (torch.float32, torch.bfloat16) and x.numel():
        one = single_scale(x, activation, input_scale)
        if one is not None:
            parts = [_gemm_with_one_scale(part, activation, one, packed, scale, bias) for part in x.split(step)]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="cpu")
        if not x.numel():
            return _bias_only(out, bias)
        for part, into in _parts(x, out, step):
            codes, steps = quantize_unsigned(part, activation, input_scale, MIN_ROWS)
            _scale_and_add_bias(int8_gemm(codes, packed, scale)[: len(part)], steps, bias, into)
    lost = None if input_scale is None else nan_rows(x)
    return out if lost is None else out.masked_fill_(lost, math.nan)


def _gemm_with_one_scale(
    x: torch.Tensor,
    activation: qtype,
    step: float,
    packed: QLinearWeight,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """GEMM for x with a single scale: oneDNN applies the scale, adds the bias and rounds to x's dtype."""
    codes = quantize_with_scale(x, activation, step)
    return torch.ops.onednn.qlinear_pointwise(
        codes, step, 128, packed.packed, scale, packed.zeros, None if bias is None else bias.float().contiguous(),
        1.0, 0, x.dtype, "none", [], "",
    )  # fmt: skip


def _rows_at_once(x: torch.Tensor, sums: int) -> int:
    """Rows of x in one GEMM; ``sums`` is the number of float32 results per row of x."""
    most = max(32, min(MAX_ROWS, SUMS_BYTES // (4 * sums)))
    return rows_that_fit(_BYTES * x.shape[1], 2 ** (most.bit_length() - 1))


def _parts(x: torch.Tensor, out: torch.Tensor, step: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    # The time of split() is noticeable in a GEMM with one row.
    return ((x, out),) if x.shape[0] <= step else zip(x.split(step), out.split(step))


def _scale_and_add_bias(sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    sums.mul_(steps)
    if bias is not None:
        sums.add_(bias)
    out.copy_(sums)
