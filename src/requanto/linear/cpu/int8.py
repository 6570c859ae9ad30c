"""int8 weights in oneDNN's blocked form, by kernels of torch's compiler that read the same bytes.

One row of x is multiplied with the codes as they are read; more rows with bfloat16, in oneDNN's order, block by block
(`cpu.onednn_bf16`). The first always beats oneDNN's own int8 product for float x (`cpu.onednn_int8`), the
second where that is mostly the cost of its calls: in small weights, and in large ones with very many rows.

Rows of x that become int8 go through oneDNN's product, between two kernels; one row through a single one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import calls
from requanto.linear.cpu.scales import refreshed, row_scale
from requanto.linear.registry import Gemm
from requanto.runtime.buffers import keep, workspace
from requanto.runtime.settings import settings
from requanto.runtime.tracing import neutral
from requanto.tensor.qtensor import QTensor

#: Weights below which these kernels beat two int8 products with any number of rows, and the rows from which they always do,
#: as they do with one (benchmarks/results/cpu_paths.json).
BELOW = 2**23
ROWS = 257
#: Bytes of quantized rows' float32 sums beyond which these stand in this thread's buffer: fresh pages would take longer
#: than zeros and a sum.
KEPT_SUMS = 2**21
#: Numbers of rows whose parts of a buffer are remembered.
COUNTS = 64


def pays(rows: int, weights: int, dtype: torch.dtype) -> bool:
    """True where these kernels were faster than two int8 products, for x in bfloat16 or float16."""
    return rows == 1 or (dtype == torch.bfloat16 and (weights < BELOW or rows >= ROWS))


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w.T + bias`` in x's dtype."""
    gemm = bind(weight, x.shape[0], x.dtype)
    if gemm is None:
        return onednn_int8.run_split(x, weight, bias, activation, input_scale)
    return gemm(x, weight, bias)


def bind(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """`run` for one shape of x; None: oneDNN's GEMM does it."""
    words = onednn_int8.words_of(weight)
    if words is None or not calls.ready(calls.INT8):
        return None
    (out_features, own), length = weight.shape, 4 * words.shape[1]
    filled = onednn_bf16.padded(out_features)
    scale = row_scale(weight, filled)
    if rows == 1:
        gemm = by_row(calls.int8_row(words, scale), out_features)
    else:
        scales = scale.view(-1, onednn_bf16.ROWS)
        gemm = onednn_bf16.bind(out_features, length, rows, lambda part: calls.fill_int8(words[part], scales[part]))
    return refreshed(onednn_bf16.widened(gemm, own, length), weight, filled)


def run_quantized(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same of x in bfloat16, quantized to int8 under a scale for each row; one row's sums are float32, those of more
    are exact."""
    gemm = bind_quantized(weight, x.shape[0], x.dtype) if input_scale is None else None
    if gemm is None:
        return onednn_int8.run_int8(x, weight, bias, activation, input_scale)
    return gemm(x, weight, bias)


def bind_quantized(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """`run_quantized` made ready; None: oneDNN's GEMM does it."""
    if not calls.ready(calls.INT8_INT8):
        return None
    out_features, length = weight.shape
    if rows == 1:
        words = onednn_int8.words_of(weight)
        if words is None:
            return None
        filled = onednn_bf16.padded(out_features)
        row = calls.int8_row(words, row_scale(weight, filled), quantized=True)
        one = onednn_bf16.widened(by_row(row, out_features, wide=False), length, 4 * words.shape[1])
        return refreshed(one, weight, filled)
    packed, scale = onednn_int8.gemm_of(weight), row_scale(weight, out_features)
    step = min(rows, rows_at_once(length, out_features))
    # Rounded up, so that prompts of all lengths share a few buffers.
    room = 1 << (max(step, onednn_int8.LEAST) - 1).bit_length()
    slot = ("int8 rows", room, length)
    no_bias = packed.zeros.view(torch.float32)

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        # Kernels read plain memory: a bias that is to be spread, or lies elsewhere, is torch's business.
        simple = bias is not None and bias.shape == no_bias.shape and bias.is_cpu
        added = bias.detach().float().contiguous() if bias is not None and simple else no_bias
        buffer = keep(slot, room * (length + 4), lambda: _Rows(room, length))
        out = x.new_empty(*x.shape[:-1], out_features)
        parts = [(x.reshape(rows, length).contiguous(), out.view(rows, out_features))]
        if step < rows:
            parts = list(zip(*(part.split(step) for part in parts[0])))
        for part, into in parts:
            read, codes, steps = buffer.rows(len(part))
            calls.rows_to_int8(part, codes, steps)
            if KEPT_SUMS < 4 * len(read) * out_features <= settings.workspace_bytes // 8:
                kept = workspace((len(read), out_features), torch.float32, slot=9)
                sums = onednn_int8.product_into(kept, read, packed, scale)
            else:
                sums = onednn_int8.product(read, packed, scale)
            calls.finish(sums[: len(part)], steps, added, into)
        return out if simple or bias is None else out.add_(bias)

    return refreshed(gemm, weight, out_features)


def rows_at_once(length: int, sums: int) -> int:
    """Rows of x in one product: their codes and float32 sums stay in the cache, and few rows read a weight for nothing."""
    most = min(onednn_int8.SUMS_BYTES, settings.workspace_bytes // 8)
    return max(32, min(most // (4 * sums), settings.workspace_bytes // 8 // length))


class _Rows:
    """Codes of some rows of x, and their scales."""

    def __init__(self, rows: int, length: int) -> None:
        with neutral():
            self.codes = torch.zeros(rows, length, dtype=torch.uint8, device="cpu")
            self.steps = torch.zeros(rows, 1, dtype=torch.float32, device="cpu")
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def rows(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes that a product reads, codes and scales to be written, of the first rows."""
        found = self._views.get(count)
        if found is None:
            if len(self._views) >= COUNTS:
                self._views.clear()
            read = self.codes[: max(count, onednn_int8.LEAST)]
            found = self._views[count] = (read, self.codes[:count], self.steps[:count])
        return found

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.steps.nbytes


def by_row(row: Callable[[torch.Tensor], torch.Tensor], columns: int, *, wide: bool = True) -> Gemm:
    """The product of a kernel for one row of x, which gives float32 in any shape.

    Args:
        columns: of the result; what the kernel gives beyond is left out.
        wide: it takes x in float32.
    """

    def product(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = row(x.float() if wide else x).view(*x.shape[:-1], -1)[..., :columns]
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    return product
