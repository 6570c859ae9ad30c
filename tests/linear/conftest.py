import contextlib

import pytest
import torch
from cpu_levels import PROPERTY

import requanto_cpu
from requanto import QTensor
from requanto.linear.cpu import strips
from requanto.runtime.settings import registry_state


@pytest.fixture
def layer():
    """Makes a Linear with a quantized weight."""

    def make(kind="int8", out_features=128, in_features=192, dtype=torch.bfloat16, bias=True, **how):
        torch.manual_seed(0)
        module = torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        weight = QTensor.quantize(module.weight, kind, **how)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module

    return make


def _levels() -> list[str]:
    """Instruction sets of kernels that this processor has; ``["torch"]`` where the library cannot be used."""
    try:
        return requanto_cpu.levels()
    except requanto_cpu.LibraryUnavailable:
        return ["torch"]


@contextlib.contextmanager
def _at(level: str, properties: list):
    """Kernels of that level alone, for weights of any size; the closing line of a run names the levels that ran."""
    properties.append((PROPERTY, level))
    if level == "torch":
        yield level
        return
    before, padding = requanto_cpu.level(), strips.MAX_PADDING
    requanto_cpu.set_level(level)
    strips.MAX_PADDING = 1000
    registry_state.changed()  # plans depend on it
    try:
        yield level
    finally:
        requanto_cpu.set_level(before)
        strips.MAX_PADDING = padding
        registry_state.changed()


@pytest.fixture(params=_levels())
def cpu_level(request):
    """Each level of the CPU kernels that this processor has."""
    with _at(request.param, request.node.user_properties):
        yield request.param


@pytest.fixture(scope="module")
def at_level():
    """A context manager for one of `names`, for tests that draw it."""

    def at(level: str):
        return _at(level, [])

    at.names = _levels()
    return at
