"""Types of fewer than 4 bits without samples: one warning a type, which names what to do; none where it does not apply."""

import logging

import pytest
import torch
from torch import nn

import requanto
from requanto.config import few_bits
from requanto.dtypes.qtypes import qtypes, short_name
from requanto.integrations.optimum_quanto import quantize as as_optimum_quanto


@pytest.fixture(autouse=True)
def said(monkeypatch):
    monkeypatch.setattr(few_bits, "_said", set())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)).bfloat16()


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.name == few_bits.__name__ and r.levelno == logging.WARNING]


def test_every_type_by_its_bits(caplog):
    for kind in set(qtypes.values()):
        caplog.clear()
        requanto.quantize(net(), weights=kind)
        found = warned(caplog)
        assert len(found) == (kind.bits < 4), kind.name
        if found:
            assert found[0].startswith(f"{short_name(kind)} weights without samples: ")
            assert (
                f"requanto.quantize(model, weights={short_name(kind)!r}, method='gptq', calibration=samples)"
                in found[0]
            )
            assert f"requanto quantize --weights {short_name(kind)} --method gptq" in found[0]
            assert "or take 4 bits or more" in found[0]


def test_once_for_each_type(caplog):
    for kind in ("int2", "int3", "int2", "int3"):
        requanto.quantize(net(), weights="int8", modules={"1": kind})
    as_optimum_quanto(net(), weights="int2")
    assert [line.split()[0] for line in warned(caplog)] == ["int2", "int3"]


def test_optimum_quantos_function(caplog):
    as_optimum_quanto(net(), weights="int2")
    assert len(warned(caplog)) == 1


def test_a_budget_by_its_bits(caplog):
    requanto.quantize(net(), weights="auto", bits=12.0, progress=False)
    assert not warned(caplog)
    for _ in range(2):
        requanto.quantize(net(), weights="auto", bits=3.9, candidates=["int2:32"], progress=False)
    (line,) = warned(caplog)
    assert "bits a weight without samples: " in line
    assert "--weights auto --bits" in line


def test_none_with_samples_nor_for_what_was_quantized_before(caplog):
    model, samples = net(), [torch.randn(4, 64, dtype=torch.bfloat16)]
    requanto.quantize(model, weights="int2", calibration=samples, progress=False)
    requanto.quantize(net(), weights="auto", bits=4.0, candidates=["int2:32"], calibration=samples, progress=False)
    other = net()
    requanto.requantize(other, model.state_dict(), requanto.quantization_map(model))
    assert isinstance(other[0].weight, requanto.QTensor)
    assert not warned(caplog)
