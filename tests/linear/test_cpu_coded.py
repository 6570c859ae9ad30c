"""GEMMs of x in int8 by the C library: sums of integers are exact, at every level."""

from __future__ import annotations

import cpu_cases as cases
import numpy as np
import pytest
import torch
from cpu_multiply import (
    GROUPS,
    KINDS,
    block_of,
    code_of,
    every_level,  # noqa: F401
    generator,
    multiply,
    numbers,
    shape,
    threads,
)

from requanto_cpu import interface as c


def coded_reference(weight: cases.Weight, codes: torch.Tensor, steps: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values, size = numbers(weight)
    wide = codes.double().numpy() * steps.double().numpy()[:, None]
    return wide @ values.T, np.abs(wide) @ size.T


def test_int8_x() -> None:
    random = generator()
    for number, (kind, bits) in enumerate([*KINDS, ("integer", 8), ("integer", 4)]):
        for turn in range(2):
            group = GROUPS[(number + turn * 4) % len(GROUPS)]
            outputs, length = shape(random, group)
            if turn == 0:
                length = group = int(torch.randint(1, 1400, (), generator=random))
            weight = cases.random_weight(
                random, outputs, length, group, bits, block=32 if turn == 0 else block_of(group), **code_of(kind),
                shift_kind=c.PLAIN if number % 2 else c.NO_SHIFT,
            )  # fmt: skip
            rows = [1, 2, 3, 4, 5, 7, 12, 31][int(torch.randint(0, 8, (), generator=random))]
            codes = torch.randint(-128, 128, (rows, length), generator=random, dtype=torch.int8, device="cpu")
            steps = torch.rand(rows, generator=random, dtype=torch.float32, device="cpu")
            got = multiply(weight, codes, c.CODED, steps=steps)
            expected, size = coded_reference(weight, codes, steps)
            allowed = size * 2.0**-21 + np.abs(expected) * 2.0**-22 + 1e-30
            error = np.abs(got.double().numpy() - expected)
            assert (error <= allowed).all(), (kind, bits, group, rows, (error / allowed).max())


def test_int8_sums_are_exact() -> None:
    """A row without groups: one sum of 32 bits, rounded once, though it is computed in chunks."""
    random = generator()
    for bits, rows, length in [(8, 1, 5000), (8, 8, 5000), (4, 2, 3000), (4, 9, 3000), (3, 1, 2500)]:
        weight = cases.random_weight(random, 33, length, length, bits)
        weight.scale.fill_(1)
        weight.scales[:] = 1
        codes = torch.randint(-127, 128, (rows, length), generator=random, dtype=torch.int8, device="cpu")
        steps = torch.ones(rows, dtype=torch.float32, device="cpu")
        got = multiply(weight, codes, c.CODED, steps=steps)
        expected = codes.long() @ torch.from_numpy(weight.values).long().T
        assert torch.equal(got, expected.float()), (bits, rows)


def whole_numbers(weight: cases.Weight, random: torch.Generator) -> torch.Tensor:
    """Makes all values whole numbers: scales of 1, 2 and 4, one for each group. Returns them, int64 [N, K]."""
    rows, length = weight.codes.shape
    powers = torch.randint(0, 3, weight.scale.shape, generator=random, device="cpu").exp2()
    weight.scale.copy_(powers)
    groups = powers.reshape(-1, rows).T.numpy()  # [N, groups]
    weight.scales[:] = np.repeat(groups, length // groups.shape[1], axis=1)
    return torch.from_numpy(weight.values * weight.scales).long()


def test_exact_for_all_codes_groups_and_rows() -> None:
    """Nothing is rounded where all results are whole numbers below 2^24."""
    random = generator()
    for number, bits in enumerate([*range(1, 9)] * 3):
        group = (0, 32, 64, 96, 128, 480, 512, 1056)[(number * 3 + number // 8) % 8]
        outputs, length = shape(random, group or 8)
        length = group * (length // group) if group else int(torch.randint(1, 1500, (), generator=random))
        weight = cases.random_weight(
            random,
            outputs,
            length,
            group or length,
            bits,
            zero_code=int(torch.randint(0, 2**bits, (), generator=random)),
        )
        values = whole_numbers(weight, random)
        rows = int(torch.randint(1, 101, (), generator=random))
        most = max(1, min(127, 2**24 // (length * 4 * 2**bits)))
        codes = torch.randint(-most, most + 1, (rows, length), generator=random, dtype=torch.int8, device="cpu")
        codes[0, 0] = -most
        bias = torch.randint(-9, 9, (outputs,), generator=random, device="cpu").float() if number % 2 else None
        got = multiply(weight, codes, c.CODED, steps=torch.ones(rows, device="cpu"), bias=bias, gap=number % 3)
        expected = codes.long() @ values.T + (0 if bias is None else bias.long())
        assert torch.equal(got, expected.float()), (bits, group, outputs, length, rows)


def test_every_number_of_rows() -> None:
    random = generator()
    for bits, group in [(8, 711), (4, 96), (5, 128)]:
        length = group * (1 if group == 711 else 8)
        weight = cases.random_weight(random, 45, length, group, bits, shift_kind=c.PLAIN)
        codes = torch.randint(-128, 128, (70, length), generator=random, dtype=torch.int8, device="cpu")
        steps = torch.rand(70, generator=random, device="cpu")
        whole = multiply(weight, codes, c.CODED, steps=steps)
        for rows in range(5, 70):
            assert torch.equal(multiply(weight, codes[:rows], c.CODED, steps=steps[:rows]), whole[:rows]), rows


def test_results_do_not_depend_on_threads_or_scratch() -> None:
    random = generator()
    for bits, rows, group in [(8, 5, 1024), (8, 33, 1000), (4, 300, 64), (6, 530, 96)]:
        length = group * (1 if group > 100 else 12)
        weight = cases.random_weight(random, 75, length, group, bits, shift_kind=c.PLAIN)
        codes = torch.randint(-128, 128, (rows, length), generator=random, dtype=torch.int8, device="cpu")
        steps = torch.rand(rows, generator=random, device="cpu")
        with threads(1):
            one = multiply(weight, codes, c.CODED, steps=steps)
        expected, size = coded_reference(weight, codes, steps)
        assert (np.abs(one.double().numpy() - expected) <= size * 2.0**-20 + 1e-30).all()
        with threads(3):
            assert torch.equal(multiply(weight, codes, c.CODED, steps=steps), one)
        for scratch in (0, 50_000, 200_000):
            assert torch.equal(multiply(weight, codes, c.CODED, steps=steps, scratch=scratch), one)


@pytest.mark.parametrize("count", [1, 2])
def test_beside_gemms_of_torch(count: int) -> None:
    """torch's GEMMs of bfloat16 configure AMX's registers in the same threads: neither may rely on what it left there."""
    random = generator()
    weight = cases.random_weight(random, 70, 320, 320, 8)
    grouped = cases.random_weight(random, 70, 288, 96, 4)
    codes = torch.randint(-128, 128, (40, 320), generator=random, dtype=torch.int8, device="cpu")
    steps = torch.rand(40, generator=random, device="cpu")
    x, w = (torch.randn(shape, generator=random, device="cpu").bfloat16() for shape in ((50, 192), (64, 192)))

    def results() -> list[torch.Tensor]:
        of_groups = multiply(grouped, codes[:, :288].contiguous(), c.CODED, steps=steps)
        return [torch.nn.functional.linear(x, w), multiply(weight, codes, c.CODED, steps=steps), of_groups, x[:5] @ w.T]

    with threads(count):
        first = results()
        torch.testing.assert_close(first[0].double(), x.double() @ w.double().T, rtol=2**-7, atol=0.1)
        expected, size = coded_reference(weight, codes, steps)
        assert (np.abs(first[1].double().numpy() - expected) <= size * 2.0**-20).all()
        for _ in range(3):
            for one, other in zip(first, results(), strict=True):
                assert torch.equal(one, other)
