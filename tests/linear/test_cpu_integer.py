"""Integer GEMMs of the C library: x rounded in blocks to 8 or 16 bits, against float64.

Two references: the same rounding of x, with float64 sums (tight: only float32 sums across blocks are allowed for), and the
product without rounding (loose: the error that rounding x may cause).
"""

from __future__ import annotations

import ctypes
import itertools

import cpu_cases as cases
import numpy as np
import pytest
import torch
from cpu_multiply import (
    FLOATS,
    GROUPS,
    GUARD,
    KINDS,
    block_of,
    code_of,
    every_level,  # noqa: F401
    generator,
    kept_as_it_was,
    multiply,
    numbers,
    packed,
    shape,
    threads,
)

import requanto_cpu
from requanto_cpu import interface as c

#: Half of the distance between neighbours, relative to the value.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def rounded(x: torch.Tensor, block: int, most: float) -> tuple[np.ndarray, np.ndarray]:
    """x rounded as the kernels do, float64, and the step of each element."""
    rows, length = x.shape
    wide = torch.nn.functional.pad(x.float(), (0, -length % block)).view(rows, -1, block).numpy()
    largest = np.abs(wide).max(2, keepdims=True)
    inverse = np.where(largest > 0, np.float32(most) / np.where(largest > 0, largest, 1), 0).astype(np.float32)
    step = (largest * np.float32(1 / most)).astype(np.float64)
    codes = np.rint((wide * inverse).astype(np.float32)).astype(np.float64)
    steps = np.broadcast_to(step, codes.shape).reshape(rows, -1)[:, :length]
    return (codes * step).reshape(rows, -1)[:, :length], steps


