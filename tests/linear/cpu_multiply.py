"""GEMMs by the C interface of the CPU kernels, at each level, for the tests of its arithmetics."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import cpu_cases as cases
import numpy as np
import pytest
import torch
from cpu_levels import PROPERTY

import requanto_cpu
from requanto_cpu import interface as c

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LEVELS = requanto_cpu.levels()
GUARD = 64


@pytest.fixture(autouse=True, params=LEVELS)
def every_level(request, record_property) -> Iterator[str]:
    """A test module that imports it runs each of its tests at all levels."""
    before = requanto_cpu.level()
    requanto_cpu.set_level(request.param)
    record_property(PROPERTY, request.param)
    yield request.param
    requanto_cpu.set_level(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def generator(seed: int | None = None) -> torch.Generator:
    """Fresh random data in each run; a failure shows the seed."""
    seed = torch.seed() % 2**31 if seed is None else seed
    print("seed", seed)
    return torch.Generator(device="cpu").manual_seed(seed)


def packed(weight: cases.Weight, kept: list, row_major: bool = False) -> c.RqWeight:
    """The struct of a weight, with codes aligned to 64 bytes as the interface asks.

    `row_major`: scales and shifts are stored row by row, else group by group.
    """
    fields = c.RqWeight(**weight.fields)
    strips = cases.strips_of(weight.codes, weight.fields["bits"])
    memory = np.zeros(strips.size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + strips.size] = strips
    fields.codes = memory.ctypes.data + start
    kept.append(memory)
    for name, array in {
        "scale": weight.scale, "shift": weight.shift, "row_scale": weight.row_scale, "row_shift": weight.row_shift,
        "table": weight.table, "levels": weight.levels,
    }.items():  # fmt: skip
        if row_major and name in ("scale", "shift") and array is not None:
            array = array.t().contiguous()
            setattr(fields, f"{name}_stride_n", array.shape[1])
            setattr(fields, f"{name}_stride_g", 1)
        if array is not None:
            setattr(fields, name, array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr())
            kept.append(array)
    return fields


def kept_as_it_was(memory: torch.Tensor, value: float, what: str) -> None:
    assert (memory[:GUARD] == value).all(), what
    assert (memory[-GUARD:] == value).all(), what


def multiply(
    weight: cases.Weight,
    x: torch.Tensor,
    arithmetic: int,
    *,
    out_dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
    scratch: int | None = None,
    gap: int = 0,
    row_major: bool = False,
) -> torch.Tensor:
    """x @ weight.T + bias by the library; memory around the results and the scratch buffer must stay as it is."""
    rows, outputs = x.shape[0], weight.codes.shape[0]
    out_dtype = out_dtype or (x.dtype if x.is_floating_point() else torch.float32)
    kept: list = []
    w = packed(weight, kept, row_major)
    gemm = c.RqGemm(
        weight=ctypes.pointer(w), rows=rows, x_stride=x.stride(0), out_stride=outputs + gap,
        x_dtype=cases.DTYPES.get(x.dtype, c.NONE), out_dtype=cases.DTYPES[out_dtype], arithmetic=arithmetic,
        bias_dtype=c.NONE if bias is None else cases.DTYPES[bias.dtype],
        bias=None if bias is None else bias.data_ptr(), steps=None if steps is None else steps.data_ptr(),
    )  # fmt: skip
    library = requanto_cpu.library()
    wanted, least = library.rq_gemm_scratch(gemm, rows), library.rq_gemm_least_scratch(gemm)
    assert 0 <= least <= wanted
    gemm.scratch_bytes = wanted if scratch is None else max(scratch, least)
    memory = torch.full((gemm.scratch_bytes + 2 * GUARD,), 0x5A, dtype=torch.uint8, device="cpu")
    out = torch.full((2 * GUARD + rows * (outputs + gap),), 7.0, dtype=out_dtype, device="cpu")
    result = out[GUARD : out.numel() - GUARD].view(rows, outputs + gap)
    requanto_cpu.check(library.rq_gemm(gemm, x.data_ptr(), result.data_ptr(), memory.data_ptr() + GUARD))
    kept_as_it_was(memory, 0x5A, "memory around the scratch buffer")
    kept_as_it_was(out, 7, "memory around the results")
    assert (result[:, outputs:] == 7).all(), "memory between the rows of the results"
    return result[:, :outputs].clone()


def numbers(weight: cases.Weight) -> tuple[np.ndarray, np.ndarray]:
    """Values that integers multiply, with scale and shift, float64 [N, K]; and the sum of sizes of their parts."""
    fields, values = weight.fields, weight.values.astype(np.float64)
    scales = weight.scales.astype(np.float64)
    offset = 0.0
    if fields["code"] == c.TABLE:
        values = fields["level_scale"] * (weight.levels.astype(np.float64) - 128)[weight.codes]
    else:
        offset = np.abs(scales) * abs(fields["zero_code"])
    size = np.abs(values * scales) + offset
    values = values * scales
    if weight.shifts is not None:
        values, size = values - weight.shifts, size + np.abs(weight.shifts)
    return values, size


def code_of(kind: str) -> dict:
    return {"code": c.TABLE} if kind == "table" else {"code": c.INTEGER}


KINDS = [("integer", bits) for bits in range(1, 9)] + [("table", bits) for bits in range(1, 7)]
GROUPS = [8, 16, 24, 32, 40, 48, 64, 96, 128, 264]


def block_of(group: int) -> int:
    return next(block for block in (32, 16, 8) if group % block == 0)


def shape(random: torch.Generator, group: int) -> tuple[int, int]:
    rows = int(torch.randint(1, 90, (), generator=random))
    return rows, group * int(torch.randint(1, max(2, 1200 // group), (), generator=random))
