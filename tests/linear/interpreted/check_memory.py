"""A device out of memory while a weight is packed: at whichever step, the stored form stays, and the GEMM is right."""

import importlib

import pytest
import torch
from gpu_stand_in import gpu, reference
from reference import TOLERANCE, error
from torch import nn

import requanto_kernels
from requanto.linear import linear, prepack
from requanto.tensor.qtensor import QTensor

FULL = torch.float32
STEPS = 6


@pytest.mark.parametrize("kind", ["int4", "int5"])
@pytest.mark.parametrize("step", range(STEPS))
def test_the_stored_form_stays(step, kind, monkeypatch, caplog):
    exec_layout = importlib.import_module("requanto_kernels.layout")
    calls = []

    def failing(original):
        def run(*args, **kwargs):
            calls.append(original)
            if len(calls) == step + 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
            return original(*args, **kwargs)

        return run

    monkeypatch.setattr(exec_layout, "CHUNK_CODES", 256 * 16)  # three parts, of which the first may have been converted
    monkeypatch.setattr(exec_layout, "_forward", failing(exec_layout._forward))
    monkeypatch.setattr(requanto_kernels, "group_major", failing(requanto_kernels.group_major))
    monkeypatch.setattr(prepack, "SMALLEST", 0)
    monkeypatch.setattr(prepack, "SMALLEST_ON_CPU", 0)
    monkeypatch.setattr(prepack, "_warned_of_memory", False)
    weight = nn.Parameter(QTensor.quantize(torch.randn(48, 256), kind), requires_grad=False)
    stored = {name: part.clone() for name, part in weight._storage.parts.items()}
    places = {name: part.data_ptr() for name, part in weight._storage.parts.items()}
    x, wide = torch.randn(3, 256), reference(weight).double()
    with gpu():
        for _ in range(2):
            assert error(linear(x, weight), x.double() @ wide.T) <= TOLERANCE[FULL]
        failed = step < len(calls)
        assert weight.is_packed is not failed
        if failed:
            assert "no memory is left" in caplog.text
            assert {name: part.data_ptr() for name, part in weight._storage.parts.items()} == places
        assert all(torch.equal(part, stored[name]) for name, part in weight.inner_tensors().items())
        calls.extend([None] * STEPS)  # there is memory again
        model = nn.Linear(256, 48, bias=False)
        model.weight = weight
        assert prepack.prepare(model, smallest=0) == {"weight": "exec"}
        assert error(linear(x, weight), x.double() @ wide.T) <= TOLERANCE[FULL]
        assert torch.equal(weight.inner_tensors()["qdata"], stored["qdata"])
