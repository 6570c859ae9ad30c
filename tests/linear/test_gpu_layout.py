"""The GPU's execution layout as tensors: scales group-major, the same values to every reader, and back bit for bit."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto.dtypes.qtypes import qint8
from requanto.linear import prepack
from requanto.linear.gpu import layout
from requanto.linear.registry import problem_of
from requanto.tensor.qtensor import QTensor

pytest.importorskip("triton")

from fake_driver import fake_gpu_layers

from requanto_kernels import has_exec_layout

KINDS = {
    "int4": {"kind": "int4"},
    "int4 of other rows": {"kind": "int4", "group_size": 8},
    "int8 groups": {"kind": "int8", "group_size": 64},
    "int5": {"kind": "int5"},
    "int3": {"kind": "int3", "group_size": 64},
    "nf4": {"kind": "nf4"},
    "float8 groups": {"kind": "float8", "group_size": 64},
    "nvfp4": {"kind": "nvfp4"},
    "scales in 6 bits": {"kind": "int4", "scale_bits": 6},
    "whole zero points": {"kind": "int4", "zero_point": "integer"},
}


def made(name, *lead, k=512, dtype=torch.bfloat16):
    k = 1000 if "other rows" in name else k
    return QTensor.quantize(torch.randn(*(lead or (96,)), k).to(dtype), **KINDS[name])


def arranged(weight):
    """Names of the parts that are stored group-major."""
    return {n for n, p in weight._storage.parts.items() if p.dim() > 1 and p.shape[-1] > 1 and p.stride(-2) == 1}


@pytest.mark.parametrize("lead", [(96,), (3, 32)])
@pytest.mark.parametrize("name", KINDS)
def test_there_and_back(name, lead):
    weight = made(name, *lead)
    values, size = weight.dequantize(), weight.nbytes
    stored = {n: p.clone() for n, p in weight.inner_tensors().items()}
    weight.pack(layout.EXEC)
    floats = {
        n
        for n in ("scale", "shift")
        if n in stored and stored[n].is_floating_point() and n not in weight._spec.code_bits
    }
    assert arranged(weight) == (floats if weight.qtype.blocks is None else set())
    assert weight.nbytes == size
    assert torch.equal(weight.dequantize(), values)
    for copied in (weight.clone(), copy.deepcopy(weight), weight.detach(), weight.contiguous()):
        assert copied.layout_name == "exec"
        assert arranged(copied) == arranged(weight)
        assert torch.equal(copied.dequantize(), values)
    for part, tensor in weight.inner_tensors().items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, stored[part])
    assert torch.equal(weight[1:2].dequantize(), values[1:2])
    file = io.BytesIO()
    torch.save({"w": weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert loaded.layout_name == "plain"
    assert torch.equal(loaded.dequantize(), values)
    weight.unpack()
    for part, tensor in weight._storage.parts.items():
        assert tensor.is_contiguous()
        assert torch.equal(tensor, stored[part])


@pytest.mark.parametrize("name", ["int4", "int8 groups", "nf4"])
def test_every_reader_gets_the_same_values(name, exact):
    weight = nn.Parameter(made(name, dtype=torch.float32), requires_grad=False)
    x, index = torch.randn(3, 512), torch.tensor([5, 0, 5])
    rows, looked_up = F.linear(x, weight), F.embedding(index, weight)
    grad = x.clone().requires_grad_()
    F.linear(grad, weight).sum().backward()
    weight.pack(layout.EXEC)
    assert torch.allclose(F.linear(x, weight), rows, atol=1e-4)
    assert torch.equal(F.embedding(index, weight), looked_up)
    again = x.clone().requires_grad_()
    F.linear(again, weight).sum().backward()
    assert torch.allclose(again.grad, grad.grad, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.linear(x, weight), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), rows, atol=1e-4)
    halves = weight.split(48)
    assert torch.equal(torch.cat([one.dequantize() for one in halves]), weight.dequantize())
    other = made(name, dtype=torch.float32)
    with torch.no_grad():
        weight.copy_(other)
    assert torch.equal(weight.dequantize(), other.dequantize())
    assert arranged(weight)
    weight.scale = other.scale * 2
    assert "scale" in arranged(weight)
    assert torch.equal(weight.inner_tensors()["scale"], other.scale * 2)


def test_saved_in_the_plain_form(tmp_path):
    from safetensors.torch import load_file, save_file

    weight = made("int4")
    plain = {n: p.clone() for n, p in weight.inner_tensors().items()}
    weight.pack(layout.EXEC)
    save_file(requanto.checkpoint.flatten({"0.weight": weight}), tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    for part, tensor in plain.items():
        (name,) = (one for one in found if one.endswith(part))
        assert torch.equal(found[name], tensor)


def test_which_weights_have_it():
    with fake_gpu_layers():
        for name in KINDS:
            weight = made(name)
            assert layout.fits(weight)
        by_row = QTensor.quantize(torch.randn(96, 512), "uint1", group_size=None)
        assert layout.fits(by_row)  # costs nothing, and operators find the storage
        by_row.pack(layout.EXEC)
        assert problem_of(by_row, torch.bfloat16, 1).layout == "plain"
        assert problem_of(made("int4"), torch.bfloat16, 1, layout="exec").layout == "exec"
        assert layout.fits(QTensor.quantize(torch.randn(96, 512), "int4", group_size=64), qint8)
        permuted = has_exec_layout(8, 512)  # GEMMs of two 8-bit codes read the plain order
        assert layout.fits(QTensor.quantize(torch.randn(96, 512), "int8"), qint8) is not permuted
    assert not layout.fits(made("int4"))  # on a CPU


def test_codes_that_keep_their_order_may_share_memory(monkeypatch):
    monkeypatch.setattr(prepack, "SMALLEST", 0)
    with fake_gpu_layers(), torch.no_grad():
        for name, packed in (("float8 groups", not has_exec_layout(8, 512)), ("int4", False)):
            weight = nn.Parameter(made(name), requires_grad=False)
            held = weight.qdata
            F.linear(torch.randn(1, 512, dtype=torch.bfloat16), weight)
            assert weight.is_packed is packed
            assert not packed or weight._storage.parts["qdata"].data_ptr() == held.data_ptr()


def test_without_memory_the_stored_form_stays(monkeypatch, caplog):
    with fake_gpu_layers() as gpu, torch.no_grad():
        weights = [nn.Parameter(made("int4"), requires_grad=False) for _ in range(3)]
        stored = [{n: p.clone() for n, p in w._storage.parts.items()} for w in weights]
        monkeypatch.setattr(prepack, "SMALLEST", 0)
        monkeypatch.setattr(prepack, "_warned_of_memory", False)

        def fail(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

        monkeypatch.setattr(layout.ExecLayout, "pack", fail)
        x = torch.randn(1, 512, dtype=torch.bfloat16)
        with caplog.at_level(logging.INFO):
            for weight, parts in zip(weights, stored, strict=True):
                for _ in range(3):
                    F.linear(x, weight)
                assert weight.layout_name == "plain"
                assert all(torch.equal(weight._storage.parts[n], p) for n, p in parts.items())
                assert weight._storage.plans
        said = [r.message for r in caplog.records if "no memory is left" in r.message]
        assert len(said) == 1
        assert "prepare" in said[0]
        assert "wq_gemm_kernel" in gpu.names()
