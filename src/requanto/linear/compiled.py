"""Kernels that torch.compile makes, on request: ``requanto.settings.compiled = True`` or ``REQUANTO_COMPILE=1``.

One row times e4m3 codes. No operator of torch reads float8 on a CPU, and with eager ones the weight passes through the cache
four times. Compiled, it is read once. The price: a C++ compiler, and 15 to 30 s at the first call on a machine (torch keeps
the result in its cache; later processes take about 2 s, most of it to import the compiler). Hence never unasked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from requanto.qtensor import QTensor
from requanto.qtypes import qtype

#: Rows of x that are multiplied one by one; beyond, dequantization is shared by enough rows.
ROWS = 4


def _row_times_e4m3(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    bits = codes.to(torch.int32)
    # sign to bit 31, exponent and mantissa in front of float32's: the number / 2^120
    values = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).view(torch.float32)
    return (values * x).sum(1) * (scale * 2.0**120)


@functools.cache
def _kernel() -> Callable[..., torch.Tensor]:
    return torch.compile(_row_times_e4m3, dynamic=True, fullgraph=True)


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """A few rows, one by one."""
    codes, scale = weight.qdata.view(torch.uint8), weight.scale.reshape(-1).float()
    with torch.inference_mode(False), torch.no_grad():
        out = torch.stack([_kernel()(row, codes, scale) for row in x.detach().float().clone()])
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype)
