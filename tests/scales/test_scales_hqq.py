"""HQQ's shift, against its formula in float64."""

import pytest
import torch

from requanto.dtypes.qtypes import qtypes
from requanto.scales.hqq import BETA, KAPPA, POWER, ROUNDS, hqq


def reference(group: torch.Tensor, bits: int) -> tuple[float, float]:
    """Scale and shift of one group, step by step, with the zero point in codes as the paper has it."""
    wide, top = group.double(), 2**bits - 1
    inverse = top / (wide.max() - wide.min())
    zero, beta = torch.round(-wide.min() * inverse), BETA
    for _ in range(ROUNDS):
        codes = (wide * inverse + zero).round().clamp(0, top)
        error = wide - (codes - zero) / inverse
        accepted = torch.sign(error) * (error.abs() - error.abs().pow(POWER - 1) / beta).clamp(min=0)
        zero, beta = (codes - (wide - accepted) * inverse).mean(), beta * KAPPA
    return (1 / inverse).item(), (zero / inverse).item()


@pytest.mark.parametrize("size", [0.02, 3.0])  # of weights whose errors all shrink to nothing, and of others
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_formula_step_by_step(bits, size):
    groups = torch.randn(6, 4, 64) * size + 0.1 * size
    scale, shift = hqq(groups, qtypes[f"qint{bits}"], True)
    for row in range(6):
        for column in range(4):
            wanted_scale, wanted_shift = reference(groups[row, column], bits)
            assert scale[row, column].item() == pytest.approx(wanted_scale, rel=1e-5)
            # float32 may round one weight in a tie to the other side: a sixty-fourth of a step a round.
            assert shift[row, column].item() == pytest.approx(wanted_shift, abs=wanted_scale / 16)


def test_errors_of_a_group_add_up_to_nothing():
    """Far nearer to it than with minmax, whose errors lean to one side where the range does."""
    groups = torch.randn(64, 4, 64) * 0.02
    low, high = groups.amin(-1), groups.amax(-1)

    def lean(scale: torch.Tensor, shift: torch.Tensor) -> float:
        codes = ((groups + shift[..., None]) / scale[..., None]).round().clamp(0, 15)
        error = scale[..., None] * codes - shift[..., None] - groups
        return (error.mean(-1) / scale).abs().mean().item()

    assert lean(*hqq(groups, qtypes["qint4"], True)) < 0.8 * lean((high - low) / 15, -low)
