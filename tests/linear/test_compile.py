"""torch.compile: one graph for all layers of a shape, packed or not, for every weight type."""

import pytest
import torch
from torch import nn

from requanto import QTensor
from requanto.linear.prepack import prepare

pytestmark = pytest.mark.usefixtures("exact")


class Stack(nn.Module):
    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(128, 128, dtype=dtype) for _ in range(2))
        for layer in self.layers:
            layer.weight = nn.Parameter(QTensor.quantize(layer.weight, kind), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_graph_without_recompiling(kind, dynamic, packed, dtype):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = Stack(kind, dtype)
    if packed:
        prepare(model, smallest=0)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for rows in (3, 5, 9):
            x = torch.randn(rows, 128, dtype=dtype)
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
    # static first, then dynamic rows; never once a layer
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


def test_one_graph_serves_every_layer():
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = Stack("int4", torch.bfloat16)
    prepare(model, smallest=0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight)

    with torch.no_grad():
        for layer in model.layers:
            product(torch.ones(2, 128, dtype=torch.bfloat16), layer.weight)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    model = Stack("int8", torch.bfloat16)
    prepare(model, smallest=0)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_where_torch_does_not_say_that_it_compiles(kind, monkeypatch):
    # As in torch 2.11, whose flag is not set while operators run on fake tensors.
    torch._dynamo.reset()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    model = Stack(kind, torch.bfloat16)
    prepare(model, smallest=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)
