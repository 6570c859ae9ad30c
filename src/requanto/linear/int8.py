"""int8 weights in oneDNN's blocked form, by kernels of torch's compiler that read the same bytes.

One row of x is multiplied with the codes as they are read; more rows with bfloat16, in oneDNN's order, block by block
(`requanto.linear.blocked`). Both beat oneDNN's own int8 product for float x (`requanto.linear.onednn`) where that is mostly
the cost of its calls: in small weights, and in large ones with very many rows.
"""

from __future__ import annotations

import torch

from requanto.layout import packed_as
from requanto.linear import blocked, compiled, onednn
from requanto.linear.onednn import OneDnnCodes
from requanto.qtensor import QTensor
from requanto.qtypes import qtype

#: Weights below which these kernels beat two int8 products with any number of rows, and the rows from which they always do
#: (benchmarks/results/cpu_paths.json).
BELOW = 2**23
ROWS = 257


def pays(rows: int, weights: int, dtype: torch.dtype) -> bool:
    """True where these kernels were faster than two int8 products, for x in bfloat16 or float16."""
    return weights < BELOW if rows == 1 else dtype == torch.bfloat16 and (weights < BELOW or rows >= ROWS)


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ w.T + bias`` in x's dtype."""
    packed = packed_as(weight, OneDnnCodes, onednn.pack)
    if packed.words is None or not compiled.ready(compiled.INT8):
        return onednn.run_split(x, weight, bias, activation, input_scale)
    scale = weight.scale.reshape(-1).float()
    if x.shape[0] == 1:
        return _row(x.float(), packed.words, scale, bias, x.dtype)
    out = blocked.product(x, packed.words, scale.view(-1, blocked.ROWS), compiled.int8_words)
    return out if bias is None else out.add_(bias)


def run_quantized_row(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same of one row in bfloat16, quantized to int8 under its own scale; sums are float32."""
    packed = packed_as(weight, OneDnnCodes, onednn.pack)
    if packed.words is None or input_scale is not None or not compiled.ready(compiled.INT8_INT8):
        return onednn.run_int8(x, weight, bias, activation, input_scale)
    return _row(x, packed.words, weight.scale.reshape(-1).float(), bias, x.dtype)


def _row(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    out = compiled.int8_row(x.contiguous(), words, scale).view(1, -1)
    return (out if bias is None else out.add_(bias)).to(dtype)