def compare(
    weight: cases.Weight, x: torch.Tensor, arithmetic: int, got: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    block = weight.fields["block"]
    most = 127.0 if arithmetic == c.BLOCKS8 else 32512.0
    near, step = rounded(x, block, most)
    values, size = numbers(weight)
    added = 0.0 if bias is None else bias.double().numpy()
    expected = near @ values.T + added
    allowed = np.abs(near) @ size.T * 2.0**-20 + np.abs(added) * 2.0**-22
    allowed = allowed + np.abs(expected) * ROUNDING[got.dtype] * 1.01 + 1e-30
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-25
    error = np.abs(got.double().numpy() - expected)
    assert (error <= allowed).all(), f"rounded: {(error > allowed).mean():.3f} wrong, {(error / allowed).max():.3g}"
    exact = x.double().numpy() @ weight.dequantized().astype(np.float64).T + added
    spread = np.sqrt(np.square(step) @ np.square(values).T / 12)
    level = np.abs(x.double().numpy()) @ (np.abs(weight.scales) * weight.level_error).T
    error = np.abs(got.double().numpy() - exact)
    assert (error <= allowed + 7 * spread + level).all(), "the error is not that of rounding x"


@pytest.mark.parametrize("arithmetic", [c.BLOCKS8, c.BLOCKS16], ids=["8", "16"])
def test_all_codes_and_groups(arithmetic: int) -> None:
    random = generator()
    for number, (kind, bits) in enumerate(KINDS):
        for turn in range(3):
            group = GROUPS[(number * 3 + turn * 7 + int(torch.randint(0, 10, (), generator=random))) % len(GROUPS)]
            outputs, length = shape(random, group)
            if turn == 0:  # one scale a row; any length
                length = group = int(torch.randint(1, 1300, (), generator=random))
            weight = cases.random_weight(
                random, outputs, length, group, bits, dtype=FLOATS[turn], **code_of(kind),
                block=32 if turn == 0 else block_of(group), shift_kind=c.PLAIN if (number + turn) % 2 else c.NO_SHIFT,
            )  # fmt: skip
            rows = [1, 2, 3, 4, 5, 6, 7, 11, 13, 24, 40][int(torch.randint(0, 11, (), generator=random))]
            x = cases.random_x(random, rows, length, FLOATS[(turn + 1) % 3], 32, False)
            got = multiply(weight, x, arithmetic, out_dtype=torch.float32)
            compare(weight, x, arithmetic, got)


def test_every_number_of_rows() -> None:
    random = generator()
    weight = cases.random_weight(random, 45, 704, 64, 4, shift_kind=c.PLAIN)
    x = cases.random_x(random, 40, 704, torch.float32, 32, False)
    whole = multiply(weight, x, c.BLOCKS8)
    compare(weight, x, c.BLOCKS8, whole)
    for rows in range(1, 40):
        got = multiply(weight, x[:rows], c.BLOCKS8)
        compare(weight, x[:rows], c.BLOCKS8, got)
        if rows > 4:  # the same kernel
            assert torch.equal(got, whole[:rows]), rows


SCALES = [
    {"scale_kind": c.PLAIN, "shift_kind": c.PLAIN},
    {"scale_kind": c.CODES, "shift_kind": c.CODES, "whole_shift": True, "scale_bits": 6, "shift_bits": 4},
    {"scale_kind": c.CODES, "shift_kind": c.CODES, "whole_shift": False, "scale_bits": 5, "scale_groups": 2},
    {"scale_kind": c.CODES, "shift_kind": c.NO_SHIFT, "scale_bits": 8, "row_dtype": torch.bfloat16},
    {"scale_kind": c.PLAIN, "shift_kind": c.CODES, "whole_shift": True, "shift_bits": 8},
    {"scale_kind": c.E8M0},
    {"scale_kind": c.E4M3S, "row_dtype": torch.float16},
]


def test_all_scales_and_dtypes() -> None:
    random = generator()
    for number, (how, dtype) in enumerate(itertools.product(SCALES, FLOATS)):
        group = (32, 16, 64)[number % 3]
        weight = cases.random_weight(
            random, 37, group * 6, group, 4, dtype=dtype, block=block_of(group), zero_code=number % 9, **how
        )
        rows = (1, 9, 3, 17)[number % 4]
        out, bias_dtype = FLOATS[number // 2 % 3], (None, *FLOATS)[number % 4]
        memory = cases.random_x(random, rows, group * 6 + 5, dtype, 32, False)
        x = memory[:, : group * 6]
        bias = (
            None
            if bias_dtype is None
            else torch.randn(37, generator=random, device="cpu", dtype=torch.float32).to(bias_dtype)
        )
        got = multiply(weight, x, c.BLOCKS8, out_dtype=out, bias=bias, gap=number % 3)
        compare(weight, x, c.BLOCKS8, got, bias)
        other = multiply(weight, x, c.BLOCKS8, out_dtype=out, bias=bias, gap=number % 3, row_major=True)
        assert torch.equal(other, got), how


def test_scales_row_by_row() -> None:
    """The same numbers whatever the order of scales in memory: every number of groups, first and last strips."""
    random = generator()
    for groups, how in itertools.product([*range(1, 12), 17, 40], SCALES):
        outputs = (5, 16, 33, 52)[groups % 4]
        weight = cases.random_weight(random, outputs, groups * 32, 32, 4, dtype=FLOATS[groups % 3], **how)
        x = cases.random_x(random, 1, groups * 32, torch.float32, 32, False)
        got = multiply(weight, x, c.BLOCKS8)
        assert torch.equal(multiply(weight, x, c.BLOCKS8, row_major=True), got), (groups, how)


def test_long_rows_in_chunks() -> None:
    random = generator()
    for group, bits, rows, arithmetic in [
        (32, 4, 1, c.BLOCKS8), (8, 3, 2, c.BLOCKS8), (0, 8, 7, c.BLOCKS16), (0, 8, 1, c.BLOCKS16), (4800, 2, 5, c.BLOCKS8),
    ]:  # fmt: skip
        length = 9600 if group else 70001
        weight = cases.random_weight(random, 18, length, group or length, bits, block=block_of(group or 32))
        x = cases.random_x(random, rows, length, torch.float32, 32, False)
        compare(weight, x, arithmetic, multiply(weight, x, arithmetic))


def test_results_do_not_depend_on_threads_or_scratch() -> None:
    random = generator()
    for bits, rows, group in [(4, 1, 64), (4, 150, 64), (8, 33, 256), (6, 300, 16)]:
        weight = cases.random_weight(random, 75, 1024, group, bits, block=block_of(group), shift_kind=c.PLAIN)
        x = cases.random_x(random, rows, 1024, torch.float32, 32, False)
        arithmetic = c.BLOCKS16 if bits == 8 else c.BLOCKS8
        with threads(1):
            one = multiply(weight, x, arithmetic)
        compare(weight, x, arithmetic, one)
        with threads(3):
            assert torch.equal(multiply(weight, x, arithmetic), one)
        for scratch in (0, 50_000, 200_000):
            assert torch.equal(multiply(weight, x, arithmetic, scratch=scratch), one)


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_codes_do_not_overflow(sign: int) -> None:
    """Every product at its extreme: sums of 16 bits on the way would saturate, and sums of 32 bits are exact."""
    random = generator()
    for bits, length in [(1, 512), (2, 512), (3, 512), (4, 4096), (5, 512), (6, 512), (7, 512), (8, 60000)]:
        for zero in (0, 2**bits - 1):
            weight = cases.random_weight(random, 17, length, length, bits, zero_code=zero)
            weight.codes[:] = 2**bits - 1 - zero
            weight.values[:] = weight.codes.astype(np.float32) - zero
            weight.scale.fill_(1)
            weight.scales[:] = 1
            for rows in (1, 6):
                codes = torch.full((rows, length), -128 if sign < 0 else 127, dtype=torch.int8, device="cpu")
                steps = torch.ones(rows, dtype=torch.float32, device="cpu")
                got = multiply(weight, codes, c.CODED, steps=steps)
                whole = length * (2**bits - 1) * (128 if sign < 0 else 127) * (1 if zero == 0 else -1) * sign
                assert (got == torch.tensor(float(whole), dtype=torch.float32)).all(), (bits, zero, rows)
                if length < 5000:
                    x = torch.full((rows, length), 3.0 * sign, dtype=torch.float32, device="cpu")
                    for arithmetic in (c.BLOCKS8, c.BLOCKS16):
                        compare(weight, x, arithmetic, multiply(weight, x, arithmetic))


def test_rows_that_cannot_be_rounded() -> None:
    random = generator()
    weight = cases.random_weight(random, 20, 256, 64, 4)
    x = cases.random_x(random, 9, 256, torch.float32, 32, False)
    clean = multiply(weight, x, c.BLOCKS8)
    bad = x.clone()
    bad[1, 3], bad[4, 200], bad[5, 0], bad[8] = torch.nan, torch.inf, -torch.inf, x[8] * 1e-35
    got = multiply(weight, bad, c.BLOCKS8)
    kept = [0, 2, 3, 6, 7]
    assert torch.equal(got[kept], clean[kept])
    assert got[1].isnan().all()
    exact = bad.double() @ torch.from_numpy(weight.dequantized()).double().T
    torch.testing.assert_close(got[4:6], exact[4:6].float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[8].double(), exact[8], rtol=1e-4, atol=1e-40)
    zeros = torch.zeros(3, 256, dtype=torch.float32, device="cpu")
    assert (multiply(weight, zeros, c.BLOCKS8) == 0).all()
    # 16 bits: a block in which most elements are far below the largest one keeps them, since its row is not rounded.
    wide = torch.full((2, 256), 1e-4, dtype=torch.float32, device="cpu")
    wide[:, ::32] = 1000.0
    wide[1] = 1.0
    got = multiply(weight, wide, c.BLOCKS16)
    exact = wide.double() @ torch.from_numpy(weight.dequantized()).double().T
    size = wide.double().abs() @ torch.from_numpy(np.abs(weight.dequantized())).double().T
    assert ((got.double() - exact).abs() <= size * 1e-6).all()


def test_memory_that_is_too_small_is_an_error() -> None:
    weight = cases.random_weight(generator(), 20, 256, 64, 4)
    w = packed(weight, kept := [])
    gemm = c.RqGemm(weight=ctypes.pointer(w), rows=3, x_stride=256, out_stride=20, x_dtype=c.F32, out_dtype=c.F32)
    gemm.scratch_bytes = requanto_cpu.library().rq_gemm_least_scratch(gemm) - 1
    x = torch.zeros(3, 256, dtype=torch.float32, device="cpu")
    memory = torch.zeros(gemm.scratch_bytes, dtype=torch.uint8, device="cpu")
    code = requanto_cpu.library().rq_gemm(gemm, x.data_ptr(), x.data_ptr(), memory.data_ptr())
    assert code == c.E_SCRATCH
    assert kept


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_to_int8(dtype: torch.dtype) -> None:
    from requanto.dtypes.qtypes import qint8
    from requanto.linear.activations import quantize_activations

    random = generator()
    library = requanto_cpu.library()
    for rows, length, fixed in [
        (1, 1, None),
        (5, 77, None),
        (3, 1000, None),
        (7, 64, 0.02),
        (2, 33, 0.0),
        (2, 40, torch.inf),
    ]:
        memory = cases.random_x(random, rows, length + 3, dtype, 32, False)
        x = memory[:, :length]
        x[0, 0] = 0.0
        if rows > 4:
            x[1, length // 2], x[2, 1], x[3] = torch.nan, torch.inf, 0.0
        scale = None if fixed is None else torch.tensor([fixed], dtype=torch.float32, device="cpu")
        codes = torch.full((rows * length + 2 * GUARD,), 55, dtype=torch.int8, device="cpu")
        steps = torch.full((rows + 2 * GUARD,), 7.0, dtype=torch.float32, device="cpu")
        requanto_cpu.check(
            library.rq_rows_to_int8(
                x.data_ptr(), cases.DTYPES[dtype], rows, length, x.stride(0), None if scale is None else scale.data_ptr(),
                codes.data_ptr() + GUARD, steps.data_ptr() + 4 * GUARD,
            )
        )  # fmt: skip
        kept_as_it_was(codes, 55, "memory around the codes")
        kept_as_it_was(steps, 7, "memory around the scales")
        got, step = codes[GUARD:-GUARD].view(rows, length), steps[GUARD:-GUARD]
        expected, scales = quantize_activations(x, qint8, scale)
        scales = scales.flatten().expand(rows).clone()
        scales[x.isnan().any(1)] = torch.nan
        scales[scales.isinf()] = torch.nan
        assert torch.equal(step.isnan(), scales.isnan())
        some = ~scales.isnan()
        assert torch.equal(step[some], scales[some]), (step, scales)
        assert torch.equal(got[some].float(), expected[some]), fixed
