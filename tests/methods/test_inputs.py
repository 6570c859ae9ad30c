"""Convolutions with samples: the patches are those that torch multiplies, and calibrated weights beat rounded ones."""

import copy

import pytest
import torch
from torch import nn
from whole_models import error, logits, nearest, quiet

import requanto
from requanto.methods.inputs import patches
from requanto.tensor.qtensor import QTensor

CONVOLUTIONS = {
    "strided": (lambda: nn.Conv2d(6, 8, 3, padding=1, stride=2), (2, 6, 9, 7)),
    "same, dilated, reflected": (
        lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2, padding_mode="reflect"),
        (2, 6, 9, 7),
    ),
    "groups, circular": (lambda: nn.Conv1d(4, 8, 5, groups=2, padding=2, padding_mode="circular"), (3, 4, 11)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 6)),
    "three sizes": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (1, 2, 4, 5, 6)),
    "no batch, uneven": (lambda: nn.Conv2d(6, 8, (2, 3), padding="valid"), (6, 9, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_are_what_the_weight_is_multiplied_with(name, monkeypatch):
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[name]
    module, x = make(), torch.randn(shape)
    want = module(x)
    want = want if want.dim() == len(module.kernel_size) + 2 else want.unsqueeze(0)
    for chunk in (2**24, 50):  # in one part, and in many
        monkeypatch.setattr("requanto.methods.inputs._CHUNK", chunk)
        parts = list(patches(module, x))
        assert (len(parts) > shape[0]) == (chunk == 50)
        rows = torch.cat(parts)
        weight = module.weight.flatten(1).view(module.groups, -1, rows.shape[-1])
        found = torch.einsum("pgk,gnk->pgn", rows.view(-1, *weight.shape[::2]), weight).flatten(1) + module.bias
        torch.testing.assert_close(found, want.movedim(1, -1).reshape(found.shape), rtol=1e-4, atol=1e-5)


class Images(nn.Module):
    """Two convolutions that share an input, a grouped one and a pointwise one, in two blocks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.blocks = nn.ModuleList(ImageBlock() for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class ImageBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.grouped, self.last = nn.Conv2d(16, 32, 3, groups=2, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x):
        return x + self.last(torch.relu(self.grouped(torch.relu(self.wide(x) + self.narrow(x)))))


def smooth_images(count=4):
    """Images whose neighbouring pixels are alike, as those of photographs."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(count, 2, 4, 8, 8, generator=generator)
    return [nn.functional.interpolate(n, scale_factor=2, mode="bilinear") for n in noise]


@pytest.mark.parametrize("kind", ["int2", "int4", "int8"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrated_convolutions_beat_rounded_ones(kind, method, caplog):
    torch.manual_seed(0)
    model, samples = Images(), smooth_images()
    expected = logits(model, samples)
    choice = {"weights": kind} | ({} if kind == "int8" else {"group_size": 16})
    plain = error(nearest(copy.deepcopy(model), **choice), samples, expected)
    caplog.clear()  # the warning of int2 without samples, given once in a process, may be that of the line before
    found = requanto.quantize(copy.deepcopy(model), calibration=samples, method=method, **choice, **quiet)
    assert sum(isinstance(p, QTensor) for p in found.parameters()) == 9
    assert error(found, samples, expected) < (0.8 if method == "gptq" else 1.0) * plain
    assert "without samples" not in caplog.text


def test_convolutions_in_every_basis():
    torch.manual_seed(0)
    model, samples = Images(), smooth_images()
    expected = logits(model, samples)
    more = {"group_size": 16, "column_scale": "root", "rotation": True, "low_rank": 2}
    requanto.quantize(model, "int4", calibration=samples, method="gptq", **more, **quiet)
    assert error(model, samples, expected) < 0.1


def test_a_convolution_too_wide_for_its_moments_is_named(caplog, monkeypatch):
    monkeypatch.setattr("requanto.methods.selection.MOST_COLUMNS", 100)
    torch.manual_seed(0)
    model = requanto.quantize(Images(), "int4", group_size=16, calibration=smooth_images(), **quiet)
    assert "weights (convolution) are quantized without samples" in caplog.text
    assert "blocks.0.wide.weight" in caplog.text
    assert isinstance(model.blocks[0].wide.weight, QTensor)
