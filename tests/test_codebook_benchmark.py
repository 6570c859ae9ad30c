"""The arithmetic of benchmarks/codebooks.py: bits, nearest values, and fits that do not lose to what they extend."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

from codebooks import SETTINGS, Setting, column_of, nearest, rounded, stored_scale  # noqa: E402


def weight(rows=64, length=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(length, generator=generator) + 0.5
    return torch.randn(rows, length, generator=generator) * sizes


def error(values, found):
    return ((found - values).square().sum() / values.square().sum()).item()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.label)
def test_each_setting_rounds_to_few_values_and_counts_its_bits(setting):
    values = weight()
    found, bits = rounded(values, setting)
    column = torch.ones(1, 128) if setting.column is None else column_of(values, setting.column)
    groups = (found / column).view(64, -1, setting.group)
    groups = (groups / groups.abs().amax(-1, keepdim=True)).mul(1e3).round().flatten(0, 1)
    assert max(len(group.unique()) for group in groups) <= 2 ** (setting.bits * setting.width)
    assert error(values, found) < {2: 0.35, 3: 0.06, 4: 0.02}[setting.bits]
    scales = values.numel() // setting.group
    if setting.kind == "codebook":
        sizes = 2 ** (setting.bits * setting.width) * setting.width * max(1, 64 // setting.rows if setting.rows else 1)
        of_scales = (
            16 * scales if setting.scale_bits is None else scales * (setting.scale_bits + setting.signed) + 16 * 64
        )
        assert bits == values.numel() * setting.bits + of_scales + 16 * sizes + 16 * 128 * (setting.column is not None)


def test_signed_scales_have_the_sign_of_the_largest_weight_and_their_bits():
    scale = torch.tensor([[[3.0], [-15.0], [7.4]]])
    stored, bits = stored_scale(scale, Setting(2, 8, scale_bits=3, signed=True))
    torch.testing.assert_close(stored, torch.tensor([[[1.0], [-7.0], [3.0]]]) * 15 / 7, rtol=0.01, atol=0)
    assert bits == 3 * 4 + 16


def test_vectors_of_several_weights_are_the_nearest_ones():
    values = torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(0))
    unit = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    found = nearest(unit, values, Setting(2, 8, width=2)).view(-1, 2)
    distances = torch.cdist(unit.view(-1, 2), values[0])
    torch.testing.assert_close((found - unit.view(-1, 2)).norm(dim=1), distances.min(1).values)


def test_more_freedom_lowers_the_squared_error():
    values = weight(256)
    by = {
        name: error(values, rounded(values, Setting(2, 8, **options))[0])
        for name, options in {
            "tensor": {},
            "row": {"rows": 1},
            "pairs": {"width": 2},
            "pinned": {"pinned": True},
            "refits": {"refits": 2},
            "signed": {"signed": True},
        }.items()
    }
    assert by["row"] < by["tensor"] < by["pinned"]
    assert by["pairs"] < by["tensor"]
    assert by["signed"] < by["tensor"]
    assert by["refits"] < by["tensor"]
