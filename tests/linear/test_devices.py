"""Models on several GPUs: what a GPU can compute is asked of the weight's, which need not be the current one."""

import contextlib

import pytest
import torch

from requanto import QTensor
from requanto.linear import registry
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import dequantize, layout, many
from requanto.linear.registry import Implementation, choose, problem_of


@pytest.fixture
def asked(monkeypatch):
    """The devices that were current when a capability was asked for; the first GPU has none of the kernels."""
    found, now = [], [0]

    @contextlib.contextmanager
    def device(index):
        before, now[0] = now[0], index
        try:
            yield
        finally:
            now[0] = before

    def capability(kind):
        found.append(now[0])
        return (70, 90)[now[0]]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(rules, "capability", capability)
    monkeypatch.setattr(rules, "available", lambda: True)
    return found


def test_choice(asked, monkeypatch):
    weight = QTensor.quantize(torch.randn(64, 128), "int4", group_size=64)
    problem = problem_of(weight, torch.bfloat16, 1)
    assert problem.index is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QTensor, "device", torch.device("cuda:1"))
        problem = problem_of(weight, torch.bfloat16, 1)
    assert (problem.device, problem.index) == ("cuda", 1)
    made = Implementation("test", lambda *_: None, lambda problem: rules.capability("cuda") >= 80, "")
    monkeypatch.setattr(registry, "_REGISTRY", [made])
    assert choose(problem).implementation is made
    assert asked == [1]


def test_other_questions(asked, monkeypatch):
    weight = QTensor.quantize(torch.randn(64, 128), "int4", group_size=64)
    monkeypatch.setattr(QTensor, "device", torch.device("cuda:1"))
    monkeypatch.setattr(layout, "capturing", lambda device: False)
    assert layout.fits(weight)
    assert many.why_not_here(torch.device("cuda:1"), 16) is None
    assert set(asked) == {1}


def test_dequantizing(asked, monkeypatch):
    weight = QTensor.quantize(torch.randn(64, 128), "int4", group_size=64)

    class Codes:
        device = torch.device("cuda:1")

    monkeypatch.setattr(dequantize, "is_fake", lambda codes: False)
    weight._storage.parts["qdata"] = Codes()
    assert dequantize.by_kernel(weight)
    assert asked == [1]
