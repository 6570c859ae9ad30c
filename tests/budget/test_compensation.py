"""The costs of a budget after GPTQ are those that GPTQ leaves."""

import logging

import pytest
import torch
from torch import nn

import requanto
from requanto.budget.compensation import compensated_share
from requanto.dtypes.qtypes import qint2, qint4
from requanto.methods.gptq import gptq, row_errors
from requanto.methods.grid import Grid
from requanto.tensor.qtensor import QTensor


def hessian(correlation, columns=64, samples=2048):
    """The second moment of inputs with a common part."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(samples, columns, generator=generator)
    inputs = own + correlation * torch.randn(samples, 4, generator=generator) @ torch.randn(
        4, columns, generator=generator
    )
    return inputs.t() @ inputs / samples


@pytest.mark.parametrize("kind", [qint2, qint4])
@pytest.mark.parametrize("correlation", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_the_share_is_what_gptq_leaves(kind, correlation, damping):
    weight, moment = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), hessian(correlation)
    grid = Grid(kind, True, torch.float32)
    found = gptq(weight, moment, grid, 16, damping=damping, rounds=0)
    scale, shift = found.scale.repeat_interleave(16, 1), found.shift.repeat_interleave(16, 1)
    nearest = grid.round(weight, scale, shift)
    before = (weight - nearest).square() @ moment.diagonal()
    share = compensated_share(moment, damping, "weight")
    predicted = (weight - nearest).square() @ (moment.diagonal() * share)
    left = row_errors(weight - found.values, moment).sum()
    assert float(predicted.sum()) == pytest.approx(float(left), rel=0.35)
    assert correlation == 0 or float(left) < 0.8 * float(before.sum())


class Two(nn.Module):
    """Two layers alike, one with independent inputs and one with inputs that depend on each other."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.free, self.bound = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.free.weight.data.copy_(torch.randn(64, 64, generator=generator))
        self.bound.weight.data.copy_(self.free.weight)
        mixing = torch.randn(4, 64, generator=generator)
        self.register_buffer("mixing", mixing)

    def forward(self, x):
        inputs = x @ torch.block_diag(torch.eye(64))
        common = x[..., :4] @ self.mixing
        common = common * (inputs.norm() / common.norm())
        return torch.cat([self.free(inputs), self.bound(common + 0.05 * inputs)], -1)


@pytest.mark.parametrize("iterator", [False, True])
def test_bits_go_where_gptq_gains_least(iterator, caplog):
    samples = [torch.randn(256, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    options = {"weights": "auto", "bits": 5.3, "scale_bits": 8, "candidates": ["int2:16", "int6:16"], "progress": False}
    with caplog.at_level(logging.INFO):
        found = requanto.quantize(Two(), calibration=iter(samples) if iterator else samples, method="gptq", **options)
    bits = {
        n: getattr(p, "qtype", None) and p.qtype.bits for n, p in found.named_parameters() if isinstance(p, QTensor)
    }
    assert bits["free.weight"] > bits["bound.weight"]
    assert "bound.weight: GPTQ leaves 0." in caplog.text
    # A method that rounds to nearest is not told that errors will be compensated.
    caplog.clear()
    with caplog.at_level(logging.INFO):
        requanto.quantize(Two(), calibration=samples, method="awq", **options)
    assert "GPTQ leaves" not in caplog.text
