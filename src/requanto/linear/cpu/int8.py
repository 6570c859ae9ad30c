"""GEMMs with int8 weights in oneDNN's blocked layout, by compiled kernels that read the same bytes.

Float activations: one row of x is multiplied with the codes directly (fused dequantize). For more rows, blocks of the weight
are dequantized to bfloat16 in oneDNN's layout (`cpu.onednn_bf16`). The GEMV is always faster than oneDNN's int8 GEMMs of
split activations (`cpu.onednn_int8`); the bfloat16 GEMM is faster for small weights and for very many rows.

int8 activations: one kernel quantizes x, oneDNN multiplies, a second kernel scales the result. For one row of x, a single
kernel does all of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import int8_gemm, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import calls
from requanto.linear.cpu.scales import row_scale, with_current_scales
from requanto.linear.registry import Gemm
from requanto.runtime.buffers import cached_object, scratch_buffer
from requanto.runtime.settings import settings
from requanto.runtime.tracing import without_ambient_state
from requanto.tensor.qtensor import QTensor

#: The kernels are faster than two int8 GEMMs below so many weights or from so many rows of x, and for one row
#: (benchmarks/results/cpu_paths.json).
SMALL_WEIGHT = 2**23
MANY_ROWS = 257
#: float32 sums of int8 GEMMs larger than this (bytes) are computed in a scratch buffer: page faults of a new tensor take
#: longer than zeroing the buffer and adding to it.
SCRATCH_SUMS_BYTES = 2**21
#: Most cached views of a buffer, one set per number of rows.
MAX_VIEWS = 64


def pays(rows: int, weights: int, dtype: torch.dtype) -> bool:
    """True if the kernels are faster than two int8 GEMMs, for x in bfloat16 or float16 (measured)."""
    return rows == 1 or (dtype == torch.bfloat16 and (weights < SMALL_WEIGHT or rows >= MANY_ROWS))


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` in x's dtype."""
    gemm = make_plan(weight, x.shape[0], x.dtype)
    if gemm is None:
        return int8_gemm.run_split(x, weight, bias, activation, input_scale)
    return gemm(x, weight, bias)


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run` for one shape of x; None if oneDNN's int8 GEMM has to be used."""
    words = onednn_int8.words_of(weight)
    if words is None or not calls.ready(calls.INT8):
        return None
    (out_features, in_features), length = weight.shape, 4 * words.shape[1]
    padded_rows = onednn_bf16.padded(out_features)
    scale = row_scale(weight, padded_rows)
    if rows == 1:
        gemm = by_row(calls.int8_row(words, scale), out_features)
    else:
        scales = scale.view(-1, onednn_bf16.ROWS)
        gemm = onednn_bf16.make_plan(
            out_features, length, rows, lambda part: calls.fill_int8(words[part], scales[part])
        )
    return with_current_scales(onednn_bf16.with_padded_columns(gemm, in_features, length), weight, padded_rows)


def run_quantized(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` for x in bfloat16, quantized to int8 with one scale per row.

    Sums are exact int32, or float32 if x has one row.
    """
    gemm = make_plan_quantized(weight, x.shape[0], x.dtype) if input_scale is None else None
    if gemm is None:
        return int8_gemm.run_int8(x, weight, bias, activation, input_scale)
    return gemm(x, weight, bias)


def make_plan_quantized(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run_quantized` for one shape of x; None if it has to run without compiled kernels."""
    if not calls.ready(calls.INT8_INT8):
        return None
    out_features, length = weight.shape
    if rows == 1:
        words = onednn_int8.words_of(weight)
        if words is None:
            return None
        padded_rows = onednn_bf16.padded(out_features)
        row = calls.int8_row(words, row_scale(weight, padded_rows), quantized=True)
        one = onednn_bf16.with_padded_columns(by_row(row, out_features, wide=False), length, 4 * words.shape[1])
        return with_current_scales(one, weight, padded_rows)
    packed, scale = onednn_int8.qlinear_weight(weight), row_scale(weight, out_features)
    step = min(rows, rows_at_once(length, out_features))
    # Rounded up to a power of two, so that prompts of all lengths share a few buffers.
    room = 1 << (max(step, int8_gemm.MIN_ROWS) - 1).bit_length()
    slot = ("int8 rows", room, length)
    no_bias = packed.zeros.view(torch.float32)

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Kernels read a CPU tensor of shape [N]; torch adds any other bias, or raises an error.
        simple = bias is not None and bias.shape == no_bias.shape and bias.is_cpu
        added = bias.detach().float().contiguous() if bias is not None and simple else no_bias
        buffer = cached_object(slot, room * (length + 4), lambda: _Rows(room, length))
        out = x.new_empty(*x.shape[:-1], out_features)
        parts = [(x.reshape(rows, length).contiguous(), out.view(rows, out_features))]
        if step < rows:
            parts = list(zip(*(part.split(step) for part in parts[0])))
        for part, into in parts:
            read, codes, steps = buffer.rows(len(part))
            calls.rows_to_int8(part, codes, steps)
            if SCRATCH_SUMS_BYTES < 4 * len(read) * out_features <= settings.workspace_bytes // 8:
                buffer_sums = scratch_buffer((len(read), out_features), torch.float32, slot=9)
                sums = onednn_int8.int8_gemm_into(buffer_sums, read, packed, scale)
            else:
                sums = onednn_int8.int8_gemm(read, packed, scale)
            calls.finish(sums[: len(part)], steps, added, into)
        return out if simple or bias is None else out.add_(bias)

    return with_current_scales(gemm, weight, out_features)


def rows_at_once(length: int, sums: int) -> int:
    """Rows of x in one GEMM: few enough for codes and float32 sums to stay in the cache, and at least 32.

    Args:
        length: K.
        sums: N.
    """
    most = min(int8_gemm.SUMS_BYTES, settings.workspace_bytes // 8)
    return max(32, min(most // (4 * sums), settings.workspace_bytes // 8 // length))


class _Rows:
    """Scratch buffers for the codes of some rows of x and their scales."""

    def __init__(self, rows: int, length: int) -> None:
        with without_ambient_state():
            self.codes = torch.zeros(rows, length, dtype=torch.uint8, device="cpu")
            self.steps = torch.zeros(rows, 1, dtype=torch.float32, device="cpu")
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the first rows: the codes that the GEMM reads (at least `int8_gemm.MIN_ROWS`), codes, scales."""
        found = self._views.get(count)
        if found is None:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            read = self.codes[: max(count, int8_gemm.MIN_ROWS)]
            found = self._views[count] = (read, self.codes[:count], self.steps[:count])
        return found

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.steps.nbytes


def by_row(row: Callable[[torch.Tensor], torch.Tensor], columns: int, *, wide: bool = True) -> Gemm:
    """Turns a kernel for one row of x, which returns float32 in any shape, into a GEMM.

    Args:
        columns: number of columns of the result; further (padded) ones of the kernel's result are dropped.
        wide: whether the kernel takes x in float32.
    """

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = row(x.float() if wide else x).view(*x.shape[:-1], -1)[..., :columns]
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    return gemm
