"""x with NaN, infinity, and numbers at the ends of its dtype: they change their own row alone, as in torch's product."""

from __future__ import annotations

import math

import pytest
import torch
from ambient import threads
from cpu_reference import DTYPES, Form, form, quantized_layer

import requanto
from requanto.linear import linear
from requanto.runtime.settings import settings

FORMS = (
    form("int4"), form("int4", symmetric=True), form("int4", group_size=None), form("int4", group_size=16), form("int2"),
    form("int6"), form("int8"), form("uint8", group_size=32), form("nf4"), form("float8"), form("float8", group_size=32),
    form("fp8_e5m2"), form("mxfp8_e4m3"), form("mxfp4"), form("nvfp4"), form("fp6_e3m2"),
    form("int4", group_size=32, scale_bits=6),
)  # fmt: skip
ROWS = (1, 3, 4, 5, 20)
#: The second has more columns than a panel of bfloat16 pairs, but not of float32.
SIZES = ((40, 96), (16, 1120))


@pytest.fixture(autouse=True)
def kernels(cpu_level: str) -> None:
    if cpu_level == "torch":
        pytest.skip("of the kernels: torch's GEMM sums codes before they are scaled, and depends on the threads")


def packed(one: Form, dtype: torch.dtype, rows: int, length: int) -> torch.nn.Linear:
    layer = quantized_layer(one.weight(rows, length, dtype, torch.Generator().manual_seed(1)))
    requanto.prepare(layer, smallest=0)
    return layer


@pytest.mark.parametrize("one", FORMS, ids=str)
def test_a_row_alone(cpu_level, one):
    random = torch.Generator().manual_seed(2)
    for number, dtype in enumerate(DTYPES):
        info = torch.finfo(dtype)
        layer = packed(one, dtype, *SIZES[number % 2])
        values = layer.weight.dequantize().double()
        for rows in ROWS:
            x, row, column = torch.randn(rows, values.shape[1], generator=random).to(dtype), rows // 2, rows * 3
            others = [other for other in range(rows) if other != row]
            for activation in (None, requanto.qint8):
                for size in (math.nan, math.inf, -math.inf, info.max / 3, 2.0**90, info.smallest_normal / 8):
                    if not math.isnan(size) and info.max < abs(size) < math.inf:
                        continue
                    with torch.no_grad():
                        usual = linear(x, layer.weight, activation=activation)
                        changed = x.clone()
                        changed[row, column] = size
                        found = linear(changed, layer.weight, activation=activation)
                    about = f"{dtype}, {rows} rows, {size}, {activation}"
                    assert torch.equal(found[others], usual[others]), about
                    wanted = changed[row].double() @ values.t()
                    if activation is not None:
                        assert bool(found[row].isnan().all()) != math.isfinite(size), about
                    elif math.isfinite(size):
                        # Where a large number meets a weight of 0, others of its block may be lost.
                        largest = max(1.0, abs(size))
                        limit = 0.02 * changed[
                            row
                        ].double().abs() @ values.abs().t() + 0.1 * largest * values.abs().amax(1)
                        near = wanted.abs() < 0.9 * info.max
                        assert bool(((found[row] - wanted).abs() <= limit)[near].all()), about
                    else:
                        assert torch.equal(found[row].isnan(), wanted.isnan()), about
                        assert torch.equal(found[row].isinf(), wanted.isinf()), about


@pytest.mark.parametrize("one", FORMS, ids=str)
def test_threads_and_scratch_change_no_bit(cpu_level, one, monkeypatch):
    """Rows that are computed once more are so in whatever parts."""
    random = torch.Generator().manual_seed(4)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        layer = packed(one, dtype, *SIZES[number])
        for rows in (3, 37):
            x = torch.randn(rows, layer.weight.shape[1], generator=random).to(dtype)
            x[0, 5], x[1, 8], x[rows - 1] = math.nan, 1e33, x[rows - 1] * 1e-36
            found = []
            for workspace, count in ((2**27, 1), (2**14, 1), (2**17, 3)):
                monkeypatch.setattr(settings, "workspace_bytes", workspace)
                with threads(count), torch.no_grad():
                    found.append(layer(x).view(torch.uint8))
            assert all(torch.equal(other, found[0]) for other in found[1:]), f"{dtype}, {rows} rows"


@pytest.mark.parametrize("one", FORMS, ids=str)
def test_all_of_one_size(cpu_level, one):
    random = torch.Generator().manual_seed(3)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        layer = packed(one, dtype, *SIZES[number])
        values = layer.weight.dequantize().double()
        for rows in ROWS:
            for size in (0, 2.0**-118, 1e-30, 1e30, 1e36):
                x = (torch.randn(rows, values.shape[1], generator=random) * size).to(dtype)
                with torch.no_grad():
                    found = layer(x).double()
                wanted = x.double() @ values.t()
                about = f"{dtype}, {rows} rows, {size}"
                assert bool(found.isfinite().all()), about
                assert float((found - wanted).norm()) <= 0.2 * float(wanted.norm()), about
