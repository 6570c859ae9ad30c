"""Inside `as_floats` code that knows nothing of quantized weights reads floats, and writes what is exact."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from requanto import QTensor
from requanto.tensor import dispatch
from requanto.tensor.reading import as_floats


def layer() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(32, 24)
    made.weight = nn.Parameter(QTensor.quantize(made.weight.data, "int4", group_size=16), requires_grad=False)
    return made


def test_reads_are_those_of_the_float_weight():
    weight = layer().weight
    value, other = weight.dequantize(), torch.randn(24, 32)
    with as_floats("a test"):
        assert (weight.shape, weight.dtype, weight.device) == (value.shape, value.dtype, value.device)
        assert len(weight) == 24
        assert isinstance(weight.data, QTensor)
        assert isinstance(weight.detach(), QTensor)
        assert torch.equal(torch.linalg.svdvals(weight), torch.linalg.svdvals(value))
        assert torch.equal(weight.T, value.T)
        assert torch.equal(weight[3:5, ::2], value[3:5, ::2])
        assert torch.equal(weight.data.view(24, 4, 8).norm(dim=1), value.view(24, 4, 8).norm(dim=1))
        assert torch.equal(weight * other, value * other)
        assert torch.equal(other + weight, other + value)
        assert torch.equal(torch.mm(weight, other.T), value @ other.T)
        assert torch.equal(torch.zeros_like(weight), torch.zeros_like(value))
        assert torch.equal(weight.to(torch.float64), value.double())
        assert nn.Parameter(weight.T).requires_grad


def test_a_layers_gemm_runs_on_the_codes(monkeypatch):
    made, x = layer(), torch.randn(3, 32)
    expected = made(x)
    monkeypatch.setattr(QTensor, "dequantize", lambda *a, **k: pytest.fail("dequantized"))
    with as_floats("a test"):
        assert torch.equal(made(x), expected)


def test_gradients_flow_through_what_is_read():
    weight, scale = layer().weight, torch.rand(24, 1, requires_grad=True)
    x = torch.randn(3, 32)
    with as_floats("a test"):
        out = F.linear(x, weight * scale).sum() + F.linear(x, weight).sum()
    out.backward()
    expected = torch.autograd.grad((F.linear(x, weight.dequantize() * scale)).sum(), scale)[0]
    assert torch.allclose(scale.grad, expected, atol=1e-5)


@pytest.mark.parametrize("way", ["data", "iadd", "sub_", "mul_", "copy_", "setitem"])
def test_writes_are_exact_through_every_name(way):
    made = layer()
    weight, before = made.weight, made.weight.dequantize()
    delta = torch.outer(torch.randn(24), torch.randn(32))
    wanted = before * 1.5 if way == "mul_" else before - delta if way == "sub_" else before + delta
    with as_floats("a test"):
        if way == "data":
            weight.data = wanted
        elif way == "iadd":
            weight.data += delta
        elif way == "sub_":
            weight.data.sub_(delta)
        elif way == "mul_":
            weight.data.mul_(1.5)
        elif way == "copy_":
            weight.data.copy_(wanted)
        else:
            wanted = before.clone()
            wanted[2, 5] = weight.data[2, 5] = 0.5
    assert made.weight is weight
    assert (weight.dequantize() - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("way", ["data", "iadd", "copy_"])
def test_a_write_that_is_not_exact_is_refused(way):
    weight = layer().weight
    before, noise = weight.dequantize(), torch.randn(24, 32)
    with as_floats("a test"), pytest.raises(NotImplementedError, match="would lose most"):  # noqa: PT012
        if way == "data":
            weight.data = before + noise
        elif way == "iadd":
            weight.data += noise
        else:
            weight.data.copy_(before + noise)
    assert torch.equal(weight.dequantize(), before)
    assert dispatch.reader is None


def test_copies_of_the_values_are_independent_and_copies_of_a_module_stay_quantized():
    made = layer()
    before = made.weight.dequantize()
    with as_floats("a test"):
        for value in (made.weight.clone(), copy.deepcopy(made.weight), made.weight.data.clone()):
            assert not isinstance(value, QTensor)
            value += 1
        twin = copy.deepcopy(made)
        made.to("cpu")
        made.float()
    assert isinstance(twin.weight, QTensor)
    assert isinstance(twin.weight, nn.Parameter)
    assert isinstance(made.weight, QTensor)
    assert torch.equal(made.weight.dequantize(), before)


def test_the_log_says_once_whose_code_reads(caplog):
    caplog.set_level("INFO", "requanto")
    weight = layer().weight
    for _ in range(2):
        with as_floats("the method of this test"):
            weight.norm()
    assert caplog.text.count("the method of this test") == 1


def test_blocks_nest_and_end_with_an_error():
    weight = layer().weight

    def fails():
        with as_floats("outer"), as_floats("inner"):
            weight.norm()
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fails()
    assert dispatch.reader is None


def test_a_block_belongs_to_its_thread():
    """Blocks that overlap in two threads; a third thread is in none."""
    weight, seen = layer().weight, {}
    barrier = threading.Barrier(3, timeout=30)

    def inside(name: str) -> None:
        barrier.wait()
        for _ in range(300):
            with as_floats(name):
                seen[name] = type(weight.clone())

    def outside() -> None:
        barrier.wait()
        for _ in range(300):
            assert isinstance(weight.clone(), QTensor)
        seen["outside"] = QTensor

    threads = [threading.Thread(target=inside, args=(name,)) for name in ("one", "two")]
    threads.append(threading.Thread(target=outside))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"one": torch.Tensor, "two": torch.Tensor, "outside": QTensor}
    assert dispatch.reader is None
